# SPDX-License-Identifier: Apache-2.0
"""Outcomes of `bench.ops_cpu` as a table for the terminal, Markdown for the docs, and JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any

from rich.table import Table

from bench.ceilings import Ceilings
from bench.gate import Verdict
from bench.op_registry import Case

OURS = "ours"
NAMES = ("op", "case", "shape", "dtype")
FIGURES = ("ours ms", "torch ms", "by", "ratio", "rate", "of ceiling")


@dataclass(frozen=True)
class Outcome:
    """A measured case; without samples if the gate refused it. samples: seconds a call of `OURS` and of each formulation in
    plain torch by name."""

    case: Case
    verdict: Verdict
    samples: dict[str, list[float]] | None = None
    amount: float = 0.0
    unit: str = ""

    def ceiling(self, most: Ceilings) -> float:
        return most.read if self.unit == "byte" else most.gemm[self.case.dtype]

    def record(self, most: Ceilings) -> dict[str, Any]:
        """For JSON. Seconds per call; `rate` in bytes or FLOPs a second. A refused case has no figures but its error."""
        error = self.verdict.error
        row: dict[str, Any] = {
            "op": self.case.row.op,
            "case": self.case.row.what,
            "shape": self.case.shape_name,
            "dtype": self.case.dtype_name,
            "error": None if isnan(error) else error,
            "allowed": self.verdict.allowed,
            "fault": self.verdict.fault or None,
        }
        if self.samples:
            medians = {name: statistics.median(times) for name, times in self.samples.items()}
            ours = medians.pop(OURS)
            torch_by = min(medians, key=lambda name: medians[name])
            plain = medians[torch_by]
            rate = self.amount / ours
            row |= {
                "ours_s": ours,
                "torch_s": plain,
                "torch_by": torch_by,
                "ratio": plain / ours,
                "rate": rate,
                "unit": f"{self.unit}/s",
                "share_of_ceiling": rate / self.ceiling(most),
                "samples": self.samples,
            }
        return row


def _cells(row: Mapping[str, Any]) -> list[str]:
    """One line of either table, from one record."""
    names = [str(row[name]) for name in NAMES]
    if row["fault"]:
        return [*names, "wrong", *[""] * (len(FIGURES) - 1)]
    unit = "GB/s" if row["unit"] == "byte/s" else "GFLOP/s"
    return [
        *names,
        _three(1e3 * row["ours_s"]),
        _three(1e3 * row["torch_s"]),
        row["torch_by"],
        f"{row['ratio']:.2f}",
        f"{_three(row['rate'] / 1e9)} {unit}",
        f"{100 * row['share_of_ceiling']:.0f} %",
    ]


def _three(value: float) -> str:
    """About three digits, never an exponent."""
    for bound, digits in ((100, 0), (10, 1), (1, 2), (0.1, 3)):
        if value >= bound:
            return f"{value:.{digits}f}"
    return f"{value:.4f}"


def _ceiling_line(facts: Mapping[str, Any]) -> str:
    gemm = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in facts["gemm_flop_s"].items())
    return f"ceilings: read {facts['read_bytes_s'] / 1e9:.1f} GB/s, torch GEMM {gemm} GFLOP/s; ratio: torch / ours"


def terminal(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> Table:
    """rows: records of `Outcome`. facts: what `bench.ops_cpu` writes beside them."""
    setting = f"{facts['threads']} threads, {facts['clock']}, caches {facts['caches']}"
    table = Table(title=f"{facts['cpu']}, {setting}", caption=_ceiling_line(facts))
    for name in NAMES:
        table.add_column(name, no_wrap=True)
    for name in FIGURES:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row), style="red" if row["fault"] else None)
    return table


def markdown(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """The same for the docs."""
    lines = [
        f"| {' | '.join((*NAMES, *FIGURES))} |",
        f"|{' --- |' * len(NAMES)}{' ---: |' * len(FIGURES)}",
        *(f"| {' | '.join(_cells(row))} |" for row in rows),
    ]
    low, high = sorted(facts["load_average"])
    versions = f"torch {facts['torch']}, Python {facts['python']}, C++ kernels {facts['isa']}"
    return "\n".join(
        (
            f"`{facts['command']}`",
            "",
            f"{facts['cpu']}, {facts['cores']} cores, last-level cache {facts['last_level_cache_mib']} MiB; {versions}; "
            f"{facts['threads']} thread(s), {facts['clock']}, caches {facts['caches']}, "
            f"load average {low:.1f} to {high:.1f}.",
            "",
            _ceiling_line(facts) + ".",
            "",
            *lines,
            "",
        )
    )

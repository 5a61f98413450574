# SPDX-License-Identifier: Apache-2.0
"""Tables of `bench.e2e_cpu` from its record: for the terminal and, the same, in Markdown for the docs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from bench.e2e_run import PHASES, TINY, TRANSFORMERS

Record = Mapping[str, Any]
REFERENCE_TTFT, REFERENCE_AIM = 5.5, 3.3  # seconds: of transformers where the aim was set, and the aim there

# shape → what it is to reach; the others have no aims
AIMS: dict[str, dict[str, float]] = {
    "mid": {"ttft": 1.8, "seconds": REFERENCE_AIM, "decode": 3.5, "read": 0.8, "int8": 1.7, "memory": 1.2},
    "3b": {"ttft": 1.6, "decode": 1.6, "memory": 1.2},
    TINY: {"outside": 0.25},
}


@dataclass(frozen=True)
class Grid:
    """A table of texts; the first column is a name."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def median_of(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of every number; those that a single run lacks are left out."""
    names = [name for name in runs[0] if all(isinstance(run.get(name), (int, float)) for run in runs)]
    return {name: statistics.median(run[name] for run in runs) for name in names}


def grids(record: Record) -> list[Grid]:
    """The tables of a record: requests, shares of the ceilings, memory if it was measured, aims if there are any."""
    found = [_requests(record), _shares(record)]
    found += [_memory(record)] if record["memory"] else []
    found += [aims] if (aims := _aims(record)).rows else []
    return found


def terminal(grid: Grid) -> Table:
    table = Table(title=grid.title, caption=grid.note or None)
    for number, name in enumerate(grid.head):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in grid.rows:
        table.add_row(*row)
    return table


def markdown(record: Record) -> str:
    """All tables, and what a reader needs to place them."""
    machine, setting = record["machine"], record["setting"]
    low, high = sorted(record["load_average"])
    lines = [
        f"`{record['command']}`",
        "",
        f"{machine['cpu']}, {machine['cores']} cores; torch {machine['torch']}, transformers {record['transformers']}, "
        f"C++ kernels {record['isa']}; {setting['dtype']}, {record['threads']} thread(s), {record['rounds']} timed "
        f"request(s) a contender, medians; load average {low:.1f} to {high:.1f}.",
        "",
    ]
    for grid in grids(record):
        lines += [f"**{grid.title}**", ""]
        lines += [f"| {' | '.join(grid.head)} |", f"| --- |{' ---: |' * (len(grid.head) - 1)}"]
        lines += [f"| {' | '.join(row)} |" for row in grid.rows]
        lines += ["", grid.note, ""] if grid.note else [""]
    return "\n".join(lines)


def _requests(record: Record) -> Grid:
    stock = record["median"][TRANSFORMERS]
    rows = []
    for name, m in record["median"].items():
        phases = [_seconds(m[p]) if p in m else "" for p in PHASES]
        if m.get("before") is not None and "kept" not in m:  # one phase behind the vision tower
            phases = [phases[0], "", "", _seconds(m["before"] + m["after"])]
        kept = f" ({m['kept']:.0f} kept)" if "kept" in m else ""
        speed = [
            _times(stock[figure] / m[figure]) if name != TRANSFORMERS else "" for figure in ("ttft", "decode")
        ]
        rows.append(
            [name + kept, _seconds(m["ttft"]), speed[0], *phases, f"{1e3 * m['decode']:.2f}", speed[1],
             f"{1 / m['decode']:.1f}"]
        )  # fmt: skip
    setting = record["setting"]
    title = f"{setting['shape']}, {setting['image_tokens']} of {setting['prompt_tokens']} tokens a picture, {setting['dtype']}"
    head = (
        "",
        "first token, s",
        "x",
        "vision",
        "layers ≤ K",
        "select",
        "rest",
        "ms a token",
        "x",
        "tokens/s",
    )
    note = "select: predictor, selection and compaction; rest: from layer K, or of an unpruned request all layers."
    return Grid(title, head, rows, note)


def _shares(record: Record) -> Grid:
    rows = []
    for name, m in record["median"].items():
        shares = [_percent(m.get(f"share_{phase}")) for phase in ("ttft", *PHASES)]
        decode = [
            f"{m['bytes'] / 2**20:.0f}",
            f"{m['bytes'] / m['decode'] / 1e9:.1f}",
            _percent(m["share_decode"]),
        ]
        rows.append([name, f"{m['flop'] / 1e9:.0f}", *shares, *decode, _percent(m.get("outside"))])
    head = ("", "GFLOP", "first token", "vision", "layers ≤ K", "select", "rest", "MiB a token", "GB/s", "of reading",
            "Python")  # fmt: skip
    looks = record["ceilings"]
    gemm, read = ([min(looks[k]), max(looks[k])] for k in ("gemm", "read"))
    best = max((form for form in looks["forms"] if "product" in form), key=looks["forms"].__getitem__)
    note = (
        f"Ceilings, {len(looks['gemm'])} looks between the requests: product {gemm[0] / 1e9:.0f} to {gemm[1] / 1e9:.0f} "
        f"GFLOP/s ({best.split(': ')[1]}), reading {read[0] / 1e9:.1f} to {read[1] / 1e9:.1f} GB/s. "
        "A share is of the higher look before and after its request; of reading: of looks between the steps. "
        "Python: share of a decode step outside the replay of its recording."
    )
    return Grid("Shares of what the machine can do", head, rows, note)


def _memory(record: Record) -> Grid:
    rows = []
    for name, m in record["memory"].items():
        held = m["weights"] + m["kv"]
        figures = (held, m["imports"], m["load_peak"], m["loaded"], m["peak"])
        rows.append([name, *(f"{x:.2f}" for x in figures), *(f"{r:.2f}" for r in _over(m))])
    head = (
        "",
        "weights + KV",
        "libraries",
        "peak of loading",
        "loaded",
        "peak",
        "peak of w + KV",
        "less libraries",
    )
    note = "libraries: resident before a weight is read. The last two: peak / (weights + KV), with and without libraries."
    return Grid("Resident memory in GiB, a process each", head, rows, note)


def _over(m: Mapping[str, float]) -> tuple[float, float]:
    """Peak over weights and cache; the same without the interpreter and its libraries."""
    held = m["weights"] + m["kv"]
    return m["peak"] / held, (m["peak"] - m["imports"]) / held


def _aims(record: Record) -> Grid:
    setting, median = record["setting"], record["median"]
    wanted = AIMS.get(setting["shape"], {}) if setting["dtype"] == "bf16" else {}
    stock, rows = median[TRANSFORMERS], []

    def row(what: str, asked: str, measured: str, met: bool) -> None:
        rows.append([what, asked, measured, "yes" if met else "no"])

    for name in ("unpruned", "pruned"):
        m = median[name]
        if "ttft" in wanted:
            ratio = stock["ttft"] / m["ttft"]
            row(f"first token, {name}", f">= {wanted['ttft']} x", _times(ratio), ratio >= wanted["ttft"])
        if "seconds" in wanted:
            scaled = m["ttft"] / stock["ttft"] * REFERENCE_TTFT
            asked = f"<= {REFERENCE_AIM} s for {REFERENCE_TTFT} s"
            row(f"first token where transformers takes {REFERENCE_TTFT} s, {name}", asked, f"{scaled:.2f} s",
                scaled <= wanted["seconds"])  # fmt: skip
        if "decode" in wanted:
            ratio = stock["decode"] / m["decode"]
            row(f"decode, {name}", f">= {wanted['decode']} x", _times(ratio), ratio >= wanted["decode"])
        if "read" in wanted:
            share = m["share_decode"]
            row(
                f"decode of the read limit, {name}",
                f">= {_percent(wanted['read'])}",
                _percent(share),
                share >= wanted["read"],
            )
        if "int8" in wanted and f"int8 {name}" in median:
            ratio = m["decode"] / median[f"int8 {name}"]["decode"]
            row(
                f"int8 decode over bf16, {name}",
                f">= {wanted['int8']} x",
                _times(ratio),
                ratio >= wanted["int8"],
            )
        if "outside" in wanted and "outside" in m:
            row(f"outside the replay, {name}", f"<= {_percent(wanted['outside'])}", _percent(m["outside"]),
                m["outside"] <= wanted["outside"])  # fmt: skip
        if "memory" in wanted and name in record["memory"]:
            whole, less = _over(record["memory"][name])
            asked = f"<= {wanted['memory']}"
            row(f"peak / (weights + KV), {name}", asked, f"{whole:.2f}", whole <= wanted["memory"])
            row(f"the same less the libraries, {name}", asked, f"{less:.2f}", less <= wanted["memory"])
    return Grid("Aims", ("", "asked", "measured", "met"), rows)


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _times(ratio: float) -> str:
    return f"{ratio:.2f} x"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"

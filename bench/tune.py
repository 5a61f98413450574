# SPDX-License-Identifier: Apache-2.0
"""Measures the launch configurations of an op's Triton kernels and prints the best ones as Python to paste.

python -m bench.tune attention                          every table that the op's rows at 7b reach
python -m bench.tune rms_norm --shape 3b --seconds 60
python -m bench.tune attention --case 'causal, 4k'      only rows whose name holds this

A candidate whose result is off, or which does not compile or launch, is left out and named. Candidates are compiled ahead
in parallel processes, and timed one after the other with the one in force between them.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer

from bench.gate import Gate
from bench.gpu_facts import ROOT
from bench.gpu_timing import CudaWatch, HostWatch, Watch, words
from bench.gpu_worker import free, load_rows, lost, written
from bench.op_registry import REGISTRY, TINY, Case, sizes
from bench.ops_gpu import environment, micro, stop
from glimpse_kernels import _triton, dispatch

Slot = tuple[_triton.Configs[Any], int, Hashable]
"""A table, and the capability and key of one of its entries."""
ROUNDS, ROUND_SECONDS = 15, 0.1


@dataclass
class Reached:
    """An entry that rows use. times: configuration → seconds of each row; faults: configuration → why it is out."""

    configs: _triton.Configs[Any]
    capability: int
    key: Hashable
    current: Any
    cases: list[Case] = field(default_factory=list)
    times: dict[Any, list[float]] = field(default_factory=dict)
    faults: dict[Any, str] = field(default_factory=dict)

    def candidates(self) -> list[Any]:
        """The one in force first."""
        return list(dict.fromkeys([self.current, *self.configs.candidates]))

    def share(self, config: Any) -> float:
        """Time over that of the configuration in force, geometric mean over the rows."""
        logs = [math.log(a / b) for a, b in zip(self.times[config], self.times[self.current], strict=True)]
        return math.exp(sum(logs) / len(logs))

    def best(self) -> Any | None:
        return min(self.times, key=self.share) if self.current in self.times else None


@contextmanager
def recorded(picked: dict[tuple[int, int, Hashable], tuple[Slot, Any]]) -> Iterator[None]:
    """Notes every configuration that is picked inside the block."""
    real = _triton.Configs.pick

    def pick(self: _triton.Configs[Any], capability: int, key: Hashable) -> Any:
        config = real(self, capability, key)
        picked[id(self), capability, key] = (self, capability, key), config
        return config

    with mock.patch.object(_triton.Configs, "pick", pick):
        yield


@contextmanager
def instead(configs: _triton.Configs[Any], capability: int, key: Hashable, config: Any) -> Iterator[None]:
    """Inside the block this entry of this table is `config`; the other entries stay."""
    real = _triton.Configs.pick

    def pick(self: _triton.Configs[Any], asked: int, wanted: Hashable) -> Any:
        return (
            config if self is configs and (asked, wanted) == (capability, key) else real(self, asked, wanted)
        )

    with mock.patch.object(_triton.Configs, "pick", pick):
        yield


def reach(cases: list[Case], say: Callable[[str], None]) -> list[Reached]:
    """Entries with candidates that the rows use, each with its rows."""
    found: dict[tuple[int, int, Hashable], Reached] = {}
    for case in cases:
        picked: dict[tuple[int, int, Hashable], tuple[Slot, Any]] = {}
        try:
            with recorded(picked):
                case.build().ours()
        except Exception as problem:
            say(f"{case.label}: {words(problem)}")
            continue
        finally:
            free()
        for name, ((configs, capability, key), config) in picked.items():
            if configs.candidates:
                entry = found.setdefault(name, Reached(configs, capability, key, config))
                entry.cases.append(case)
    return list(found.values())


def compile_ahead(entries: list[Reached], part: int, parts: int) -> None:
    """Launch this part of the candidates once each, so that Triton's cache holds them."""
    jobs = [(e, config) for e in entries for config in e.candidates()]
    for entry, config in jobs[part::parts]:
        for case in entry.cases:
            try:
                with instead(entry.configs, entry.capability, entry.key, config):
                    case.build().ours()
            except Exception:
                if lost():
                    return
            free()


def measure(
    entry: Reached,
    watch: Watch,
    gates: dict[str, Gate],
    deadline: float,
    limit: int,
    say: Callable[[str], None],
) -> None:
    """Check and time the candidates of one entry."""
    for config in entry.candidates()[: limit or None]:
        times: list[float] = []
        for case in entry.cases:
            if time.monotonic() > deadline:
                entry.faults[config] = "out of time"
                return
            try:
                if case.label not in gates:
                    gates[case.label] = Gate(case.build(), case.dtype, {})
                    free()
                work = case.build()
                with instead(entry.configs, entry.capability, entry.key, config):
                    verdict = gates[case.label].check(work.ours)
                    if not verdict.fault:
                        timed = watch.interleaved({"ours": work.ours}, rounds=ROUNDS, seconds=ROUND_SECONDS)
                        times.append(timed["ours"].median)
                fault = verdict.fault
            except Exception as problem:
                fault = words(problem)
            work = None  # type: ignore[assignment]
            free()
            if fault:
                entry.faults[config] = f"{case.row.what}: {fault}"
                if lost():
                    raise RuntimeError(f"the device is lost after {config}: {fault}")
                break
        if config not in entry.faults:
            entry.times[config] = times
            if entry.current in entry.times:
                say(f"  {entry.share(config):6.3f} x  {'  '.join(micro(t) for t in times)} us  {config}")
        else:
            say(f"   out      {config}: {entry.faults[config]}")


def report(entries: list[Reached], say: Callable[[str], None]) -> None:
    """The best of each entry, as it stands in a table."""
    say("\nbest measured, as entries of the tables:")
    for entry in entries:
        best = entry.best()
        if best is None:
            say(
                f"# {entry.configs.name} ({entry.capability}, {entry.key!r}): not measured {entry.faults.get(entry.current, '')}"
            )
            continue
        gain = (
            "as it is"
            if best == entry.current
            else f"{1 / entry.share(best):.2f} x as fast as {entry.current}"
        )
        rows = "; ".join(
            f"{c.row.what} {micro(t)} us" for c, t in zip(entry.cases, entry.times[best], strict=True)
        )
        say(f"# {entry.configs.name}: {gain}\n({entry.capability}, {entry.key!r}): {best!r},  # {rows}")


def main(
    op: Annotated[str, typer.Argument(help="The op whose rows are timed.")],
    shape: Annotated[str, typer.Option(help="7b or 3b.")] = "7b",
    side: Annotated[int, typer.Option(help="Image tokens along an edge: 32, 64, 128.")] = 64,
    case: Annotated[str, typer.Option(help="Only rows whose name holds this.")] = "",
    table: Annotated[str, typer.Option(help="Only tables whose name holds this.")] = "",
    seconds: Annotated[
        float, typer.Option(help="Time for everything; what is not measured by then is left out.")
    ] = 240.0,
    jobs: Annotated[
        int, typer.Option(help="Processes that compile ahead; default: 3/4 of the cores. 0: none.")
    ] = -1,
    output: Annotated[Path | None, typer.Option(help="Write all times, too: FILE.json.")] = None,
    rehearse: Annotated[
        bool, typer.Option(help="On the CPU, interpreted, tiny: its times say nothing.")
    ] = False,
    part: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Times every candidate of every table entry that the op's rows reach."""
    deadline = time.monotonic() + seconds
    if rehearse and not _triton.interpreting():
        raise typer.BadParameter("set TRITON_INTERPRET=1 for this", param_hint="--rehearse")
    if not rehearse and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device; with TRITON_INTERPRET=1, --rehearse runs on the CPU")
    load_rows()
    if op not in REGISTRY.ops() or not written(op):
        raise typer.BadParameter(f"expected an op with rows and a Triton kernel; found {op}", param_hint="OP")
    shapes, dtype = ([TINY], torch.float32) if rehearse else ([sizes(shape, side)], torch.bfloat16)
    chosen = [c for c in REGISTRY.cases([op], shapes, [dtype], "gpu") if case in c.row.what]

    def say(text: str) -> None:
        print(text, flush=True)

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(dispatch.force_backend("triton"))
        if not rehearse:
            stack.enter_context(torch.device("cuda"))
        helpers = [] if rehearse or part else ahead(jobs)
        try:
            entries = [e for e in reach(chosen, say) if table in e.configs.name]
            if part:
                number, parts = (int(n) for n in part.split("/"))
                return compile_ahead(entries, number, parts)
            while any(h.poll() is None for h in helpers) and time.monotonic() < deadline - seconds / 2:
                time.sleep(0.2)
        finally:
            for helper in helpers:
                stop(helper)
        watch: Watch = HostWatch() if rehearse else CudaWatch()
        gates: dict[str, Gate] = {}
        try:
            for entry in entries:
                say(
                    f"\n{entry.configs.name} ({entry.capability}, {entry.key!r}): {', '.join(c.row.what for c in entry.cases)}"
                )
                measure(entry, watch, gates, deadline, 2 if rehearse else 0, say)
        except (KeyboardInterrupt, RuntimeError) as problem:
            say(f"stopped: {words(problem)}")
        report(entries, say)
    if output:
        output.write_text(json.dumps([record(e) for e in entries], indent=1) + "\n")


def ahead(jobs: int) -> list[subprocess.Popen[bytes]]:
    """This command again, in parts, each compiling its share of the candidates."""
    count = (os.cpu_count() or 2) * 3 // 4 if jobs < 0 else jobs
    return [
        subprocess.Popen(
            [sys.executable, "-m", "bench.tune", *sys.argv[1:], "--part", f"{i}/{count}"],
            cwd=ROOT, env=environment(False), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for i in range(count)
    ]  # fmt: skip


def record(entry: Reached) -> dict[str, Any]:
    return {
        "table": entry.configs.name,
        "capability": entry.capability,
        "key": repr(entry.key),
        "rows": [c.label for c in entry.cases],
        "in_force": repr(entry.current),
        "best": repr(entry.best()),
        "seconds": {repr(config): times for config, times in entry.times.items()},
        "out": {repr(config): fault for config, fault in entry.faults.items()},
    }


if __name__ == "__main__":
    typer.run(main)

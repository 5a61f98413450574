# SPDX-License-Identifier: Apache-2.0
"""Every op against plain torch on the CPU, at the sizes of whole models: checked first, then timed in alternation.

python -m bench.ops_cpu                       all ops, both dtypes, shapes mid and 3b
python -m bench.ops_cpu attention --dtype bf16 --threads 1
python -m bench.ops_cpu --list
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

import bench.op_cases  # noqa: F401  (these register their rows)
import bench.op_cases_dense  # noqa: F401
import bench.op_cases_flow  # noqa: F401
import bench.op_cases_greedy  # noqa: F401
import bench.op_cases_linear  # noqa: F401
import bench.op_cases_merge  # noqa: F401
import bench.op_cases_received  # noqa: F401
import bench.op_cases_select  # noqa: F401
import bench.op_cases_window  # noqa: F401
from bench.ceilings import Look
from bench.gate import judge
from bench.op_registry import DTYPES, REGISTRY, TINY, Case, sizes
from bench.op_report import OURS, Outcome, markdown, terminal
from bench.timing import (
    CacheFlush,
    Clock,
    clock,
    interleaved,
    load_average,
    machine,
)
from glimpse_kernels import _ext, dispatch

SHAPE_NAMES = ("mid", "3b")
CASE_SECONDS = 3.0
CEILING_EVERY = 12  # cases: on a shared machine one look may catch a bad moment


def measure(case: Case, now: Clock, repeats: int, seconds: float, flush: CacheFlush | None) -> Outcome:
    """Build, check and, if right, time one case."""
    work = case.build()
    verdict = judge(work, case.dtype)
    if verdict.fault:
        return Outcome(case, verdict)
    contenders = {OURS: work.ours, **work.contenders()}
    samples = interleaved(contenders, now=now, repeats=repeats, seconds=seconds, before=flush)
    return Outcome(case, verdict, samples, work.amount, work.unit)


def main(
    ops: Annotated[list[str] | None, typer.Argument(help="Ops to measure; all if none is named.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32; both if not given.")] = None,
    shape: Annotated[str | None, typer.Option(help=f"{' or '.join(SHAPE_NAMES)}; both if not given.")] = None,
    threads: Annotated[int | None, typer.Option(help="Torch threads; default: torch's own choice.")] = None,
    repeats: Annotated[int, typer.Option(help=f"Rounds a case (fewer if it takes > {CASE_SECONDS} s).")] = 21,
    cold: Annotated[
        bool, typer.Option(help="Sweep the caches before every call instead of calling on warm ones.")
    ] = False,
    cpu_time: Annotated[
        bool,
        typer.Option(
            help="CPU time of the thread instead of wall time, for a busy machine; needs --threads 1."
        ),
    ] = False,
    backend: Annotated[str, typer.Option(help="Backend of glimpse_kernels: auto, cpu or naive.")] = "auto",
    quick: Annotated[bool, typer.Option(help="Tiny sizes, few rounds: checks that everything runs.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Write the figures, too: FILE.json, or FILE.md for a table.")
    ] = None,
    listing: Annotated[bool, typer.Option("--list", help="Only name the rows there are.")] = False,
) -> None:
    """Median time of each op and of plain torch, the ratio, and what share of the machine's own ceiling was reached.

    No number is printed for an op whose result is off; the exit status is then 1.
    """
    for op in ops or []:
        if op not in REGISTRY.ops():
            raise typer.BadParameter(
                f"expected one of {', '.join(REGISTRY.ops())}; found {op}", param_hint="OP"
            )
    if dtype not in (None, *DTYPES):
        raise typer.BadParameter(f"expected one of {', '.join(DTYPES)}; found {dtype}", param_hint="--dtype")
    if shape not in (None, *SHAPE_NAMES):
        raise typer.BadParameter(f"expected {' or '.join(SHAPE_NAMES)}; found {shape}", param_hint="--shape")
    if cpu_time and threads != 1:
        raise typer.BadParameter("one thread's CPU time says nothing about several: add --threads 1")
    console = Console()
    if not console.is_terminal:  # a file or a pipe has room
        console = Console(width=140)
    if listing:
        for row in REGISTRY.rows:
            if (not ops or row.op in ops) and row.where != "gpu":
                console.print(f"{row.op:18}{row.what}", highlight=False)
        return
    if threads:
        torch.set_num_threads(threads)
    now, flush = clock(cpu_time), CacheFlush() if cold else None
    dtypes = [DTYPES[dtype]] if dtype else list(DTYPES.values())
    shapes = [TINY] if quick else [sizes(name) for name in SHAPE_NAMES if shape in (None, name)]
    cases = list(REGISTRY.cases(ops or [], shapes, dtypes, "cpu"))
    repeats, seconds = (2, 0.0) if quick else (repeats, CASE_SECONDS)
    progress = Console(stderr=True)
    load_before = load_average()
    with torch.inference_mode(), dispatch.force_backend(backend):
        look = Look(dtypes, quick=quick, now=now)
        most = look()
        outcomes = []
        for number, case in enumerate(
            track(cases, description="ops", console=progress, disable=not progress.is_terminal), start=1
        ):
            outcomes.append(measure(case, now, repeats, seconds, flush))
            if number % CEILING_EVERY == 0 or number == len(cases):
                most = most.better(look())
    facts = machine() | {
        "command": "python -m bench.ops_cpu " + shlex.join(sys.argv[1:]),
        "threads": torch.get_num_threads(),
        "isa": module.isa() if (module := _ext.compiled()) else None,
        "backend": backend,
        "clock": "CPU time of the thread" if cpu_time else "wall time",
        "caches": "swept before every call" if cold else "warm",
        "load_average": [load_before, load_average()],
        "read_bytes_s": most.read,
        "gemm_flop_s": {name: most.gemm[kind] for name, kind in DTYPES.items() if kind in most.gemm},
    }
    rows = [outcome.record(most) for outcome in outcomes]
    console.print(terminal(rows, facts))
    refused = [o for o in outcomes if o.verdict.fault]
    for outcome in refused:
        console.print(f"[red]wrong result, not timed[/] {outcome.case.label}: {outcome.verdict.fault}")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        as_text = output.suffix == ".md"
        output.write_text(markdown(rows, facts) if as_text else json.dumps(facts | {"rows": rows}) + "\n")
    if refused:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

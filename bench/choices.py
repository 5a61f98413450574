# SPDX-License-Identifier: Apache-2.0
"""Times the kernels of one op against each other on this GPU, and records who is fastest for which kind of call.

python -m bench.choices                        all ops with a choice; writes glimpse_kernels/measured.json, which `auto` believes
python -m bench.choices compact attention      some
python -m bench.choices --dry                  only prints
TRITON_INTERPRET=1 GLIMPSE_CUDA_EMULATED=1 python -m bench.choices --rehearse --dry       on the CPU, and tiny

The contenders are the op's kernels that have passed their tests on a GPU (`glimpse_kernels.proof`), for `attention` torch's and
flash-attn's functions, too. Each is held against the definition first; one whose result is off gets no time, and the exit
status is then 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench.backends import backends, usable
from bench.choice_cases import Choice, attention_choices, between_backends
from bench.gate import Gate
from bench.gpu_timing import CudaWatch, HostWatch, Watch, words
from bench.gpu_worker import free, lost
from glimpse_kernels import _triton, dispatch, measured, proof

ROUNDS = 9
SECONDS = 0.02
LIMIT = 70.0
WRONG = "WRONG"
"""What a line about a wrong result begins with."""
Times = dict[str, float]


@dataclass
class Found:
    """Of one op. kinds: kind of call → provider → seconds of each call of that kind. whole: nothing was left out for want of time."""

    kinds: dict[str, list[Times]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    whole: bool = True

    def means(self) -> dict[str, Times]:
        """Calls that fall under one kind (many windows or few, few rows of a large buffer or all of them) count alike; a provider
        that was wrong on one of them has no time."""
        means: dict[str, Times] = {}
        for kind, calls in self.kinds.items():
            always = [name for name in calls[0] if all(name in times for times in calls)]
            if always:
                means[kind] = {name: sum(times[name] for times in calls) / len(calls) for name in always}
        return means


def names() -> tuple[str, ...]:
    """Ops with more than one GPU kernel, and `attention` with its libraries."""
    return (*(op for op in dispatch.ops() if len(backends(op)) > 1), "attention")


def providers(op: str, device: str, proven: Callable[[str, str], bool]) -> tuple[str, ...]:
    """The kernels of an op that can be compared here."""
    return tuple(backend for backend in usable(op, device) if proven(op, backend))


def plan(ops: tuple[str, ...], device: str, rehearse: bool) -> Iterator[tuple[Choice, tuple[str, ...]]]:
    """What is to be measured, with the contenders; ops with fewer than two kernels are left out. A library's attention is
    measured alone, too: where our kernel is not proven, `auto` takes none that nobody has seen run here."""
    allowed = (lambda op, backend: True) if rehearse else proof.proven
    among = {op: providers(op, device, allowed) for op in names()}
    for choice in between_backends(rehearse):
        if (not ops or choice.op in ops) and len(among.get(choice.op, ())) > 1:
            yield choice, among[choice.op]
    if not ops or "attention" in ops:
        yield from (pair for pair in attention_choices(rehearse) if pair[1])


def measure(choice: Choice, among: tuple[str, ...], watch: Watch, found: Found) -> Times:
    """Check and time one call; kinds and faults go into `found`."""
    kinds: set[str] = set()
    contest = choice.build(among, kinds)
    gate = Gate(contest.work, choice.dtype)
    right = {}
    for name in among:
        verdict = gate.check(contest.checks[name])
        if verdict.fault:
            found.faults.append(f"{choice.op}, {name}: {choice.label}: {verdict.fault}")
        else:
            right[name] = contest.calls[name]
    free()
    times: Times = {}
    if right:
        timed = watch.interleaved(right, rounds=ROUNDS, seconds=SECONDS)
        times = {name: t.median for name, t in timed.items() if t.seconds}
    for kind in kinds:
        found.kinds.setdefault(kind, []).append(times)
    return times


def run(
    chosen: list[tuple[Choice, tuple[str, ...]]],
    watch: Watch,
    deadline: float,
    say: Callable[[Choice, Times], None],
    done: Callable[[str, Found], None],
) -> list[str]:
    """All of them in turn; `done` is told of each op when its last call is behind. Returns what was wrong."""
    by_op: dict[str, list[tuple[Choice, tuple[str, ...]]]] = {}
    for choice, among in chosen:
        by_op.setdefault(choice.op, []).append((choice, among))
    faults: list[str] = []
    for op, pairs in by_op.items():
        found = Found()
        for choice, among in pairs:
            if time.monotonic() > deadline:
                found.whole = False
                break
            try:
                say(choice, measure(choice, among, watch, found))
            except torch.cuda.OutOfMemoryError:
                found.whole = False  # a smaller GPU than the grid was made for: nothing is wrong
            except Exception as problem:
                found.faults.append(f"{op}: {choice.label}: {words(problem)}")
                if lost():
                    return [*faults, *found.faults, "the device was lost"]
            free()
        faults += found.faults
        done(op, found)
    return faults


def merged(
    record: Mapping[str, Mapping[str, Mapping[str, measured.Times]]], gpu: str, op: str, found: Found
) -> dict[str, Mapping[str, Mapping[str, measured.Times]]]:
    """The record with what was found: an op measured to its end replaces what was known of it on this GPU."""
    before = {} if found.whole else record.get(gpu, {}).get(op, {})
    kinds = {**before, **found.means()}
    return {**record, gpu: {**record.get(gpu, {}), op: kinds}} if kinds else dict(record)


def main(
    ops: Annotated[list[str] | None, typer.Argument(help="Ops; all if none is named.")] = None,
    dry: Annotated[bool, typer.Option(help="Print, and leave the record alone.")] = False,
    seconds: Annotated[float, typer.Option(help="Stop after so long.")] = LIMIT,
    output: Annotated[Path | None, typer.Option(help="The record to write; default: the package's.")] = None,
    rehearse: Annotated[bool, typer.Option(help="On the CPU, interpreted and tiny: does it run?")] = False,
) -> None:
    """Needs a CUDA GPU."""
    if not rehearse and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device; --rehearse runs on the CPU")
    if rehearse and not _triton.interpreting():
        raise typer.BadParameter(
            "set TRITON_INTERPRET=1 (and GLIMPSE_CUDA_EMULATED=1) for this", param_hint="--rehearse"
        )
    gpu = "rehearsal" if rehearse else measured.gpu()
    for op in ops or ():
        if op not in names():
            raise typer.BadParameter(f"expected one of {', '.join(names())}; found {op}", param_hint="OPS")
    table = Table("op", "call", "us by provider")
    record = dict(measured.record())

    def say(choice: Choice, times: Times) -> None:
        ordered = sorted(times.items(), key=lambda item: item[1])
        table.add_row(choice.op, choice.label, ", ".join(f"{n} {1e6 * s:.1f}" for n, s in ordered))

    def done(op: str, found: Found) -> None:
        nonlocal record
        record = merged(record, gpu, op, found)
        if not dry:
            measured.write(record, output)

    with ExitStack() as stack:
        if rehearse:  # tensors that claim to be on a GPU: the sizes of a call are told there alone
            stack.enter_context(import_module("tests.stand_in").stand_in_gpu())
        stack.enter_context(torch.inference_mode())
        stack.enter_context(torch.device("cuda"))
        watch: Watch = HostWatch() if rehearse else CudaWatch()
        chosen = list(plan(tuple(ops or ()), "cuda", rehearse))
        faults = run(chosen, watch, time.monotonic() + seconds, say, done)
    console = Console(width=160)
    console.print(table)
    compared = {choice.op for choice, _ in chosen}
    for op in names():
        if op not in compared and (not ops or op in ops):
            console.print(f"{op}: nothing that may be compared here", highlight=False)
    for fault in faults:
        console.print(f"{WRONG} {fault}", markup=False, highlight=False)
    raise typer.Exit(1 if faults else 0)


if __name__ == "__main__":
    typer.run(main)

# SPDX-License-Identifier: Apache-2.0
"""The process that measures rows on the GPU, one after the other, and writes a line of JSON about each as it goes.

A kernel that faults takes the whole CUDA context with it, and one that hangs never answers: so `bench.ops_gpu` watches this
process from outside and starts another one behind the row that killed it.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path
from typing import Any

import torch

from bench.backends import backends, forced, usable
from bench.gate import Gate
from bench.gpu_timing import CudaWatch, HostWatch, Watch, words
from bench.op_registry import REGISTRY, TINY, Case, Sizes, sizes
from glimpse_kernels import _triton, dispatch

OURS = "ours, "
"""What the names of our backends begin with among the contenders."""
SHAPES = (("7b", 64), ("3b", 32), ("7b", 32), ("3b", 64), ("7b", 128))
"""Model and image tokens along an edge, the most telling first: 1792, 896 and 3584 pixels."""
TARGET_SHAPE = SHAPES[0]
PRODUCTS = ("linear", "linear_group", "gated_linear")
"""Ops with many rows, few of which depend on the picture: measured with one picture a model."""
LOST = 3
"""Exit status when the device is lost to this process."""


@dataclass(frozen=True)
class Job:
    """What to measure. ops: all if empty. shapes: of `SHAPES`. start: row to begin with. rehearse: on a CPU, tiny.

    warm: only build the rows and call the Triton kernels once, those with number % parts == part; for the compiler's cache.
    """

    ops: tuple[str, ...] = ()
    shapes: tuple[tuple[str, int], ...] = SHAPES
    start: int = 0
    rehearse: bool = False
    warm: bool = False
    part: int = 0
    parts: int = 1
    seconds: float = 0.25
    rounds: int = 30

    def text(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def of(text: str) -> Job:
        given = json.loads(text)
        given["ops"] = tuple(given["ops"])
        given["shapes"] = tuple((name, side) for name, side in given["shapes"])
        return Job(**given)


def load_rows() -> None:
    """Register the rows of every `bench.op_cases*`."""
    import pkgutil

    import bench

    for info in pkgutil.iter_modules(bench.__path__):
        if info.name.startswith("op_cases"):
            importlib.import_module(f"bench.{info.name}")


def written(op: str) -> bool:
    """Whether the op has a Triton kernel."""
    rows = [r for r in dispatch.support_table() if r.op == op and r.backend == "triton"]
    return bool(rows) and importlib.util.find_spec(f"glimpse_kernels.{rows[0].folder}.triton") is not None


def kernels(op: str, device: str) -> tuple[str, ...]:
    """The op's backends to measure: those that run here. Triton's where none does, so that the row says why."""
    return usable(op, device) or tuple(name for name in backends(op) if name == "triton")


def cases(job: Job) -> list[Case]:
    """Rows with a kernel, in the order of the shapes; those behind targets come first, the many products later."""
    shapes: Sequence[Sizes] = [TINY] if job.rehearse else [sizes(name, side) for name, side in job.shapes]
    dtype = torch.float32 if job.rehearse else torch.bfloat16
    firsts = {size.model: size for size in reversed(shapes)}
    found = [
        case
        for case in REGISTRY.cases(job.ops, shapes, [dtype], "gpu")
        if kernels(case.row.op, "cpu" if job.rehearse else "cuda")
        and (case.row.op not in PRODUCTS or case.sizes is firsts[case.sizes.model])
    ]
    order = {size: number for number, size in enumerate(shapes)}
    late = {op: 2.5 for op in PRODUCTS}
    return sorted(
        found, key=lambda c: (order[c.sizes] + late.get(c.row.op, 0), c.row.where != "gpu")
    )  # stable


def lost() -> bool:
    """Whether the CUDA context is dead, as after an illegal access, or its random numbers are: a capture that fails leaves
    torch's generator waiting for the end of it, and no row could be built any more."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        torch.rand(1, device="cuda").item()
    except Exception:
        return True
    return False


def free() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def measure(case: Case, watch: Watch, job: Job) -> dict[str, Any]:
    """One row: built, checked and, if right, timed, by every backend that the op has here (`backends`). The row's own figures are
    those of the fastest one; without figures if no result is right."""
    began = time.perf_counter()
    row: dict[str, Any] = {
        "op": case.row.op, "case": case.row.what, "shape": case.shape_name, "dtype": case.dtype_name,
    }  # fmt: skip
    work = case.build()
    dropped: dict[str, str] = {}
    gate = Gate(work, case.dtype, dropped)
    if dropped:
        row["dropped"] = dropped
    each: dict[str, dict[str, Any]] = {}
    for backend in kernels(case.row.op, "cpu" if job.rehearse else "cuda"):
        ours = case.build().ours if each else work.ours  # into buffers that no other backend has written to
        verdict = gate.check(forced(backend, ours))
        del ours
        free()
        each[backend] = {
            "fault": verdict.fault or None,
            "error": None if isnan(verdict.error) else verdict.error,
            "allowed": verdict.allowed,
        }
    del gate
    free()
    right = {OURS + name: forced(name, work.ours) for name, found in each.items() if not found["fault"]}
    checked = time.perf_counter()
    if right:
        others = {name: call for name, call in work.contenders().items() if name not in dropped}
        timed = watch.interleaved({**right, **others}, rounds=job.rounds, seconds=job.seconds)
        for name in right:
            each[name.removeprefix(OURS)] |= timed[name].record()
        best = min(right, key=lambda name: timed[name].median)
        by = min(others, key=lambda name: timed[name].median)
        backend, ours_s, torch_s = best.removeprefix(OURS), timed[best].median, timed[by].median
        with dispatch.force_backend(backend):
            eager_s = watch.eager(work.ours)
        row |= {
            "backend": backend,
            "error": each[backend]["error"],
            "allowed": each[backend]["allowed"],
            "ours_s": ours_s,
            "ours": timed[best].record(),
            "eager_s": eager_s,
            "torch_s": torch_s,
            "torch_by": by or "torch",
            "ratio": torch_s / ours_s,
            "contenders": {name or "torch": timed[name].record() for name in others},
            "amount": work.amount,
            "unit": work.unit,
            "rate": work.amount / ours_s,
        }
    faults = [f"{name}: {found['fault']}" for name, found in each.items() if found["fault"]]
    row |= {"fault": None if right else "; ".join(faults), "backends": each}
    row["took_s"] = [round(checked - began, 2), round(time.perf_counter() - checked, 2)]
    return row


def main(job: Job, lines: Path) -> int:
    load_rows()
    on_gpu = not job.rehearse
    todo = cases(job)
    watch: Watch = CudaWatch() if on_gpu else HostWatch()
    with ExitStack() as stack, lines.open("a") as out:

        def tell(fact: Mapping[str, Any]) -> None:
            out.write(json.dumps(fact) + "\n")
            out.flush()

        stack.enter_context(torch.inference_mode())
        stack.enter_context(dispatch.force_backend("triton"))
        if on_gpu:
            stack.enter_context(torch.device("cuda"))
        tell({"rows": len(todo), "interpreting": _triton.interpreting()})
        for number, case in enumerate(todo):
            if number < job.start or number % job.parts != job.part:
                continue
            if job.warm and not written(case.row.op):
                continue
            tell({"begin": number, "label": case.label})
            try:
                if job.warm:
                    case.build().ours()
                    row: dict[str, Any] = {"warm": case.label}
                    if on_gpu:
                        torch.cuda.synchronize()
                else:
                    row = measure(case, watch, job)
            except Exception as problem:
                row = {
                    "op": case.row.op, "case": case.row.what, "shape": case.shape_name, "dtype": case.dtype_name,
                    "fault": words(problem),
                }  # fmt: skip
            row["number"] = number
            tell({"row": row})
            if on_gpu and lost():
                return LOST
            free()
    return 0


if __name__ == "__main__":
    sys.exit(main(Job.of(sys.argv[1]), Path(sys.argv[2])))

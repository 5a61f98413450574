# SPDX-License-Identifier: Apache-2.0
"""The process that `bench.gpu_e2e` watches: makes the models, takes one row after the other, writes a line of JSON about each.

A row that fails leaves its reason; one that takes the device with it, or never answers, ends this process, and another one
goes on behind it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench import gpu_ceilings, gpu_e2e_checks, gpu_e2e_measure
from bench.gpu_e2e_measure import Row, described
from bench.gpu_e2e_plan import rows
from bench.gpu_e2e_world import FULL, SMALL, Scale, World
from bench.gpu_timing import words
from bench.gpu_worker import LOST, lost
from glimpse_kernels import dispatch

OPS = (
    "attention", "decode_attention", "glimpse_scores", "vip_conditions", "vip", "select_tokens", "compact", "rope", "rms_norm",
    "linear", "linear_group", "gated_linear", "patchify",
)  # fmt: skip
"""What a request calls."""
DTYPES = {"select_tokens": torch.float32, "patchify": torch.uint8}
"""Of ops that are not asked in the model's own."""
KERNELS = "triton,cuda,naive"


@dataclass(frozen=True)
class Job:
    """start: row to begin with. until: the wall clock's time (`time.time`) when it is over. backend, only: see `bench.gpu_e2e`."""

    until: float
    start: int = 0
    quick: bool = False
    rehearse: bool = False
    backend: str = "auto"
    only: str = ""

    def text(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def of(text: str) -> Job:
        return Job(**json.loads(text))

    @property
    def scale(self) -> Scale:
        return SMALL if self.rehearse else FULL


def backend_for(asked: str, device: torch.device, dtype: torch.dtype) -> tuple[str, dict[str, str], str]:
    """(backends to force or "auto", who serves each op, a note). "auto" on a GPU where a kernel was never proven: all kernels are
    taken as they are, since the definitions in plain PyTorch are no runtime; the checks come first."""

    def serving() -> dict[str, str]:
        found = {}
        for op in OPS:
            try:
                found[op] = dispatch.choose(op, device, DTYPES.get(op, dtype))
            except TypeError as problem:
                found[op] = words(problem)
        return found

    chosen = serving()
    plain = [op for op, by in chosen.items() if by == "naive"]
    if asked == "auto" and device.type == "cuda" and plain:
        with dispatch.force_backend(KERNELS):
            chosen = serving()
        return (
            KERNELS,
            chosen,
            f"kernels that no GPU has proven are taken all the same: {', '.join(plain)}; see make gpu-check",
        )
    if asked != "auto":
        with dispatch.force_backend(asked):
            chosen = serving()
    return asked, chosen, ""


def take(row: Row, worlds: dict[str, World], job: Job) -> dict[str, Any]:
    """The figures of one row."""
    large = worlds["large"]
    if row.kind == "check":
        small = row.name in gpu_e2e_checks.SMALL
        with gpu_e2e_checks.exact_products():
            return gpu_e2e_checks.ALL[row.name](worlds["small"] if small else large)
    large.settle()
    if row.kind == "request":
        return gpu_e2e_measure.request(large, row, job.quick)
    if row.kind == "decode":
        return gpu_e2e_measure.decode_twice(large, row)
    call: Callable[[World, Row], dict[str, Any]] = getattr(gpu_e2e_measure, row.kind)
    return call(large, row)


def main(job: Job, lines: Path) -> int:
    todo, device = rows(job.scale, job.quick), torch.device("cpu" if job.rehearse else "cuda")
    with ExitStack() as stack, lines.open("a") as out:

        def tell(**fact: Any) -> None:
            out.write(json.dumps(fact) + "\n")
            out.flush()

        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="glimpse-gpu-e2e-")))
        forced, serving, note = backend_for(job.backend, device, job.scale.dtype)
        tell(rows=sum(job.only in row.name for row in todo), backend=forced, serving=serving, note=note)
        stack.enter_context(dispatch.force_backend(forced))
        if job.start == 0:
            began = time.monotonic()
            tell(ceilings=gpu_ceilings.measure() | {"took_s": round(time.monotonic() - began, 1)})
        worlds = {
            "small": World(SMALL, device, folder / "small"),
            "large": World(job.scale, device, folder / "large"),
        }
        for number, row in enumerate(todo):
            if number < job.start or job.only not in row.name:
                continue
            tell(begin=number, name=row.name, seconds=row.seconds)
            began = time.monotonic()
            left = job.until - time.time()
            record = described(row)
            if left < row.seconds:
                record["skipped"] = f"{left:.0f} s were left, and it may take {row.seconds:.0f} s"
            else:
                try:
                    record |= take(row, worlds, job)
                except Exception as problem:
                    record["fault"] = words(problem)
            record["number"], record["took_s"] = number, round(time.monotonic() - began, 2)
            tell(row=record)
            if device.type == "cuda" and lost():
                return LOST
            worlds["large"].tidy()
    return 0


if __name__ == "__main__":
    sys.exit(main(Job.of(sys.argv[1]), Path(sys.argv[2])))

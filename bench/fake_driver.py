# SPDX-License-Identifier: Apache-2.0
"""Triton without a GPU: a driver that only names a target, and launches that end when the kernel is compiled.

Tensors are on the meta device: they have shapes, strides and the alignment of their addresses, which is all that a launch looks
at, and no memory. A wrapper that reads a value of a tensor on the host fails on them, as it would in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

PTXAS_LOG = "glimpse_ptxas_log"
"""Key of the assembler's own report in the metadata of a kernel compiled here."""

MOST_PROGRAMS = (2**31 - 1, 65535, 65535)
"""Sides of a grid that CUDA launches."""


class FakeDriver(DriverBase):
    """As many devices as there are architectures: device number 90 is one of compute capability 9.0."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # what Triton keeps of a kernel it keeps by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs on this driver")


@dataclass(frozen=True)
class Launched:
    """One launch: the kernel that it would have started, on which grid."""

    kernel: Any
    function: JITFunction[Any]
    grid: tuple[int, ...]


def _checked(name: str, grid: Any) -> tuple[int, ...]:
    """The grid as numbers. ValueError where CUDA would not launch it."""
    if callable(grid):
        raise ValueError(f"{name}: a grid computed from constants of the kernel; give the numbers")
    sides = tuple(int(side) for side in grid)
    for side, most in zip(sides, MOST_PROGRAMS, strict=False):
        if not 1 <= side <= most:
            raise ValueError(f"{name}: grid {sides}: expected sides from 1 to {MOST_PROGRAMS}")
    return sides


@contextmanager
def compiling(capability: int, on_launch: Callable[[Launched], None]) -> Iterator[None]:
    """Inside the block, every launch of a Triton kernel compiles it for this capability and is told to `on_launch`."""
    run, make_cubin = JITFunction.run, CUDABackend.make_cubin
    previous = driver._active

    def only_compile(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        sides = _checked(self.fn.__name__, grid)
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        on_launch(Launched(kernel, self, sides))
        return kernel

    def keeping_the_log(self: CUDABackend, src: Any, metadata: dict[str, Any], *args: Any) -> Any:
        before, knobs.nvidia.dump_ptxas_log = knobs.nvidia.dump_ptxas_log, True
        log = io.StringIO()
        try:
            with contextlib.redirect_stdout(log):
                cubin = make_cubin(self, src, metadata, *args)
        finally:
            knobs.nvidia.dump_ptxas_log = before
        metadata[PTXAS_LOG] = log.getvalue()
        return cubin

    folder = knobs.cache.dir
    driver.set_active(FakeDriver(capability))
    knobs.cache.dir = str(Path(folder) / "glimpse-compiled")  # entries there carry the assembler's report
    JITFunction.run, CUDABackend.make_cubin = only_compile, keeping_the_log
    try:
        yield
    finally:
        JITFunction.run, CUDABackend.make_cubin = run, make_cubin
        knobs.cache.dir = folder
        driver._active = previous

# SPDX-License-Identifier: Apache-2.0
"""What the kernel tests share: cases generated from the support table, the accuracy rule, packing helpers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from glimpse_kernels import _cuda, _ext, _triton, dispatch
from tests.stand_in import stand_in_gpu

with torch.device("cpu"):
    # A default device makes torch list its factories, once: before the fixture `poison` replaces some of them, or what they
    # make would be on the CPU for good.
    torch.empty(0)

Result = TypeVar("Result")
needs_triton = pytest.mark.skipif(bool(_triton.missing()), reason=_triton.missing())

ISAS = ("avx512bf16", "avx512", "avx2", "baseline")


def isas_here() -> list[str]:
    """Instruction sets that this build and machine have, best first."""
    module = _ext.compiled()
    if module is None:
        return []
    found = []
    before = module.isa()
    for name in ISAS:
        try:
            module.set_isa(name)
        except RuntimeError:
            continue
        found.append(name)
    module.set_isa(before)
    return found


@contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """Runs the block on this instruction set."""
    module = _ext.extension()
    before = module.isa()
    module.set_isa(name)
    try:
        yield
    finally:
        module.set_isa(before)


@contextmanager
def forced_threads(count: int) -> Iterator[None]:
    """Runs the kernels of the block on so many threads, more than there are cores too."""
    module = _ext.extension()
    module.set_num_threads(count)
    try:
        yield
    finally:
        module.set_num_threads(0)


class HostGenerators(TorchFunctionMode):
    """Factories that are given a generator of the host draw there, and the values are moved: what `torch.Generator()` makes
    is on the host whatever the default device, and torch refuses to mix. So a test has the same values on every device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if (
            generator is None
            or generator.device.type != "cpu"
            or "device" in kwargs
            or isinstance(args[0], Tensor)
        ):
            return func(*args, **kwargs)
        return func(*args, **kwargs, device="cpu").to(self.device)


@dataclass(frozen=True)
class Case:
    """One way to run an op: backend, instruction set (None outside C++), dtype (None where the op takes any) and device.

    A test written for the `kernel` fixture serves every device: inside it, torch's factories make tensors on the case's own.
    What comes from elsewhere (files, generators, module constants) has to be moved with `.to(kernel.device)`.
    """

    op: str
    backend: str
    isa: str | None
    dtype: torch.dtype | None
    device: str = "cpu"

    @property
    def interpreted(self) -> bool:
        """A GPU kernel on the host, in Triton's interpreter or the emulation of CUDA: right, but as slow as NumPy. Keep shapes
        small (a few heads, lengths up to 300)."""
        return (self.backend == "triton" and _triton.interpreting()) or (
            self.backend == "cuda" and _cuda.emulating()
        )

    def __str__(self) -> str:
        dtype = "any" if self.dtype is None else str(self.dtype).removeprefix("torch.")
        return "-".join(part for part in (self.backend, self.isa, dtype) if part)

    @contextmanager
    def active(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.interpreted:
                stack.enter_context(stand_in_gpu())
            if self.backend == "cuda" and self.interpreted:
                # Each launch another order of threads, the same ones in every run of a test.
                _cuda.module().set_order(-1)
            if self.isa is not None:
                stack.enter_context(forced_isa(self.isa))
            stack.enter_context(torch.device(self.device))
            if self.device != "cpu":
                stack.enter_context(HostGenerators(self.device))
            stack.enter_context(dispatch.force_backend(self.backend))
            yield


def cuda_missing() -> str:
    """Why no CUDA C++ kernel runs here, neither on a GPU (of which torch has to know) nor emulated; empty where they do."""
    here = _cuda.emulating() or torch.cuda.is_available()
    return _cuda.missing() or ("" if here else "no GPU that torch knows, and the emulation is off")


def op_cases(op: str, *backends: str) -> list[object]:
    """pytest parameters for the `kernel` fixture: all backends (or those named), instruction sets and dtypes that this machine
    can run.

    GPU kernels run on the GPU if there is one, else on the host, in Triton's interpreter or the emulation of CUDA, on a
    stand-in for it; cases on a GPU carry the mark `gpu`.
    """
    params: list[object] = []
    for row in dispatch.support_table():
        if row.op != op or (backends and row.backend not in backends):
            continue
        if row.backend == "cpu" and _ext.compiled() is None:
            reason = f"compiled extension not available: {_ext.compiled_error()}"
            params.append(
                pytest.param(Case(op, "cpu", None, None), id="cpu", marks=pytest.mark.skip(reason=reason))
            )
            continue
        if row.backend == "triton" and not (_triton.interpreting() or torch.cuda.is_available()):
            reason = _triton.missing() or "no GPU, and the interpreter is off"
            params.append(
                pytest.param(
                    Case(op, "triton", None, None), id="triton", marks=pytest.mark.skip(reason=reason)
                )
            )
            continue
        if row.backend == "cuda" and (reason := cuda_missing()):
            params.append(
                pytest.param(Case(op, "cuda", None, None), id="cuda", marks=pytest.mark.skip(reason=reason))
            )
            continue
        on_host = _cuda.emulating() if row.backend == "cuda" else _triton.interpreting()
        on_gpu = row.device == "cuda" and not on_host
        for isa in isas_here() if row.backend == "cpu" else [None]:
            for dtype in row.dtypes or (None,):
                case = Case(op, row.backend, isa, dtype, "cuda" if row.device == "cuda" else "cpu")
                params.append(pytest.param(case, id=str(case), marks=[pytest.mark.gpu] if on_gpu else []))
    return params


def compiled_cases(op: str) -> list[object]:
    """Those of `op_cases` that run a C++ kernel on the CPU."""
    return [param for param in op_cases(op) if param.values[0].backend == "cpu"]  # type: ignore[attr-defined]


def on_threads(call: Callable[[], Result], numbers: Sequence[int] = (1, 2, 3, 7)) -> list[Result]:
    """What `call` returns when the C++ kernels have each of these numbers of threads."""
    module = _ext.extension()
    found = []
    try:
        for number in numbers:
            module.set_num_threads(number)
            found.append(call())
    finally:
        module.set_num_threads(0)
    return found


GROWTH = """
import torch

def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

def growth(call):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the most memory so far is what there is now
    before = kib("VmRSS")
    result = call()
    print(kib("VmHWM") - before)
    return result
"""
measures_memory = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory as Linux tells it"
)
needs_compiled = pytest.mark.skipif(
    _ext.compiled() is None, reason=f"compiled extension not available: {_ext.compiled_error()}"
)


def growths(program: str) -> list[int]:
    """KiB that each `growth(call)` of a program took besides what was there before it. In a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", GROWTH + program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return [int(line) for line in result.stdout.split()]


def assert_as_good_as(ours: Tensor, same_dtype: Tensor, truth: Tensor, what: str = "") -> None:
    """The FlashAttention rule: our error against the truth is at most twice the error of plain PyTorch in our dtype.

    One rounding of the largest value is always granted (plain PyTorch may happen to be exact), in fp32 a whole unit in
    its last place: there the inner sums are as coarse as the result.
    """
    assert ours.shape == truth.shape, (what, ours.shape, truth.shape)
    assert not ours.isnan().any(), f"{what}: NaN in the result"
    truth = truth.double()
    found = (ours.double() - truth).abs().max().item() if truth.numel() else 0.0
    noise = (same_dtype.double() - truth).abs().max().item() if truth.numel() else 0.0
    unit = torch.finfo(same_dtype.dtype).eps * (truth.abs().max().item() if truth.numel() else 0.0)
    one_rounding = unit if same_dtype.dtype is torch.float32 else unit / 2
    assert found <= 2 * noise + one_rounding, (
        f"{what}: error {found:.3e}, plain PyTorch in the same dtype {noise:.3e}"
    )


def assert_same(kernel: Case, ours: Tensor, other: Tensor) -> None:
    """Two launches on tensors of other strides or alignments, or with another configuration, give equal bits; compiled by
    Triton to some units in the last place: how many values a thread loads at once decides the order in which it adds them."""
    if kernel.backend != "triton" or kernel.interpreted:
        assert torch.equal(ours, other)
        return
    eps = torch.finfo(other.dtype).eps
    most = other.abs().max().item() if other.numel() else 0.0
    torch.testing.assert_close(ours, other, rtol=4 * eps, atol=2 * eps * most)


def cu_seqlens(lengths: Sequence[int]) -> Tensor:
    """[0, l0, l0 + l1, ...] int32."""
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)


def fused_views(*tensors: Tensor) -> list[Tensor]:
    """The same values as views into one wide buffer, as the outputs of a fused qkv GEMM are."""
    rows = tensors[0].shape[0]
    wide = torch.cat([t.reshape(rows, -1) for t in tensors], dim=1)
    parts = wide.split([t.shape[1] * t.shape[2] for t in tensors], dim=1)
    return [part.view(rows, t.shape[1], t.shape[2]) for part, t in zip(parts, tensors, strict=True)]

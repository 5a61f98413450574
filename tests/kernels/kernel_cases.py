# SPDX-License-Identifier: Apache-2.0
"""What the kernel tests share: cases generated from the support table, the accuracy rule, packing helpers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from glimpse_kernels import _ext, dispatch

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


@dataclass(frozen=True)
class Case:
    """One way to run an op: backend, instruction set (None outside C++) and dtype (None where the op takes any)."""

    op: str
    backend: str
    isa: str | None
    dtype: torch.dtype | None

    def __str__(self) -> str:
        dtype = "any" if self.dtype is None else str(self.dtype).removeprefix("torch.")
        return "-".join(part for part in (self.backend, self.isa, dtype) if part)

    @contextmanager
    def active(self) -> Iterator[None]:
        with dispatch.force_backend(self.backend):
            if self.isa is None:
                yield
            else:
                with forced_isa(self.isa):
                    yield


def op_cases(op: str) -> list[object]:
    """pytest parameters for the `kernel` fixture: all backends, instruction sets and dtypes for CPU tensors."""
    params: list[object] = []
    for row in dispatch.support_table():
        if row.op != op or row.device not in ("cpu", "any"):
            continue
        if row.backend == "cpu" and _ext.compiled() is None:
            reason = f"compiled extension not available: {_ext.compiled_error()}"
            params.append(
                pytest.param(Case(op, "cpu", None, None), id="cpu", marks=pytest.mark.skip(reason=reason))
            )
            continue
        for isa in isas_here() if row.backend == "cpu" else [None]:
            for dtype in row.dtypes or (None,):
                case = Case(op, row.backend, isa, dtype)
                params.append(pytest.param(case, id=str(case)))
    return params


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


def cu_seqlens(lengths: Sequence[int]) -> Tensor:
    """[0, l0, l0 + l1, ...] int32."""
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)


def fused_views(*tensors: Tensor) -> list[Tensor]:
    """The same values as views into one wide buffer, as the outputs of a fused qkv GEMM are."""
    rows = tensors[0].shape[0]
    wide = torch.cat([t.reshape(rows, -1) for t in tensors], dim=1)
    parts = wide.split([t.shape[1] * t.shape[2] for t in tensors], dim=1)
    return [part.view(rows, t.shape[1], t.shape[2]) for part, t in zip(parts, tensors, strict=True)]

# SPDX-License-Identifier: Apache-2.0
"""Without a GPU the Triton kernels under test are really interpreted: a canary for the order of imports; and one for what the
interpreter gets wrong in bf16."""

from __future__ import annotations

import importlib
import math
import pkgutil
from unittest import mock

import pytest
import torch

import glimpse_kernels
from glimpse_kernels import _triton, dispatch
from tests.kernels.kernel_cases import needs_triton

if _triton.interpreting():
    import triton
    import triton.language as tl

    @triton.jit
    def round_kernel(x, out, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))

    @triton.jit
    def add_kernel(x, out, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        value = tl.load(x + at)
        tl.store(out + at, value + value)

    @triton.jit
    def dot_kernel(x, out, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        square = at[:, None] * BLOCK + at[None, :]
        value = tl.load(x + square)
        tl.store(out + square, tl.dot(value, value, input_precision="ieee"))


FOLDERS = sorted({row.folder for row in dispatch.support_table() if row.backend == "triton"})


@needs_triton
@pytest.mark.parametrize("folder", FOLDERS)
def test_kernels_are_interpreted_without_a_gpu_and_compiled_with_one(folder: str) -> None:
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    wanted = JITFunction if torch.cuda.is_available() else InterpretedFunction
    modules = [f"glimpse_kernels.{folder}.triton"] + [
        f"glimpse_kernels.{folder}.{info.name}"
        for info in pkgutil.iter_modules([f"{glimpse_kernels.__path__[0]}/{folder}"])
        if info.name.startswith("triton_")
    ]
    kernels = {
        name: value
        for module in modules
        for name, value in vars(importlib.import_module(module)).items()
        if isinstance(value, JITFunction | InterpretedFunction)
    }
    wrong = {name: type(value).__name__ for name, value in kernels.items() if not isinstance(value, wanted)}
    assert not wrong


@needs_triton
def test_the_package_knows_whether_it_is_interpreted() -> None:
    assert _triton.interpreting() is not torch.cuda.is_available()


def _right(dtype: torch.dtype) -> dict[str, bool]:
    """Whether the interpreter rounds to this dtype, adds in it and multiplies matrices of it."""
    x = torch.randn(256)
    small = x.to(dtype)
    rounded, doubled, square = torch.zeros_like(small), torch.zeros_like(small), torch.zeros(16, 16)
    round_kernel[(1,)](x, rounded, BLOCK=256)
    add_kernel[(1,)](small, doubled, BLOCK=256)
    dot_kernel[(1,)](small.view(16, 16), square, BLOCK=16)
    matrix = small.float().view(16, 16)
    return {
        "rounding": torch.equal(rounded, small),
        "addition": torch.equal(doubled, small + small),
        "dot": torch.allclose(square, matrix @ matrix, rtol=1e-3, atol=1e-3),
    }


@pytest.mark.skipif(not _triton.interpreting(), reason="kernels are not interpreted in this process")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_dtypes_of_interpreted_tests_are_right(dtype: torch.dtype) -> None:
    assert all(_right(dtype).values()), _right(dtype)


@pytest.mark.skipif(not _triton.interpreting(), reason="kernels are not interpreted in this process")
def test_bf16_is_rounded_and_multiplied_as_on_a_gpu_and_nothing_else() -> None:
    x = torch.cat(
        (
            torch.randn(240),
            torch.tensor([0.0, -0.0, 1e-40, 3e38, 3.4e38, -3.4e38, math.inf, -math.inf, math.nan]),
        )
    )
    x = torch.cat(
        (x, torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8, 255.5, 256.5]))
    )
    found = torch.zeros(256, dtype=torch.bfloat16)
    round_kernel[(1,)](x, found, BLOCK=256)
    torch.testing.assert_close(found, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    matrix, square = torch.randn(16, 16).bfloat16(), torch.zeros(16, 16)
    dot_kernel[(1,)](matrix, square, BLOCK=16)
    torch.testing.assert_close(square, matrix.float() @ matrix.float(), rtol=1e-6, atol=1e-5)
    with pytest.raises(Exception, match="add of bf16 values: widen them first"):
        add_kernel[(1,)](matrix, matrix.clone(), BLOCK=256)


@pytest.mark.skipif(not _triton.interpreting(), reason="kernels are not interpreted in this process")
def test_bf16_is_wrong_in_the_plain_interpreter() -> None:
    """Why `tests.kernels.interpreter_bf16` is there. Where this fails, Triton has mended it: delete that file."""
    from triton.runtime.interpreter import InterpreterBuilder

    from tests.kernels.interpreter_bf16 import PLAIN

    with mock.patch.multiple(InterpreterBuilder, **PLAIN):
        right = _right(torch.bfloat16)
    assert not all(right.values()), right

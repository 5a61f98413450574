# SPDX-License-Identifier: Apache-2.0
"""bf16 as a GPU has it, in Triton's interpreter, which does arithmetic on the bit patterns instead.

Our kernels do three things with bf16: widen it, round fp32 to it (to nearest, ties to even), and multiply tiles of it into
fp32 sums. Inside `exact_bfloat16()` these are right, moving bits stays as it is, and anything else is an error: a sum or
a comparison in bf16 is a place where a kernel forgot to widen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

PLAIN = {
    name: getattr(InterpreterBuilder, name)
    for name in ("cast_impl", "create_fp_to_fp", "create_dot", "binary_op", "unary_op")
}
"""What Triton does itself."""


def widened(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """fp32 of bf16 bit patterns."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """bf16 bit patterns of fp32 values: the nearest, of two equally near the even one; a NaN stays one."""
    values = np.asarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, nearest).astype(np.uint16)


def _is_bf16(x: Any) -> bool:
    return isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16


def _cast(self: Any, src: TensorHandle, dst_type: Any) -> TensorHandle:
    to = dst_type.scalar
    if _is_bf16(src) and to != tl.bfloat16:
        src = TensorHandle(widened(src.data), tl.float32)
        return src if to == tl.float32 else PLAIN["cast_impl"](self, src, dst_type)
    if to == tl.bfloat16 and not _is_bf16(src):
        wide = src if src.dtype.scalar == tl.float32 else PLAIN["cast_impl"](self, src, tl.float32)
        return TensorHandle(rounded(wide.data), tl.bfloat16)
    return PLAIN["cast_impl"](self, src, dst_type)


def _fp_to_fp(self: Any, src: TensorHandle, dst_type: Any, rounding_mode: Any) -> TensorHandle:
    if _is_bf16(src) or dst_type.scalar == tl.bfloat16:
        return _cast(self, src, dst_type)
    return PLAIN["create_fp_to_fp"](self, src, dst_type, rounding_mode)


def _dot(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *how: Any) -> TensorHandle:
    a, b = (TensorHandle(widened(x.data), tl.float32) if _is_bf16(x) else x for x in (a, b))
    return PLAIN["create_dot"](self, a, b, d, *how)


def _refuse(name: str) -> Any:
    def run(self: Any, *given: Any) -> Any:
        if any(_is_bf16(x) for x in given):
            raise AssertionError(f"{getattr(given[-1], '__name__', name)} of bf16 values: widen them first")
        return PLAIN[name](self, *given)

    return run


@contextmanager
def exact_bfloat16() -> Iterator[None]:
    """Inside the block the interpreter computes with bf16 as described above."""
    with mock.patch.multiple(
        InterpreterBuilder,
        cast_impl=_cast,
        create_fp_to_fp=_fp_to_fp,
        create_dot=_dot,
        binary_op=_refuse("binary_op"),
        unary_op=_refuse("unary_op"),
    ):
        yield

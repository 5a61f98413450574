# SPDX-License-Identifier: Apache-2.0
"""`rope` in C++ (csrc/cpu/rope.cpp)."""

from __future__ import annotations

from torch import Tensor

from glimpse_kernels._ext import extension
from glimpse_kernels._tensors import DTYPE_CODES


def rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    v: Tensor | None = None,
    k_out: Tensor | None = None,
    v_out: Tensor | None = None,
    slots: Tensor | None = None,
) -> None:
    """See `glimpse_kernels.rope`; arguments are checked there."""
    tokens, q_heads, dim = q.shape
    if k is not None and k_out is None:
        k_out = k
    extension().rope(
        q.data_ptr(),
        0 if k is None else k.data_ptr(),
        0 if v is None else v.data_ptr(),
        0 if k_out is None else k_out.data_ptr(),
        0 if v_out is None else v_out.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        0 if slots is None else slots.data_ptr(),
        tokens,
        q_heads,
        0 if k is None else k.shape[1],
        dim,
        0 if v is None else v.shape[2],
        _rows(k_out, v_out),
        *_strides(q),
        *_strides(k),
        *_strides(v),
        *_strides(k_out),
        *_strides(v_out),
        cos.stride(0),
        sin.stride(0),
        DTYPE_CODES[q.dtype],
    )


def _strides(t: Tensor | None) -> tuple[int, int]:
    return (0, 0) if t is None else (t.stride(0), t.stride(1))


def _rows(k_out: Tensor | None, v_out: Tensor | None) -> int:
    """Rows that a slot may name: both caches must have them."""
    if k_out is None:
        return 0
    return k_out.shape[0] if v_out is None else min(k_out.shape[0], v_out.shape[0])

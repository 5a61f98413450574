# SPDX-License-Identifier: Apache-2.0
"""`attention` in C++ (csrc/cpu/attention.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from glimpse_kernels._ext import extension
from glimpse_kernels._tensors import DTYPE_CODES


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    q_positions: Tensor | None = None,
    max_seqlen_q: int | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `glimpse_kernels.attention`; arguments are checked there."""
    q_rows, q_heads, dim = q.shape
    k_rows, kv_heads, v_dim = v.shape
    if out is None:
        out = torch.empty(q_rows, q_heads, v_dim, dtype=q.dtype)
    lse = torch.empty(q_rows, q_heads, dtype=torch.float32) if return_lse else None
    extension().attention(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        0 if lse is None else lse.data_ptr(),
        cu_seqlens_q.data_ptr(),
        cu_seqlens_k.data_ptr(),
        0 if q_positions is None else q_positions.data_ptr(),
        cu_seqlens_q.shape[0] - 1,
        q_rows,
        k_rows,
        q_heads,
        kv_heads,
        dim,
        v_dim,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        out.stride(0),
        out.stride(1),
        dim**-0.5 if scale is None else scale,
        causal,
        DTYPE_CODES[q.dtype],
    )
    return out if lse is None else (out, lse)

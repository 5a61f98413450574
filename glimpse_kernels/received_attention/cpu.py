# SPDX-License-Identifier: Apache-2.0
"""`received_attention` in C++ (csrc/cpu/received_attention.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from glimpse_kernels._ext import extension
from glimpse_kernels._tensors import DTYPE_CODES


def received_attention(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    q_positions: Tensor | None = None,
    scale: float | None = None,
    group: int = 1,
    order: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `glimpse_kernels.received_attention`; arguments are checked there."""
    q_rows, q_heads, dim = q.shape
    k_rows, kv_heads, _ = k.shape
    if out is None:
        out = torch.empty(k_rows // group, dtype=torch.float32)
    extension().received_attention(
        q.data_ptr(),
        k.data_ptr(),
        lse.data_ptr(),
        cu_seqlens_q.data_ptr(),
        cu_seqlens_k.data_ptr(),
        0 if q_positions is None else q_positions.data_ptr(),
        0 if order is None else order.data_ptr(),
        out.data_ptr(),
        cu_seqlens_q.shape[0] - 1,
        q_rows,
        k_rows,
        q_heads,
        kv_heads,
        dim,
        group,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        lse.stride(0),
        lse.stride(1),
        dim**-0.5 if scale is None else scale,
        causal,
        DTYPE_CODES[q.dtype],
    )
    return out

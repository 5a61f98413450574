# SPDX-License-Identifier: Apache-2.0
"""`decode_attention` in C++ (csrc/cpu/decode_attention.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from glimpse_kernels._ext import extension
from glimpse_kernels._tensors import DTYPE_CODES


def decode_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `glimpse_kernels.decode_attention`; arguments are checked there."""
    batch, q_heads, dim = q.shape
    blocks, block_size, kv_heads, v_dim = v_pool.shape
    if out is None:
        out = torch.empty(batch, q_heads, v_dim, dtype=q.dtype)
    extension().decode_attention(
        q.data_ptr(),
        k_pool.data_ptr(),
        v_pool.data_ptr(),
        out.data_ptr(),
        block_table.data_ptr(),
        lengths.data_ptr(),
        batch,
        blocks,
        block_size,
        block_table.shape[1],
        q_heads,
        kv_heads,
        dim,
        v_dim,
        q.stride(0),
        q.stride(1),
        *k_pool.stride()[:3],
        *v_pool.stride()[:3],
        block_table.stride(0),
        out.stride(0),
        out.stride(1),
        dim**-0.5 if scale is None else scale,
        DTYPE_CODES[q.dtype],
    )
    return out

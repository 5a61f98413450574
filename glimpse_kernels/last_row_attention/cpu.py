# SPDX-License-Identifier: Apache-2.0
"""`last_row_attention` in C++ (csrc/cpu/last_row_attention.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from glimpse_kernels._ext import extension
from glimpse_kernels._tensors import DTYPE_CODES


def last_row_attention(
    q: Tensor,
    k: Tensor,
    cu_seqlens_k: Tensor,
    token_index: Tensor,
    token_seq: Tensor,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `glimpse_kernels.last_row_attention`; arguments are checked there."""
    sequences, q_heads, dim = q.shape
    tokens, kv_heads, _ = k.shape
    if out is None:
        out = torch.empty(token_index.shape[0], dtype=torch.float32)
    extension().last_row_attention(
        q.data_ptr(),
        k.data_ptr(),
        cu_seqlens_k.data_ptr(),
        token_index.data_ptr(),
        token_seq.data_ptr(),
        0 if lse is None else lse.data_ptr(),
        out.data_ptr(),
        sequences,
        tokens,
        token_index.shape[0],
        q_heads,
        kv_heads,
        dim,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        0 if lse is None else lse.stride(0),
        dim**-0.5 if scale is None else scale,
        DTYPE_CODES[q.dtype],
    )
    return out

# SPDX-License-Identifier: Apache-2.0
"""`decode_attention` in C++ (csrc/cpu/decode_attention.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from glimpse_kernels._ext import extension
from glimpse_kernels.decode_attention.arguments import arguments


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
    if out is None:
        out = torch.empty(*q.shape[:2], v_pool.shape[3], dtype=q.dtype)
    extension().decode_attention(*arguments(q, k_pool, v_pool, block_table, lengths, scale, out))
    return out

# SPDX-License-Identifier: Apache-2.0
"""`decode_attention` in CUDA C++ (csrc/cuda/decode_attention.cu), for few rows: one launch where a cluster joins the runs of a row,
else two that overlap. A row has the same bits in every batch."""

from __future__ import annotations

import torch
from torch import Tensor

from glimpse_kernels import _cuda
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
    """See `glimpse_kernels.decode_attention`; arguments are checked there, what lies on the device is not.

    A length beyond the table counts as max_blocks * block_size, and a key whose block is not in the pool is not there.
    Head dimensions up to 256 (TypeError).
    """
    batch, q_heads, _ = q.shape
    _, block_size, kv_heads, v_dim = v_pool.shape
    if out is None:
        out = torch.empty((batch, q_heads, v_dim), dtype=q.dtype, device=q.device)
    module = _cuda.module()
    room = module.decode_attention_workspace(
        batch, block_size, block_table.shape[1], q_heads, kv_heads, v_dim
    )
    workspace = torch.empty(room, dtype=torch.uint8, device=q.device) if room else None
    given = arguments(q, k_pool, v_pool, block_table, lengths, scale, out)
    place = 0 if workspace is None else workspace.data_ptr()
    module.decode_attention(_cuda.stream(q), place, room, *given)
    return out

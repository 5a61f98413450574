# SPDX-License-Identifier: Apache-2.0
"""Definition of `decode_attention` in plain PyTorch, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


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
    """One query a row against its first `lengths[b]` cached keys; see `glimpse_kernels.decode_attention`."""
    batch, heads, dim = q.shape
    block_size, group = k_pool.shape[1], heads // k_pool.shape[2]
    scale = dim**-0.5 if scale is None else scale
    rows = []
    for b, length in enumerate(lengths.tolist()):
        if length <= 0:
            rows.append(q.new_zeros(heads, v_pool.shape[-1]))
            continue
        blocks = block_table[b, : -(-length // block_size)].long()
        keys = k_pool[blocks].flatten(0, 1)[:length].float().repeat_interleave(group, dim=1)
        values = v_pool[blocks].flatten(0, 1)[:length].float().repeat_interleave(group, dim=1)
        weights = torch.softmax(scale * torch.einsum("hd,jhd->hj", q[b].float(), keys), dim=-1)
        rows.append(torch.einsum("hj,jhd->hd", weights, values).to(q.dtype))
    result = torch.stack(rows) if rows else q.new_zeros(0, heads, v_pool.shape[-1])
    return result if out is None else out.copy_(result)

# SPDX-License-Identifier: Apache-2.0
"""Definition of `received_attention` in plain PyTorch, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 24
"""Attention weights held at once, over all heads, so that a long segment never has its whole matrix in memory."""


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
    """Attention that each key receives from its segment; see `glimpse_kernels.received_attention`. Differentiable."""
    rows, heads, dim = k.shape[0], q.shape[1], q.shape[2]
    scale = dim**-0.5 if scale is None else scale
    q_bounds, k_bounds = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    parts = [k.new_zeros(k_bounds[0]).float()]
    for q0, q1, k0, k1 in zip(q_bounds[:-1], q_bounds[1:], k_bounds[:-1], k_bounds[1:], strict=True):
        keys = k[k0:k1].float().repeat_interleave(heads // k.shape[1], dim=1)
        received = k.new_zeros(k1 - k0).float()
        step = max(1, CHUNK // (heads * max(1, k1 - k0)))
        for start in range(q0, q1, step):
            stop = min(start + step, q1)
            scores = scale * torch.einsum("ihd,jhd->ihj", q[start:stop].float(), keys)
            hidden = (lse[start:stop] == float("-inf"))[:, :, None]
            if causal:
                if q_positions is None:
                    last = torch.arange(start, stop, device=q.device) - q1 + (k1 - k0)
                else:
                    last = q_positions[start:stop]
                hidden = hidden | (torch.arange(k1 - k0, device=q.device) > last[:, None])[:, None, :]
            logs = (scores - lse[start:stop, :, None]).masked_fill(hidden, float("-inf"))
            received = received + torch.exp(logs).sum((0, 1))
        parts.append(received / heads)
    parts.append(k.new_zeros(rows - k_bounds[-1]).float())

    result = torch.cat(parts).view(-1, group).mean(1)
    if order is not None:
        result = torch.empty_like(result).index_copy(0, order.long(), result)
    return result if out is None else out.copy_(result)

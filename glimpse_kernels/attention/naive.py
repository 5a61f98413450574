# SPDX-License-Identifier: Apache-2.0
"""Definition of `attention` in plain PyTorch, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

QUERY_CHUNK = 1024
"""Queries worked on at once, so that a long segment does not need its whole score matrix in memory."""


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
    """softmax(scale * q k^T) v of every segment and head; see `glimpse_kernels.attention`. Differentiable."""
    (rows, heads, dim), group = q.shape, q.shape[1] // k.shape[1]
    scale = dim**-0.5 if scale is None else scale
    q_bounds, k_bounds = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()

    def empty(count: int) -> tuple[Tensor, Tensor]:
        """Rows that see nothing: output 0, log of an empty sum."""
        return q.new_zeros(count, heads, v.shape[-1], dtype=torch.float32), q.new_full(
            (count, heads), float("-inf"), dtype=torch.float32
        )

    parts: list[tuple[Tensor, Tensor]] = [empty(q_bounds[0])]
    for q0, q1, k0, k1 in zip(q_bounds[:-1], q_bounds[1:], k_bounds[:-1], k_bounds[1:], strict=True):
        keys = k[k0:k1].float().repeat_interleave(group, dim=1)
        values = v[k0:k1].float().repeat_interleave(group, dim=1)
        for start in range(q0, q1, QUERY_CHUNK):
            stop = min(start + QUERY_CHUNK, q1)
            if k0 == k1:
                parts.append(empty(stop - start))
                continue
            scores = scale * torch.einsum("ihd,jhd->hij", q[start:stop].float(), keys)
            if causal:
                if q_positions is None:
                    last = torch.arange(start, stop, device=q.device) - q1 + (k1 - k0)
                else:
                    last = q_positions[start:stop]
                hidden = torch.arange(k1 - k0, device=q.device)[None, :] > last[:, None]
                scores = scores.masked_fill(hidden, float("-inf"))
            lse = torch.logsumexp(scores, dim=-1)  # [Hq, i], -inf where no key is visible
            shift = lse.masked_fill(lse == float("-inf"), 0.0)
            weights = torch.exp(scores - shift[..., None])
            parts.append((torch.einsum("hij,jhd->ihd", weights, values), lse.transpose(0, 1)))
    parts.append(empty(rows - q_bounds[-1]))

    result = torch.cat([part[0] for part in parts]).to(q.dtype)
    if out is not None:
        result = out.copy_(result)
    return (result, torch.cat([part[1] for part in parts])) if return_lse else result

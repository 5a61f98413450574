# SPDX-License-Identifier: Apache-2.0
"""Definition of `last_row_attention` in plain PyTorch, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


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
    """Head mean of a softmax row at the listed keys; see `glimpse_kernels.last_row_attention`. Differentiable."""
    group = q.shape[1] // k.shape[1]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if lse is None:
        bounds = cu_seqlens_k.tolist()
        sums = [q.new_zeros(0, q.shape[1]).float()]
        for row, start, stop in zip(q.float(), bounds[:-1], bounds[1:], strict=True):
            keys = k[start:stop].float().repeat_interleave(group, dim=1)  # [L, Hq, D]
            sums.append(torch.logsumexp(scale * (row * keys).sum(-1), dim=0)[None])  # -inf where L is 0
        lse = torch.cat(sums)
    seq = token_seq.long()
    keys = k[token_index.long()].float().repeat_interleave(group, dim=1)  # [N, Hq, D]
    logs = scale * (q.float()[seq] * keys).sum(-1) - lse[seq]
    weights = torch.exp(logs.masked_fill(lse[seq] == float("-inf"), float("-inf"))).mean(1)
    return weights if out is None else out.copy_(weights)

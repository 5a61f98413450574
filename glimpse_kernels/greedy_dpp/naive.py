# SPDX-License-Identifier: Apache-2.0
"""Definition of `greedy_dpp` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def greedy_dpp(
    similarity: Tensor,
    relevance: Tensor,
    cu_seqlens: Tensor,
    cu_picks: Tensor,
    *,
    capacity: int,
    eps: float,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor]:
    """See `glimpse_kernels.greedy_dpp`. Reads the lengths on the host, and nothing else."""
    picks = torch.full((capacity,), -1, dtype=torch.int32, device=similarity.device)
    keep = torch.zeros(relevance.shape[0], dtype=torch.bool, device=similarity.device)
    rows, places = cu_seqlens.tolist(), cu_picks.tolist()
    offset = 0
    for row, end, place, stop in zip(rows[:-1], rows[1:], places[:-1], places[1:], strict=True):
        n = end - row
        similar = similarity[offset : offset + n * n].view(n, n)
        offset += n * n
        count = min(n, max(0, min(stop, capacity) - place))
        if max_seqlen is not None and n > max_seqlen:
            continue
        quality = relevance[row:end]
        kernel = quality[:, None] * similar * quality
        gain = kernel.diagonal().clone()
        floor = eps * gain
        factors = gain.new_zeros(count, n)
        for i in range(count):
            open_ = (gain > floor) & ~keep[row:end]  # false for NaN
            pick = gain.masked_fill(~open_, float("-inf")).argmax()  # the first of the largest
            found = open_[pick]
            picks[place + i] = torch.where(found, pick + row, -1)
            keep[row + pick] |= found
            before = factors[:i]
            factors[i] = (kernel[pick] - before[:, pick] @ before) / gain[pick].sqrt()
            gain = torch.where(found, gain - factors[i] * factors[i], gain)
    return picks, keep

# SPDX-License-Identifier: Apache-2.0
"""Definition of `drop_duplicates` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def drop_duplicates(
    similarity: Tensor,
    cu_seqlens: Tensor,
    order: Tensor,
    cu_order: Tensor,
    targets: Tensor,
    *,
    tokens: int,
    per_round: int,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor]:
    """See `glimpse_kernels.drop_duplicates`. Reads the lengths and targets on the host, and nothing else."""
    survivors = torch.full_like(order, -1)
    keep = torch.zeros(tokens + 1, dtype=torch.bool, device=order.device)  # the last one for rows of no group
    rows, places = cu_seqlens.tolist(), cu_order.tolist()
    offset = 0
    for row, end, place, stop, target in zip(
        rows[:-1], rows[1:], places[:-1], places[1:], targets.tolist(), strict=True
    ):
        n = end - row
        similar = similarity[offset : offset + n * n].view(n, n)
        offset += n * n
        if max_seqlen is not None and n > max_seqlen:
            continue
        matrix = similarity.new_full((n + 1, n + 1), float("-inf"), dtype=torch.float32)
        matrix[:n, :n] = torch.where(similar.isnan(), float("-inf"), similar)
        stop = min(stop, place + n)
        left = order[place:stop].long() - row
        left = torch.where((left >= 0) & (left < n), left, n)
        kept = torch.arange(stop - place, device=order.device)  # places in the list at the start
        while True:
            a, b = kept[0::2], kept[1::2]
            drop = min(per_round, len(kept) - max(target, 0), len(a))
            if drop <= 0:
                break
            if len(b):
                redundancy = matrix[left[a][:, None], left[b]].amax(1)
                a = a[redundancy.argsort(descending=True, stable=True)]
            kept = torch.cat((a[drop:], b))
        survivors[place : place + len(kept)] = order[place:stop][kept]
        keep[torch.where(left[kept] < n, left[kept] + row, tokens)] = True
    return survivors, keep[:tokens]

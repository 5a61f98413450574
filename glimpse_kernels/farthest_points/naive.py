# SPDX-License-Identifier: Apache-2.0
"""Definition of `farthest_points` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = torch.finfo(torch.float32).min


def farthest_points(
    similarity: Tensor,
    cu_seqlens: Tensor,
    cu_picks: Tensor,
    *,
    tokens: int,
    capacity: int,
    repeat: bool,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor]:
    """See `glimpse_kernels.farthest_points`. Reads the lengths on the host, and nothing else."""
    picks = torch.full((capacity,), -1, dtype=torch.int32, device=similarity.device)
    keep = torch.zeros(tokens, dtype=torch.bool, device=similarity.device)
    rows, places = cu_seqlens.tolist(), cu_picks.tolist()
    offset = 0
    for row, end, place, stop in zip(rows[:-1], rows[1:], places[:-1], places[1:], strict=True):
        n = end - row
        matrix = similarity[offset : offset + n * n].view(n, n)
        offset += n * n
        count = max(0, min(stop, capacity) - place)
        if not repeat:
            count = min(count, n)
        if n == 0 or count == 0 or (max_seqlen is not None and n > max_seqlen):
            continue
        # The subtraction rounds to the dtype of the similarity; what follows only compares.
        distance = torch.nan_to_num((1 - matrix).float(), nan=LEAST, posinf=float("inf"), neginf=LEAST)
        nearest = distance.kthvalue(min(2, n), dim=0).values
        for i in range(count):
            pick = nearest.argmax()  # the first of the largest
            picks[place + i] = pick + row
            keep[row + pick] = True
            # The first choice was made by the distance to any other token; from now on the picked ones count.
            nearest = distance[pick] if i == 0 else torch.minimum(nearest, distance[pick])
            if not repeat:
                nearest = nearest.masked_fill(keep[row:end], float("-inf"))
    return picks, keep

# SPDX-License-Identifier: Apache-2.0
"""Definition of `window_topk` in plain PyTorch. Nothing here waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def window_topk(
    scores: Tensor,
    cu_seqlens: Tensor,
    grids: Tensor,
    cu_picks: Tensor,
    *,
    window: int,
    capacity: int,
    share: str,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor]:
    """See `glimpse_kernels.window_topk`."""
    device, n, groups = scores.device, scores.shape[0], grids.shape[0]
    row = torch.arange(n, device=device)
    # One group more, empty, for the rows behind the last one.
    starts, grid = cu_seqlens.long(), torch.cat((grids.long(), grids.new_zeros(1, 2).long()))
    group = torch.searchsorted(starts[1:].contiguous(), row, right=True)
    height, width = grid[group].clamp(min=0).unbind(1)
    sizes = torch.cat((starts.diff(), starts.new_zeros(1)))[group]
    within = row - starts[group]
    inside = (within < height * width) & (group < groups)
    if max_seqlen is not None:
        inside &= sizes <= max_seqlen

    # What is left over belongs to the last window of its direction. A window goes by its first token, a row that no other has.
    down, across = (height // window).clamp(min=1), (width // window).clamp(min=1)
    width = width.clamp(min=1)
    y = torch.minimum(within // width // window, down - 1) * window
    x = torch.minimum(within % width // window, across - 1) * window
    first = torch.where(inside, starts[group] + y * width + x, n)

    budgets = torch.cat((cu_picks.long().diff().clamp(min=0), starts.new_zeros(1)))[group]
    windows = down * across
    cap = (budgets + windows - 1) // windows if share == "up" else budgets // windows

    score = torch.where(scores.isnan(), float("-inf"), scores) + 0.0  # -0.0 equals +0.0
    best = score.argsort(descending=True, stable=True)
    capped = inside & (_rank(best, first) < cap)
    rank = _rank(best, torch.where(capped, group, groups))
    place = cu_picks.long()[group] + rank
    keep = capped & (rank < budgets) & (place < capacity)

    picks = torch.full((capacity + 1,), -1, dtype=torch.int32, device=device)
    picks[torch.where(keep, place, capacity)] = row.int()  # the last one takes what is not picked
    picks[capacity] = -1
    return picks[:capacity], keep


def _rank(order: Tensor, label: Tensor) -> Tensor:
    """For each row, how many of the same label stand before it in `order`."""
    order = order[label[order].argsort(stable=True)]
    sorted_label = label[order]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.shape[0], device=order.device) - torch.searchsorted(
        sorted_label, sorted_label
    )
    return rank

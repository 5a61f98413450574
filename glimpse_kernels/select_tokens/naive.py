# SPDX-License-Identifier: Apache-2.0
"""Definition of `select_tokens` in plain PyTorch. Nothing here waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from glimpse_kernels.select_tokens.selection import Selection


def select_tokens(
    logits: Tensor,
    cu_groups: Tensor,
    *,
    threshold: float,
    caps: Tensor,
    floors: Tensor,
    forced: Tensor | None,
    token_rows: Tensor,
    row_keep: Tensor,
    cu_seqlens: Tensor,
    capacity: int,
) -> Selection:
    """See `glimpse_kernels.select_tokens`."""
    device, n, groups = logits.device, logits.numel(), cu_groups.numel() - 1
    cu_groups = cu_groups.long()
    sizes = cu_groups.diff()
    group = torch.repeat_interleave(torch.arange(groups, device=device), sizes, output_size=n)

    # One order for all back-ends: NaN is the least, -0.0 equals +0.0, ties go to the lower index.
    score = logits.float()
    score = torch.where(score.isnan(), float("-inf"), score) + 0.0
    order = score.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]
    rank = torch.empty(n, dtype=torch.long, device=device)
    rank[order] = torch.arange(n, device=device) - cu_groups[group]

    keep = score > threshold
    above = _per_group(keep, cu_groups)
    keep = torch.where((above > caps)[group], rank < caps[group], keep)
    keep = keep | (rank < floors[group])
    if forced is not None:
        keep = keep | forced
    counts = _per_group(keep, cu_groups)

    stays = row_keep.clone()
    stays[token_rows.long()] |= keep
    before = torch.cat((torch.zeros(1, dtype=torch.long, device=device), stays.long().cumsum(0)))
    place = torch.where(stays & (before[:-1] < capacity), before[:-1], capacity)
    index = torch.full((capacity + 1,), -1, dtype=torch.int32, device=device)
    index[place] = torch.arange(stays.numel(), dtype=torch.int32, device=device)
    index[capacity] = -1
    return Selection(
        keep=keep,
        counts=counts.int(),
        index=index[:capacity],
        cu_seqlens=before[cu_seqlens.long()].int(),
    )


def _per_group(mask: Tensor, cu_groups: Tensor) -> Tensor:
    """Number of true entries in each group, int64 [G]."""
    zero = torch.zeros(1, dtype=torch.long, device=mask.device)
    return torch.cat((zero, mask.long().cumsum(0)))[cu_groups].diff()

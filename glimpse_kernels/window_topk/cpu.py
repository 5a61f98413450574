# SPDX-License-Identifier: Apache-2.0
"""`window_topk` in C++ (csrc/cpu/window_topk.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from glimpse_kernels._ext import extension


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
    """See `glimpse_kernels.window_topk`; arguments are checked there."""
    picks = torch.empty(capacity, dtype=torch.int32)
    keep = torch.empty(scores.shape[0], dtype=torch.bool)
    extension().window_topk(
        scores.data_ptr(),
        cu_seqlens.data_ptr(),
        grids.data_ptr(),
        cu_picks.data_ptr(),
        picks.data_ptr(),
        keep.data_ptr(),
        scores.shape[0],
        grids.shape[0],
        capacity,
        window,
        -1 if max_seqlen is None else max_seqlen,
        share == "up",
    )
    return picks, keep

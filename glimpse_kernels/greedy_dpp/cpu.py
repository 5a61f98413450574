# SPDX-License-Identifier: Apache-2.0
"""`greedy_dpp` in C++ (csrc/cpu/greedy_dpp.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from glimpse_kernels._ext import extension


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
    """See `glimpse_kernels.greedy_dpp`; arguments are checked there."""
    picks = torch.empty(capacity, dtype=torch.int32)
    keep = torch.empty(relevance.shape[0], dtype=torch.bool)
    extension().greedy_dpp(
        similarity.data_ptr(),
        relevance.data_ptr(),
        cu_seqlens.data_ptr(),
        cu_picks.data_ptr(),
        picks.data_ptr(),
        keep.data_ptr(),
        similarity.shape[0],
        cu_seqlens.shape[0] - 1,
        relevance.shape[0],
        capacity,
        -1 if max_seqlen is None else max_seqlen,
        eps,
    )
    return picks, keep

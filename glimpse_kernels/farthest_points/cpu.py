# SPDX-License-Identifier: Apache-2.0
"""`farthest_points` in C++ (csrc/cpu/farthest_points.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from glimpse_kernels._ext import extension
from glimpse_kernels._tensors import DTYPE_CODES


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
    """See `glimpse_kernels.farthest_points`; arguments are checked there."""
    picks = torch.empty(capacity, dtype=torch.int32)
    keep = torch.empty(tokens, dtype=torch.bool)
    extension().farthest_points(
        similarity.data_ptr(),
        cu_seqlens.data_ptr(),
        cu_picks.data_ptr(),
        picks.data_ptr(),
        keep.data_ptr(),
        similarity.shape[0],
        cu_seqlens.shape[0] - 1,
        tokens,
        capacity,
        -1 if max_seqlen is None else max_seqlen,
        repeat,
        DTYPE_CODES[similarity.dtype],
    )
    return picks, keep

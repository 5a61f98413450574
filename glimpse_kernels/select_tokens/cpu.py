# SPDX-License-Identifier: Apache-2.0
"""`select_tokens` in C++ (csrc/cpu/select_tokens.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from glimpse_kernels._ext import extension
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
    """See `glimpse_kernels.select_tokens`; arguments are checked there."""
    tokens, groups = logits.shape[0], cu_groups.shape[0] - 1
    keep = torch.empty(tokens, dtype=torch.bool)
    counts = torch.empty(groups, dtype=torch.int32)
    index = torch.empty(capacity, dtype=torch.int32)
    cu_out = torch.empty(cu_seqlens.shape[0], dtype=torch.int32)
    extension().select_tokens(
        logits.data_ptr(),
        cu_groups.data_ptr(),
        caps.data_ptr(),
        floors.data_ptr(),
        0 if forced is None else forced.data_ptr(),
        token_rows.data_ptr(),
        row_keep.data_ptr(),
        cu_seqlens.data_ptr(),
        keep.data_ptr(),
        counts.data_ptr(),
        index.data_ptr(),
        cu_out.data_ptr(),
        tokens,
        groups,
        row_keep.shape[0],
        cu_seqlens.shape[0] - 1,
        capacity,
        threshold,
    )
    return Selection(keep=keep, counts=counts, index=index, cu_seqlens=cu_out)

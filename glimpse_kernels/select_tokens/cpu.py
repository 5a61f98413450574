# SPDX-License-Identifier: Apache-2.0
"""`select_tokens` in C++ (csrc/cpu/select_tokens.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from glimpse_kernels._ext import extension
from glimpse_kernels.select_tokens.arguments import arguments
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
    keep = torch.empty(logits.shape[0], dtype=torch.bool)
    counts = torch.empty(cu_groups.shape[0] - 1, dtype=torch.int32)
    index = torch.empty(capacity, dtype=torch.int32)
    cu_out = torch.empty(cu_seqlens.shape[0], dtype=torch.int32)
    into = Selection(keep=keep, counts=counts, index=index, cu_seqlens=cu_out)
    extension().select_tokens(
        *arguments(logits, cu_groups, threshold, caps, floors, forced, token_rows, row_keep, cu_seqlens, into)
    )
    return into

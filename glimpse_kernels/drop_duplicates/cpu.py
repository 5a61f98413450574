# SPDX-License-Identifier: Apache-2.0
"""`drop_duplicates` in C++ (csrc/cpu/drop_duplicates.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from glimpse_kernels._ext import extension
from glimpse_kernels._tensors import DTYPE_CODES


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
    """See `glimpse_kernels.drop_duplicates`; arguments are checked there."""
    survivors = torch.empty_like(order)
    keep = torch.empty(tokens, dtype=torch.bool)
    extension().drop_duplicates(
        similarity.data_ptr(),
        cu_seqlens.data_ptr(),
        order.data_ptr(),
        cu_order.data_ptr(),
        targets.data_ptr(),
        survivors.data_ptr(),
        keep.data_ptr(),
        similarity.shape[0],
        cu_seqlens.shape[0] - 1,
        tokens,
        order.shape[0],
        per_round,
        -1 if max_seqlen is None else max_seqlen,
        DTYPE_CODES[similarity.dtype],
    )
    return survivors, keep

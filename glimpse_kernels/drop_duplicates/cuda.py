# SPDX-License-Identifier: Apache-2.0
"""`drop_duplicates` in CUDA C++ (csrc/cuda/drop_duplicates.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from glimpse_kernels import _cuda
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
    device = similarity.device
    survivors = torch.empty_like(order)
    keep = torch.empty(tokens, dtype=torch.bool, device=device)
    module = _cuda.module()
    entries, groups, listed = similarity.shape[0], cu_seqlens.shape[0] - 1, order.shape[0]
    longest = -1 if max_seqlen is None else max_seqlen
    room = module.drop_duplicates_workspace(entries, groups, tokens, listed, longest)
    workspace = torch.empty(room, dtype=torch.uint8, device=device)
    module.drop_duplicates(
        _cuda.stream(similarity),
        workspace.data_ptr(),
        room,
        similarity.data_ptr(),
        cu_seqlens.data_ptr(),
        order.data_ptr(),
        cu_order.data_ptr(),
        targets.data_ptr(),
        survivors.data_ptr(),
        keep.data_ptr(),
        entries,
        groups,
        tokens,
        listed,
        per_round,
        longest,
        DTYPE_CODES[similarity.dtype],
    )
    return survivors, keep

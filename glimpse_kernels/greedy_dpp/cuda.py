# SPDX-License-Identifier: Apache-2.0
"""`greedy_dpp` in CUDA C++ (csrc/cuda/greedy_dpp.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from glimpse_kernels import _cuda


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
    device = similarity.device
    picks = torch.empty(capacity, dtype=torch.int32, device=device)
    keep = torch.empty(relevance.shape[0], dtype=torch.bool, device=device)
    module = _cuda.module()
    sizes = (
        similarity.shape[0],
        cu_seqlens.shape[0] - 1,
        relevance.shape[0],
        capacity,
        -1 if max_seqlen is None else max_seqlen,
    )
    workspace = torch.empty(module.greedy_dpp_workspace(*sizes), dtype=torch.uint8, device=device)
    module.greedy_dpp(
        _cuda.stream(similarity),
        workspace.data_ptr(),
        workspace.shape[0],
        similarity.data_ptr(),
        relevance.data_ptr(),
        cu_seqlens.data_ptr(),
        cu_picks.data_ptr(),
        picks.data_ptr(),
        keep.data_ptr(),
        *sizes,
        eps,
    )
    return picks, keep

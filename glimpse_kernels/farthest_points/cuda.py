# SPDX-License-Identifier: Apache-2.0
"""`farthest_points` in CUDA C++ (csrc/cuda/farthest_points.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from glimpse_kernels import _cuda
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
    device = similarity.device
    picks = torch.empty(capacity, dtype=torch.int32, device=device)
    keep = torch.empty(tokens, dtype=torch.bool, device=device)
    module = _cuda.module()
    sizes = (
        similarity.shape[0],
        cu_seqlens.shape[0] - 1,
        tokens,
        capacity,
        -1 if max_seqlen is None else max_seqlen,
    )
    workspace = torch.empty(module.farthest_points_workspace(*sizes), dtype=torch.uint8, device=device)
    module.farthest_points(
        _cuda.stream(similarity),
        workspace.data_ptr(),
        workspace.shape[0],
        similarity.data_ptr(),
        cu_seqlens.data_ptr(),
        cu_picks.data_ptr(),
        picks.data_ptr(),
        keep.data_ptr(),
        *sizes,
        repeat,
        DTYPE_CODES[similarity.dtype],
    )
    return picks, keep

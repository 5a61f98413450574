# SPDX-License-Identifier: Apache-2.0
"""`merge_nearest` in C++ (csrc/cpu/merge_nearest.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from glimpse_kernels._ext import extension
from glimpse_kernels._tensors import DTYPE_CODES


def merge_nearest(
    values: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    *,
    sources: Tensor | None = None,
    metric: Tensor | None = None,
    how: str = "mean",
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `glimpse_kernels.merge_nearest`; arguments are checked there."""
    rows, width = values.shape
    metric = values if metric is None else metric
    if metric.dtype is torch.float16:
        metric = metric.float()  # exact, and no model has it on a CPU
    nearest = torch.empty(rows, dtype=torch.int32)
    if out is None:
        out = torch.empty(rows, width, dtype=values.dtype)
    if out.data_ptr() != values.data_ptr():
        out.copy_(values)
    extension().merge_nearest(
        values.data_ptr(),
        metric.data_ptr(),
        targets.data_ptr(),
        0 if sources is None else sources.data_ptr(),
        cu_seqlens.data_ptr(),
        out.data_ptr(),
        nearest.data_ptr(),
        cu_seqlens.shape[0] - 1,
        rows,
        width,
        metric.shape[1],
        values.stride(0),
        metric.stride(0),
        out.stride(0),
        how == "target_plus_mean",
        DTYPE_CODES[values.dtype],
        DTYPE_CODES[metric.dtype],
    )
    return out, nearest

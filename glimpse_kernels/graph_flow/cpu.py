# SPDX-License-Identifier: Apache-2.0
"""`graph_flow` in C++ (csrc/cpu/graph_flow.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from glimpse_kernels._ext import extension
from glimpse_kernels._tensors import DTYPE_CODES


def graph_flow(
    features: Tensor,
    cu_seqlens: Tensor,
    *,
    threshold: float,
    temperature: float,
    steps: int,
    rounded: bool,
    degree: str,
) -> tuple[Tensor, Tensor]:
    """See `glimpse_kernels.graph_flow`; arguments are checked there."""
    rows, dim = features.shape
    scores = torch.empty(rows, dtype=torch.float32)
    degrees = torch.empty(rows, dtype=torch.int32)
    extension().graph_flow(
        features.data_ptr(),
        cu_seqlens.data_ptr(),
        scores.data_ptr(),
        degrees.data_ptr(),
        rows,
        cu_seqlens.shape[0] - 1,
        dim,
        features.stride(0),
        steps,
        threshold,
        temperature,
        rounded,
        degree == "float16",
        DTYPE_CODES[features.dtype],
    )
    return scores, degrees

# SPDX-License-Identifier: Apache-2.0
"""`swiglu` in C++ (csrc/cpu/swiglu.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from glimpse_kernels._ext import extension
from glimpse_kernels._tensors import DTYPE_CODES


def swiglu(gate: Tensor, up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """See `glimpse_kernels.swiglu`; arguments are checked there."""
    rows, cols = gate.shape
    if out is None:
        out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    extension().swiglu(
        gate.data_ptr(),
        up.data_ptr(),
        out.data_ptr(),
        rows,
        cols,
        gate.stride(0),
        up.stride(0),
        out.stride(0),
        DTYPE_CODES[gate.dtype],
    )
    return out

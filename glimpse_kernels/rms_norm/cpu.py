# SPDX-License-Identifier: Apache-2.0
"""`rms_norm` in C++ (csrc/cpu/rms_norm.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from glimpse_kernels._ext import extension
from glimpse_kernels._tensors import DTYPE_CODES


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """See `glimpse_kernels.rms_norm`; arguments are checked there."""
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.dim() == 2:
        _rows(x, weight, eps, residual, out)
        return out
    # Rows in more than one dimension: the kernel knows one row stride, so what has none goes through a copy.
    cols = x.shape[-1]
    flat_residual = None if residual is None else residual.reshape(-1, cols)
    flat_out = out.reshape(-1, cols)
    _rows(x.reshape(-1, cols), weight, eps, flat_residual, flat_out)
    for original, flat in ((residual, flat_residual), (out, flat_out)):
        if original is not None and flat is not None and original.data_ptr() != flat.data_ptr():
            original.copy_(flat.view(original.shape))
    return out


def _rows(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, out: Tensor) -> None:
    rows, cols = x.shape
    extension().rms_norm(
        x.data_ptr(),
        weight.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        out.data_ptr(),
        rows,
        cols,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        eps,
        DTYPE_CODES[x.dtype],
    )

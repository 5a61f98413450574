# SPDX-License-Identifier: Apache-2.0
"""Definition of `rms_norm` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """See `glimpse_kernels.rms_norm`. Differentiable when neither `residual` nor `out` is given."""
    if residual is not None:
        residual.copy_(residual.float() + x.float())
        x = residual
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    # The normalised value is rounded before the weight is applied, as Qwen2RMSNorm does.
    y = (h.to(x.dtype).float() * weight.float()).to(x.dtype)
    return y if out is None else out.copy_(y)

# SPDX-License-Identifier: Apache-2.0
"""Definition of `swiglu` in plain PyTorch."""

from __future__ import annotations

from torch import Tensor


def swiglu(gate: Tensor, up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """See `glimpse_kernels.swiglu`. Differentiable when `out` is not given."""
    g = gate.float()
    y = (g * g.sigmoid() * up.float()).to(gate.dtype)
    return y if out is None else out.copy_(y)

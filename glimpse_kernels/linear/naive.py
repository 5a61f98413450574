# SPDX-License-Identifier: Apache-2.0
"""Definitions of `linear`, `linear_group` and `gated_linear` in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from glimpse_kernels.linear.weights import Int8Weight, Weight


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `glimpse_kernels.linear`. Differentiable when `out` is not given."""
    y = _product(x, weight, bias)
    if activation == "gelu":
        y = F.gelu(y)
    return _give(y, x, out)


def linear_group(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None] | None = None,
    *,
    outs: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """See `glimpse_kernels.linear_group`. Differentiable when `outs` is not given."""
    given = [None] * len(weights) if biases is None else biases
    places = [None] * len(weights) if outs is None else outs
    return tuple(linear(x, w, b, out=out) for w, b, out in zip(weights, given, places, strict=True))


def gated_linear(
    x: Tensor,
    gate: Weight,
    up: Weight,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    room: Tensor | None = None,
) -> Tensor:
    """See `glimpse_kernels.gated_linear`. Differentiable when `out` is not given."""
    return _give(F.silu(_product(x, gate, gate_bias)) * _product(x, up, up_bias), x, out)


def _product(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    matrix = weight.dequantize() if isinstance(weight, Int8Weight) else weight.float()
    y = x.float() @ matrix.T
    return y if bias is None else y + bias.float()


def _give(y: Tensor, x: Tensor, out: Tensor | None) -> Tensor:
    y = y.to(x.dtype)
    return y if out is None else out.copy_(y)

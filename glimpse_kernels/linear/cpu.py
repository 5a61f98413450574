# SPDX-License-Identifier: Apache-2.0
"""`linear`, `linear_group` and `gated_linear` on the CPU: csrc/cpu/linear.cpp, or torch's GEMM where that is faster."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from glimpse_kernels._ext import extension
from glimpse_kernels._tensors import DTYPE_CODES
from glimpse_kernels.linear.torch_gemm import torch_linear
from glimpse_kernels.linear.weights import Int8Weight, Weight
from glimpse_kernels.swiglu.cpu import swiglu

NONE, GELU, GATED = 0, 1, 2
"""`glimpse_linear_epilogue` of csrc/include/glimpse/linear.h."""

STREAMED_ROWS = 16
"""Up to this many rows a product is bound by reading the weights once, whatever multiplies."""


@lru_cache(maxsize=1)
def _has_amx() -> bool:
    check = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(check and check())


def _torch_is_faster(x: Tensor, weight: Weight) -> bool:
    """Many rows of bf16 where torch multiplies in AMX tiles, which these kernels do not."""
    if x.dtype is not torch.bfloat16 or x.shape[0] <= STREAMED_ROWS or isinstance(weight, Int8Weight):
        return False
    return _has_amx()


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `glimpse_kernels.linear`; arguments are checked there."""
    if _torch_is_faster(x, weight):
        assert isinstance(weight, Tensor)
        return torch_linear(x, weight, bias, activation, out)
    if out is None:
        out = x.new_empty(x.shape[0], weight.shape[0])
    _run(x, (weight,), (bias,), (out,), GELU if activation == "gelu" else NONE)
    return out


def linear_group(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None] | None = None,
    *,
    outs: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """See `glimpse_kernels.linear_group`; arguments are checked there."""
    given = (None,) * len(weights) if biases is None else biases
    if _torch_is_faster(x, weights[0]):
        places = (None,) * len(weights) if outs is None else outs
        return tuple(linear(x, w, b, out=out) for w, b, out in zip(weights, given, places, strict=True))
    if outs is None:
        outs = [x.new_empty(x.shape[0], w.shape[0]) for w in weights]
    _run(x, weights, given, outs, NONE)
    return tuple(outs)


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
    """See `glimpse_kernels.gated_linear`; arguments are checked there."""
    if _torch_is_faster(x, gate):
        opened = linear(x, gate, gate_bias)
        return swiglu(opened, linear(x, up, up_bias), out=opened if out is None else out)
    if out is None:
        out = x.new_empty(x.shape[0], gate.shape[0])
    _run(x, (gate, up), (gate_bias, up_bias), (out, out), GATED)
    return out


def _run(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    outs: Sequence[Tensor],
    epilogue: int,
) -> None:
    group = 0
    parts = []
    for weight, bias, out in zip(weights, biases, outs, strict=True):
        if isinstance(weight, Int8Weight):
            group, scales, matrix = weight.group, weight.scales.data_ptr(), weight.values
        else:
            scales, matrix = 0, weight
        parts.append(
            (
                matrix.data_ptr(),
                scales,
                0 if bias is None else bias.data_ptr(),
                out.data_ptr(),
                matrix.shape[0],
                matrix.stride(0),
                out.stride(0),
            )
        )
    extension().linear(
        x.data_ptr(), x.shape[0], x.shape[1], x.stride(0), parts, group, epilogue, DTYPE_CODES[x.dtype]
    )

# SPDX-License-Identifier: Apache-2.0
"""`linear` and `linear_group` by torch's own product, for the backends that leave some of their calls to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def torch_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, out: Tensor | None
) -> Tensor:
    """See `glimpse_kernels.linear`; arguments are checked there."""
    if out is None:
        y = F.linear(x, weight, bias)
    elif bias is None:
        y = torch.mm(x, weight.T, out=out)
    else:
        y = torch.addmm(bias, x, weight.T, out=out)
    return torch.ops.aten.gelu.out(y, out=y) if activation == "gelu" else y


@torch.no_grad()
def torch_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    outs: Sequence[Tensor] | None,
) -> tuple[Tensor, ...]:
    """See `glimpse_kernels.linear_group`; arguments are checked there.

    Weights (and biases) that follow each other in one memory are one matrix: one product, if its results may lie side by side.
    """
    given = [b for b in biases or () if b is not None]
    whole, bias = one_below_the_other(weights), one_below_the_other(given) if given else None
    if whole is not None and (not given or (len(given) == len(weights) and bias is not None)):
        if outs is None:
            return torch_linear(x, whole, bias, None, None).split([w.shape[0] for w in weights], dim=1)
        out = side_by_side(outs)
        if out is not None:
            torch_linear(x, whole, bias, None, out)
            return tuple(outs)
    own = (None,) * len(weights)
    return tuple(
        torch_linear(x, w, b, None, out)
        for w, b, out in zip(weights, biases or own, outs or own, strict=True)
    )


def one_below_the_other(parts: Sequence[Tensor]) -> Tensor | None:
    """Tensors as one where each begins in memory where the one before ends, row by row; else None."""
    first = parts[0]
    if not _follow(parts, [part.shape[0] * first.stride(0) for part in parts]):
        return None
    return first.as_strided((sum(part.shape[0] for part in parts), *first.shape[1:]), first.stride())


def side_by_side(parts: Sequence[Tensor]) -> Tensor | None:
    """Matrices as one where they are neighbouring columns of one memory; else None."""
    first, width = parts[0], sum(part.shape[1] for part in parts)
    if first.stride(0) < width or not _follow(parts, [part.shape[1] for part in parts]):
        return None
    return first.as_strided((first.shape[0], width), first.stride())


def _follow(parts: Sequence[Tensor], steps: Sequence[int]) -> bool:
    """Whether each part lies so many elements behind the one before, in the same memory and with the same strides."""
    first = parts[0]
    place, held = first.data_ptr(), first.untyped_storage().data_ptr()
    for part, step in zip(parts, steps, strict=True):
        if part.data_ptr() != place or part.stride() != first.stride():
            return False
        if part.untyped_storage().data_ptr() != held:  # neighbours by chance
            return False
        place += step * part.element_size()
    return True

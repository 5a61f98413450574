# SPDX-License-Identifier: Apache-2.0
"""Weights of matrix products: a plain matrix, or one of 8-bit integers with a scale for each run of its inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

INT8_GROUP = 128
"""Inputs that share a scale, unless the caller says otherwise."""


@dataclass(frozen=True)
class Int8Weight:
    """A matrix `[N, K]` whose entry (n, k) is `values[n, k] * scales[n, k // group]`.

    Attributes:
        values: `[N, K]` int8 in [-127, 127].
        scales: `[N, ceil(K / group)]` float32.
        group: inputs that share a scale, a multiple of 32; the last group of a row may be shorter.
    """

    values: Tensor
    scales: Tensor
    group: int = INT8_GROUP

    def __post_init__(self) -> None:
        values, scales = self.values, self.scales
        if self.group < 32 or self.group % 32:
            raise ValueError(f"Int8Weight: group: expected a positive multiple of 32, found {self.group}")
        if values.dtype is not torch.int8 or values.dim() != 2:
            raise ValueError(
                f"Int8Weight: values: expected int8 [N, K], found {values.dtype} {list(values.shape)}"
            )
        wanted = (values.shape[0], -(-values.shape[1] // self.group))
        if scales.dtype is not torch.float32 or tuple(scales.shape) != wanted:
            raise ValueError(
                f"Int8Weight: scales: expected float32 {list(wanted)}, one for each {self.group} inputs of a row, "
                f"found {scales.dtype} {list(scales.shape)}"
            )
        if not (values.is_contiguous() and scales.is_contiguous()):
            raise ValueError("Int8Weight: values and scales: expected contiguous tensors")

    @property
    def shape(self) -> torch.Size:
        """`[N, K]`."""
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of memory, scales included."""
        return self.values.nbytes + self.scales.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix itself, `[N, K]`."""
        scales = self.scales.repeat_interleave(self.group, dim=1)[:, : self.shape[1]]
        return (self.values.float() * scales).to(dtype)


Weight = Tensor | Int8Weight


def quantize_int8(weight: Tensor, group: int = INT8_GROUP) -> Int8Weight:
    """Round `weight [N, K]` (any float dtype) to 8 bits, symmetric around zero.

    A group's scale is its largest magnitude over 127, so that no entry is clipped and the error of an entry is at most
    half a scale. A group of zeros has scale 0.

    Raises ValueError for a weight with NaN or infinite entries, which no scale can hold.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"quantize_int8: weight: expected a float matrix [N, K], found {weight.dtype} {list(weight.shape)}"
        )
    rows, cols = weight.shape
    groups = -(-cols // group)
    padded = torch.zeros(rows, groups * group, dtype=torch.float32, device=weight.device)
    padded[:, :cols] = weight
    runs = padded.view(rows, groups, group)
    largest = runs.abs().amax(dim=2) if padded.numel() else padded.new_zeros(rows, groups)
    if not bool(torch.isfinite(largest).all()):
        raise ValueError("quantize_int8: weight: expected finite entries, found NaN or infinity")
    scales = largest / 127.0
    steps = runs / torch.where(scales > 0, scales, torch.ones_like(scales))[:, :, None]
    values = steps.round_().clamp_(-127, 127).to(torch.int8)
    return Int8Weight(values.view(rows, groups * group)[:, :cols].contiguous(), scales.contiguous(), group)

# SPDX-License-Identifier: Apache-2.0
"""Matrix products of the model; torch's GEMMs behind two small shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Linear:
    """`x @ weight.T + bias`; weight `[out, in]`."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class LinearGroup:
    """Several products of the same input: one GEMM where the weights lie together, one each where they do not.

    A checkpoint read from files is laid together at load. The weights of an already loaded Hugging Face model are
    used where they are, because laying them together would copy them.
    """

    def __init__(self, parts: Sequence[Linear], *, fuse: bool) -> None:
        self.sizes = [part.weight.shape[0] for part in parts]
        if fuse:
            weight = torch.cat([part.weight for part in parts])
            bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])  # type: ignore[misc]
            self._fused: Linear | None = Linear(weight, bias)
            self.parts = [
                Linear(w, b) for w, b in zip(weight.split(self.sizes), self._split(bias), strict=True)
            ]
        else:
            self._fused = None
            self.parts = list(parts)

    def _split(self, bias: torch.Tensor | None) -> Sequence[torch.Tensor | None]:
        return [None] * len(self.sizes) if bias is None else bias.split(self.sizes)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """All products of `x [T, in]`; views of one buffer when fused."""
        if self._fused is not None:
            return self._fused(x).split(self.sizes, dim=-1)
        return tuple(part(x) for part in self.parts)

    def tail(self, first: int) -> LinearGroup:
        """The products from number `first` on, on the same storage."""
        group = object.__new__(LinearGroup)
        group.sizes = self.sizes[first:]
        group.parts = self.parts[first:]
        skip = sum(self.sizes[:first])
        group._fused = None
        if self._fused is not None:
            bias = self._fused.bias
            group._fused = Linear(self._fused.weight[skip:], None if bias is None else bias[skip:])
        return group

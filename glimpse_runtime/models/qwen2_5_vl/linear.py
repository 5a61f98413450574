# SPDX-License-Identifier: Apache-2.0
"""Matrix products of the model: weights where they were loaded, and the op that multiplies with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from glimpse_kernels import gated_linear, linear, linear_group
from glimpse_kernels.linear import Weight


@dataclass(frozen=True)
class Linear:
    """`x @ weight.T + bias`; weight `[out, in]`, plain or 8-bit."""

    weight: Weight
    bias: torch.Tensor | None = None

    def __call__(
        self, x: torch.Tensor, *, activation: str | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`[T, out]` for `x [T, in]`; `activation` as in `glimpse_kernels.linear`."""
        return linear(x, self.weight, self.bias, activation=activation, out=out)


class LinearGroup:
    """Several products of the same input in one call. The weights stay apart, as the checkpoint has them."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        self.parts = tuple(parts)
        self._weights = [part.weight for part in parts]
        self._biases = [part.bias for part in parts]

    @property
    def sizes(self) -> list[int]:
        """Outputs of each product."""
        return [weight.shape[0] for weight in self._weights]

    def __call__(
        self, x: torch.Tensor, *, outs: Sequence[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, ...]:
        """All products of `x [T, in]`."""
        return linear_group(x, self._weights, self._biases, outs=outs)

    def tail(self, first: int) -> LinearGroup:
        """The products from number `first` on, on the same weights."""
        return LinearGroup(self.parts[first:])


@dataclass(frozen=True)
class GatedLinear:
    """`silu(gate(x)) * up(x)`: the first half of a gated MLP."""

    gate: Linear
    up: Linear

    def __call__(self, x: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """`[T, inner]` for `x [T, in]`."""
        gate, up = self.gate, self.up
        return gated_linear(x, gate.weight, up.weight, gate.bias, up.bias, out=out)

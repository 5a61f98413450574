# SPDX-License-Identifier: Apache-2.0
"""Matrix products of the model: weights where they were loaded, and the op that multiplies with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from glimpse_kernels import gated_linear, linear, linear_group
from glimpse_kernels.linear import Weight
from glimpse_kernels.linear.torch_gemm import one_below_the_other

MLP_ROWS = 8192
"""Rows that go through an MLP at once on a GPU."""


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


def lay_together(parts: Sequence[Linear]) -> list[Linear]:
    """The same products with their weights one below the other in one matrix, and their biases in one vector: a GPU then does
    them at once. 8-bit weights stay where they are, and so does everything on a CPU."""
    plain = [part.weight for part in parts if isinstance(part.weight, torch.Tensor)]
    places = {weight.device.type for weight in plain}
    if len(plain) < len(parts) or len(places) > 1 or "cpu" in places:
        return list(parts)
    sizes = [weight.shape[0] for weight in plain]
    weights = torch.cat(plain).split(sizes) if one_below_the_other(plain) is None else plain
    biases: Sequence[torch.Tensor | None] = [part.bias for part in parts]
    given = [bias for bias in biases if bias is not None]
    if len(given) == len(parts) and one_below_the_other(given) is None:
        biases = torch.cat(given).split(sizes)
    return [Linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)]


class LinearGroup:
    """Several products of the same input in one call."""

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

    def __call__(
        self, x: torch.Tensor, *, out: torch.Tensor | None = None, room: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`[T, inner]` for `x [T, in]`; `room [T, 2 * inner]` as in `glimpse_kernels.gated_linear`."""
        gate, up = self.gate, self.up
        return gated_linear(x, gate.weight, up.weight, gate.bias, up.bias, out=out, room=room)


def mlp_rows(rows: int, device: torch.device) -> int:
    """How many of so many rows go through an MLP at once: its inner rows are the widest of all. On a GPU a product of `MLP_ROWS`
    is as fast, row by row, as a larger one."""
    if device.type == "cpu" or rows <= MLP_ROWS:
        return rows
    return -(-rows // -(-rows // MLP_ROWS))


def mlp(
    gated: GatedLinear,
    down: Linear,
    x: torch.Tensor,
    inner: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`down(gated(x))`: `[T, out]` for `x [T, in]`.

    inner: what lies between the two, for `mlp_rows(T)` rows: `[rows, inner]`, or `[rows, 2 * inner]` with room for what a GPU
    stores before (contiguous).
    """
    width, at_once = gated.gate.weight.shape[0], mlp_rows(x.shape[0], x.device)

    def some(x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        if inner is None:
            return down(gated(x), out=out)
        held = inner[: x.shape[0]]
        room = held if held.shape[1] > width else None
        return down(gated(x, out=held[:, :width], room=room), out=out)

    if at_once == x.shape[0]:
        return some(x, out)
    out = x.new_empty(x.shape[0], down.weight.shape[0]) if out is None else out
    for rows, to in zip(x.split(at_once), out.split(at_once), strict=True):
        some(rows, to)
    return out

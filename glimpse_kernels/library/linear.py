# SPDX-License-Identifier: Apache-2.0
"""Matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

import glimpse_kernels as gk
from glimpse_kernels.library.registry import register


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    return gk.linear(x, weight, bias, activation=activation)


def _linear_fake(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _linear_int8(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    group: int = 128,
    activation: str | None = None,
) -> Tensor:
    return gk.linear(x, gk.Int8Weight(values, scales, group), bias, activation=activation)


def _linear_group(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    return list(gk.linear_group(x, weights, biases or None))


def _linear_group_fake(x: Tensor, weights: Sequence[Tensor], _biases: Sequence[Tensor]) -> list[Tensor]:
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]


def _gated_linear(
    x: Tensor, gate: Tensor, up: Tensor, gate_bias: Tensor | None = None, up_bias: Tensor | None = None
) -> Tensor:
    return gk.gated_linear(x, gate, up, gate_bias, up_bias)


register(
    "linear(Tensor x, Tensor weight, Tensor? bias=None, *, str? activation=None) -> Tensor",
    _linear,
    _linear_fake,
)
register(
    "linear_int8(Tensor x, Tensor values, Tensor scales, Tensor? bias=None, *, int group=128, str? activation=None) "
    "-> Tensor",
    _linear_int8,
    _linear_fake,
)
register(
    "linear_group(Tensor x, Tensor[] weights, Tensor[] biases) -> Tensor[]", _linear_group, _linear_group_fake
)
register(
    "gated_linear(Tensor x, Tensor gate, Tensor up, Tensor? gate_bias=None, Tensor? up_bias=None) -> Tensor",
    _gated_linear,
    _linear_fake,
)

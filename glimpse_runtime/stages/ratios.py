# SPDX-License-Identifier: Apache-2.0
"""Shares that a caller gives: numbers, or what finds one for a prompt."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import TypeAlias

from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.packing import PackedBatch, Prompt

Ratio: TypeAlias = "float | Callable[[Prompt], float]"
"""A share, or what gives one for a prompt."""


def check_ratio(name: str, ratio: object) -> None:
    """Raises GlimpseError unless `ratio` is a share in (0, 1], or a callable that may give one."""
    real = isinstance(ratio, Real) and not isinstance(ratio, bool)
    if not callable(ratio) and not (real and 0.0 < ratio <= 1.0):  # type: ignore[operator]
        raise GlimpseError(f"{name}: expected a share in (0, 1], found {ratio!r}")


def check_flag(name: str, value: object) -> None:
    """Raises GlimpseError unless `value` is True or False: a file's "no" would count as True."""
    if not isinstance(value, bool):
        raise GlimpseError(f"{name}: expected True or False, found {value!r}")


def ratio_for(name: str, ratio: Ratio, batch: PackedBatch, row: int) -> float:
    """The share for a sequence of the batch.

    Raises:
        GlimpseError: a callable gave something else.
    """
    if not callable(ratio):
        return ratio
    known = batch.ratios.get((id(ratio), row))
    if known is None:
        known = ratio(batch.prompt(row))
        if callable(known):
            raise GlimpseError(f"{name}: expected a share for the prompt of row {row}, found {known!r}")
        check_ratio(f"{name}, for the prompt of row {row}", known)
        batch.ratios[id(ratio), row] = known  # what was asked once holds for the whole call
    return known

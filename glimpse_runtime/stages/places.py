# SPDX-License-Identifier: Apache-2.0
"""Where tokens may leave: between the vision tower and the decoder, before a decoder layer, or inside one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from glimpse_runtime.errors import GlimpseError


@dataclass(frozen=True)
class Vision:
    """Between the vision tower and the decoder: no layer ever sees a token that is dropped here."""

    @property
    def order(self) -> tuple[float, int]:
        return (-1, 0)

    def resolved(self, layers: int) -> Vision:
        return self

    def __str__(self) -> str:
        return "Vision()"


@dataclass(frozen=True)
class _InDecoder:
    """A decoder layer.

    Attributes:
        index: its number from 0, negative from the end; or a share of the decoder's depth, a float above 0 and below 1 (0.5
            is the 14th of 28 layers). Beyond the last layer means the last one.
    """

    index: int | float

    def __post_init__(self) -> None:
        number = not isinstance(self.index, bool) and isinstance(self.index, int)
        share = isinstance(self.index, float) and 0.0 < self.index < 1.0
        if not number and not share:
            raise GlimpseError(
                f"{type(self).__name__}: expected the number of a layer, or a share of the depth between 0.0 and 1.0, "
                f"found {self.index!r}"
            )

    def number(self, layers: int) -> int:
        """Of this layer in a decoder of so many."""
        if isinstance(self.index, float):
            return int(self.index * layers)
        found = self.index + layers if self.index < 0 else self.index
        if found < 0:
            raise GlimpseError(
                f"{self}: expected a layer of the decoder, which has {layers}, found {self.index}"
            )
        return min(found, layers - 1)

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.index})"


@dataclass(frozen=True)
class LayerInput(_InDecoder):
    """Before layer `index`: scored by what that layer would do with the rows, but no row that is dropped here enters it."""

    __str__ = _InDecoder.__str__

    @property
    def order(self) -> tuple[float, int]:
        return (self.index, -1)

    def resolved(self, layers: int) -> LayerInput:
        return LayerInput(self.number(layers))


@dataclass(frozen=True)
class Layer(_InDecoder):
    """Inside layer `index`: all rows leave keys and values there, and only those that stay go through the rest of it."""

    __str__ = _InDecoder.__str__

    @property
    def order(self) -> tuple[float, int]:
        return (self.index, 0)

    def resolved(self, layers: int) -> Layer:
        return Layer(self.number(layers))


Place: TypeAlias = "Vision | LayerInput | Layer"

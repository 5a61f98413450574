# SPDX-License-Identifier: Apache-2.0
"""A budget that is known beforehand: a share of each picture's tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.packing import PackedBatch
from glimpse_runtime.stages.ratios import Ratio, check_ratio, ratio_for


def check_share(name: str, share: object) -> None:
    """Raises GlimpseError unless `share` is a `Share`."""
    if not isinstance(share, Share):
        raise GlimpseError(f"{name}: expected a Share, as Share(0.5), found {share!r}")


@dataclass(frozen=True)
class Share:
    """So many of a picture's tokens, at least one.

    Attributes:
        ratio: in (0, 1], or a callable that gives such a share for a `Prompt`.
        rounding: "floor", or "nearest" with halves to the even number, as Python rounds.
        of: the tokens that the picture came with ("original"), or those that earlier stages left ("current"). Never more than
            those.
    """

    ratio: Ratio
    rounding: Literal["floor", "nearest"] = "floor"
    of: Literal["original", "current"] = "current"

    def __post_init__(self) -> None:
        check_ratio("ratio", self.ratio)
        for name, value, known in (
            ("rounding", self.rounding, ("floor", "nearest")),
            ("of", self.of, ("original", "current")),
        ):
            if value not in known:
                raise GlimpseError(f"{name}: expected {' or '.join(map(repr, known))}, found {value!r}")

    def counts(self, batch: PackedBatch) -> list[int]:
        """Of each picture."""
        found = []
        for p in batch.pictures:
            share = ratio_for("ratio", self.ratio, batch, p.row) * (
                p.size if self.of == "original" else p.tokens
            )
            found.append(min(p.tokens, max(1, int(share) if self.rounding == "floor" else round(share))))
        return found

    def left(self, before: float) -> float | None:
        """As `Selector.left`."""
        if callable(self.ratio):
            return None
        return min(before, self.ratio) if self.of == "original" else before * self.ratio

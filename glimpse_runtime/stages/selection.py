# SPDX-License-Identifier: Apache-2.0
"""What a selector is, and what it chooses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from glimpse_kernels import Selection
from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.packing import PackedBatch
from glimpse_runtime.taps import VisionTaps

if TYPE_CHECKING:
    from glimpse_runtime.stages.views import StageView


@dataclass(frozen=True)
class Chosen:
    """What a selector chose.

    Attributes:
        selection: the tokens and rows that stay.
        targets, sources: `[N]` bool: tokens that others are merged into, and those others; None: all that stay, and all that go.
    """

    selection: Selection
    targets: torch.Tensor | None = None
    sources: torch.Tensor | None = None


class Selector(ABC):
    """Which tokens stay; a selector of one's own derives from it.

    Attributes:
        whole_pictures: it needs the pictures as they came from the tower, not what an earlier stage left of them.
    """

    whole_pictures: bool = False

    @property
    def taps(self) -> VisionTaps:
        """What it wants to see of the vision tower."""
        return VisionTaps()

    @property
    def scored(self) -> bool:
        """Whether it needs scores."""
        return True

    @property
    @abstractmethod
    def exact(self) -> bool:
        """Whether `most` tokens stay of each picture whatever the scores are. It has to be true: shapes follow from it, and on a GPU
        nobody waits to check."""

    @abstractmethod
    def most(self, batch: PackedBatch) -> list[int]:
        """The most tokens that can stay of each picture, known from the host's numbers alone: room is taken for so many."""

    @property
    def capped(self) -> bool:
        """Whether `most` is less than what there is."""
        return True

    def left(self, before: float) -> float | None:
        """Which share of a whole picture stays where `before` of it is there, before it is rounded to tokens; None: that is not
        known beforehand."""
        return None

    def row_bounds(self, batch: PackedBatch) -> list[int]:
        """The most rows each sequence can hold after it, probe rows left out: what the pool has to have room for."""
        bounds = list(batch.prompt_lengths)
        for p, most in zip(batch.pictures, bounds_of(self, batch), strict=True):
            bounds[p.row] -= p.tokens - most
        return bounds

    @abstractmethod
    def choose(self, view: StageView, scores: torch.Tensor | None) -> Chosen:
        """Choose by `scores [N]` fp32, on the device, with no wait for it."""


def checked_choice(chosen: object, batch: PackedBatch, select: Selector) -> Chosen:
    """What a selector chose of the tokens of `batch`.

    Raises:
        GlimpseError: it chose nothing that can be told apart.
    """
    if not isinstance(chosen, Chosen) or not isinstance(chosen.selection, Selection):
        raise GlimpseError(
            f"{type(select).__name__}: choose: expected a Chosen with a Selection (StageView.top, StageView.exactly), found "
            f"{chosen!r}"
        )
    if tuple(chosen.selection.keep.shape) != (batch.num_visual,):
        raise GlimpseError(
            f"{type(select).__name__}: choose: expected a choice among {batch.num_visual} tokens, found one among "
            f"{list(chosen.selection.keep.shape)}"
        )
    return chosen


def check_left(select: Selector, batch: PackedBatch, left: Sequence[int]) -> None:
    """Raises GlimpseError if not so many tokens of each picture are `left` as the selector said beforehand: memory was taken for
    these."""
    most = bounds_of(select, batch)
    exact = select.exact and not batch.ending
    wrong = [n for n, (a, b) in enumerate(zip(left, most, strict=True)) if (a != b if exact else a > b)]
    if wrong:
        n = wrong[0]
        raise GlimpseError(
            f"{type(select).__name__}: picture {n}: expected {'' if exact else 'at most '}{most[n]} tokens to stay, as its "
            f"'most' says, found {left[n]}"
        )


def bounds_of(select: Selector, batch: PackedBatch) -> list[int]:
    """The most tokens that can stay of each picture, those with which a prompt ends included.

    Raises:
        GlimpseError: the selector says no number for each picture.
    """
    most = select.most(batch)
    pictures = len(batch.pictures)
    if not isinstance(most, (list, tuple)) or len(most) != pictures or any(
        isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in most
    ):  # fmt: skip
        raise GlimpseError(
            f"{type(select).__name__}: most: expected a number for each of {pictures} pictures, found {most!r}"
        )
    return [
        min(p.tokens, count + (number in batch.ending))
        for number, (p, count) in enumerate(zip(batch.pictures, most, strict=True))
    ]

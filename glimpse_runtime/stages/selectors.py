# SPDX-License-Identifier: Apache-2.0
"""Selectors with a budget that is known beforehand: so many tokens of each picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from numbers import Real
from typing import Literal

import torch

from glimpse_kernels import (
    cosine_similarity,
    drop_duplicates,
    farthest_points,
    greedy_dpp,
    window_topk,
)
from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.packing import PackedBatch
from glimpse_runtime.restriction import compacted, counts_before
from glimpse_runtime.stages.ratios import check_flag
from glimpse_runtime.stages.selection import Chosen, Selector
from glimpse_runtime.stages.shares import Share, check_share
from glimpse_runtime.stages.views import StageView, VisionView
from glimpse_runtime.taps import Received, VisionTaps


@dataclass(frozen=True)
class _ByShare(Selector):
    """As many tokens of each picture as `share` says."""

    share: Share

    def __post_init__(self) -> None:
        check_share("share", self.share)

    @property
    def exact(self) -> bool:
        return True

    def most(self, batch: PackedBatch) -> list[int]:
        return self.share.counts(batch)

    def left(self, before: float) -> float | None:
        return self.share.left(before)


def _scores(scores: torch.Tensor | None, name: str) -> torch.Tensor:
    if scores is None:
        raise GlimpseError(f"{name}: expected a stage with a score, found none")
    return scores


@dataclass(frozen=True)
class TopK(_ByShare):
    """Those with the best scores."""

    def choose(self, view: StageView, scores: torch.Tensor | None) -> Chosen:
        return Chosen(view.top(_scores(scores, "TopK"), self.most(view.batch)))


@dataclass(frozen=True)
class FarthestPoints(_ByShare):
    """Those that are farthest from each other (`glimpse_kernels.farthest_points`).

    Attributes:
        repeat: tokens that were picked stay in the race, as in the original: where fewer tokens differ than are wanted, fewer
            stay. False: always as many as wanted.
    """

    repeat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("repeat", self.repeat)

    @property
    def scored(self) -> bool:
        return False

    @property
    def exact(self) -> bool:
        return not self.repeat

    def choose(self, view: StageView, scores: torch.Tensor | None) -> Chosen:
        counts = self.most(view.batch)
        (cu_picks,) = view.upload(_offsets(counts))
        _, keep = farthest_points(
            cosine_similarity(view.features, view.lengths),
            view.cu_seqlens,
            cu_picks,
            tokens=sum(view.lengths),
            capacity=sum(counts),
            repeat=self.repeat,
            max_seqlen=view.longest,
        )
        return Chosen(view.exactly(keep))


@dataclass(frozen=True)
class GreedyDpp(_ByShare):
    """Those that are relevant, by score, and unlike each other (`glimpse_kernels.greedy_dpp`).

    What it cannot tell from a combination of those picked already is filled up by relevance.
    """

    def choose(self, view: StageView, scores: torch.Tensor | None) -> Chosen:
        relevance = _scores(scores, "GreedyDpp")
        counts = self.most(view.batch)
        (cu_picks,) = view.upload(_offsets(counts))
        _, keep = greedy_dpp(
            cosine_similarity(view.features, view.lengths, dtype=torch.float32),
            relevance,
            view.cu_seqlens,
            cu_picks,
            capacity=sum(counts),
            max_seqlen=view.longest,
        )
        return Chosen(view.top(torch.where(keep, math.inf, relevance), counts))


@dataclass(frozen=True)
class BestAndDistinct(_ByShare):
    """The best ones by score, and of the others what is left when close doubles are dropped (`glimpse_kernels.drop_duplicates`).

    Attributes:
        important: which part of the budget goes by score, in [0, 1]; with 1 it is `TopK`.
        per_round: doubles dropped in a round.
    """

    important: float = 0.5
    per_round: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        share, dropped = self.important, self.per_round
        if isinstance(share, bool) or not isinstance(share, Real) or not 0.0 <= share <= 1.0:
            raise GlimpseError(f"important: expected a share in [0, 1], found {share!r}")
        if isinstance(dropped, bool) or not isinstance(dropped, int) or dropped < 1:
            raise GlimpseError(f"per_round: expected a number of tokens, at least 1, found {dropped!r}")

    def choose(self, view: StageView, scores: torch.Tensor | None) -> Chosen:
        judged, counts = _scores(scores, "BestAndDistinct"), self.most(view.batch)
        best = [int(count * self.important) for count in counts]
        if best == counts:
            return Chosen(view.top(judged, counts))
        order = by_falling_score(judged, view)
        lists = [n - first for n, first in zip(view.lengths, best, strict=True)]
        firsts, cu_rest, targets = view.upload(
            [p.start + first for p, first in zip(view.pictures, best, strict=True)],
            _offsets(lists),
            [count - first for count, first in zip(counts, best, strict=True)],
        )
        place = torch.arange(len(order), dtype=torch.int32, device=view.device)
        rest = place >= firsts.index_select(0, view.token_pictures)
        listed = order.index_select(0, compacted(rest, sum(lists)))
        _, distinct = drop_duplicates(
            cosine_similarity(view.features, view.lengths),
            view.cu_seqlens,
            listed.to(torch.int32),
            cu_rest,
            targets,
            tokens=sum(view.lengths),
            per_round=self.per_round,
            max_seqlen=view.longest,
        )
        important = torch.ones_like(distinct).index_fill_(0, listed, False)
        # Exactly so many, whatever a prompt has to end with.
        wanted = torch.where(important | distinct, math.inf, judged)
        return Chosen(view.top(wanted, counts))


@dataclass(frozen=True)
class DominantAndContextual(Selector):
    """The best ones by score, and of the others, in the order of the picture, every so many-th: those are what others are
    merged into.

    Attributes:
        dominant, contextual: budgets of the two kinds.
    """

    dominant: Share
    contextual: Share

    def __post_init__(self) -> None:
        check_share("dominant", self.dominant)
        check_share("contextual", self.contextual)

    @property
    def exact(self) -> bool:
        return True

    def _counts(self, batch: PackedBatch) -> tuple[list[int], list[int]]:
        dominant, contextual = self.dominant.counts(batch), self.contextual.counts(batch)
        left = [p.tokens - first for p, first in zip(batch.pictures, dominant, strict=True)]
        return dominant, [min(n, rest) for n, rest in zip(contextual, left, strict=True)]

    def most(self, batch: PackedBatch) -> list[int]:
        return [a + b for a, b in zip(*self._counts(batch), strict=True)]

    def left(self, before: float) -> float | None:
        kinds = [self.dominant.left(before), self.contextual.left(before)]
        return None if None in kinds else min(before, sum(kind or 0.0 for kind in kinds))

    def choose(self, view: StageView, scores: torch.Tensor | None) -> Chosen:
        dominant, contextual = self._counts(view.batch)
        best = view.top(_scores(scores, "DominantAndContextual"), dominant).keep
        steps = [
            max(1, (n - first) // max(1, second))
            for n, first, second in zip(view.lengths, dominant, contextual, strict=True)
        ]
        step, wanted = view.upload(steps, contextual)
        others, picture = ~best, view.token_pictures
        before = counts_before(others)
        place = before[:-1] - before.index_select(0, view.cu_seqlens[:-1]).index_select(0, picture)
        step, wanted = step.index_select(0, picture), wanted.index_select(0, picture)
        targets = others & (place % step == 0) & (torch.div(place, step, rounding_mode="floor") < wanted)
        return Chosen(view.exactly(best | targets), targets=targets, sources=others & ~targets)


@dataclass(frozen=True)
class LocalThenGlobal(_ByShare):
    """Half of the budget goes to the best of each window by a score of its own, the rest to the best of the others by the stage's.

    Attributes:
        local: the score by which windows are scanned.
        window: side of a window in tokens.
        windows: what a half that the windows do not divide comes to: "up", all of it is scanned for; "down", each window gives
            equally many, and what is over is not kept at all.
    """

    local: Received = field(default_factory=lambda: Received("first_full"))
    window: int = 4
    windows: Literal["up", "down"] = "up"
    whole_pictures = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise GlimpseError(f"window: expected a number of tokens, at least 1, found {self.window!r}")
        if self.windows not in ("up", "down"):
            raise GlimpseError(f"windows: expected 'up' or 'down', found {self.windows!r}")

    def _halves(self, batch: PackedBatch) -> list[int]:
        """What is scanned for in each picture."""
        halves = [count // 2 for count in self.share.counts(batch)]
        if self.windows == "up":
            return halves
        side = self.window
        cut = [max(1, p.height // side) * max(1, p.width // side) for p in batch.pictures]
        return [half // n * n for half, n in zip(halves, cut, strict=True)]

    def most(self, batch: PackedBatch) -> list[int]:
        counts = self.share.counts(batch)
        rest = [count - count // 2 for count in counts]
        return [a + b for a, b in zip(self._halves(batch), rest, strict=True)]

    @property
    def taps(self) -> VisionTaps:
        return VisionTaps(received=(self.local,))

    def choose(self, view: StageView, scores: torch.Tensor | None) -> Chosen:
        judged, counts = _scores(scores, "LocalThenGlobal"), self.most(view.batch)
        assert isinstance(view, VisionView)
        halves = self._halves(view.batch)
        (cu_picks,) = view.upload(_offsets(halves))
        _, local = window_topk(
            view.received[self.local],
            view.cu_seqlens,
            view.grids,
            cu_picks,
            window=self.window,
            capacity=sum(halves),
            max_seqlen=view.longest,
        )
        return Chosen(view.top(torch.where(local, math.inf, judged), counts))


def by_falling_score(scores: torch.Tensor, view: StageView) -> torch.Tensor:
    """`[N]` int64 tokens of each picture, the best first, the lower index first among equals; NaN is below everything."""
    lowered = torch.where(scores.isnan(), -math.inf, scores)
    order = lowered.argsort(descending=True, stable=True)
    return order.index_select(0, view.token_pictures.index_select(0, order).argsort(stable=True))


def _offsets(counts: Sequence[int]) -> list[int]:
    return list(accumulate(counts, initial=0))

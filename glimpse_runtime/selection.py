# SPDX-License-Identifier: Apache-2.0
"""Budgets: how many visual tokens may stay, and the host-side metadata the selection kernel needs for that."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import torch

from glimpse_kernels import Selection, select_tokens
from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.packing import PackedBatch, Picture
from glimpse_runtime.uploads import upload_together

ANCHORS = ("tl", "tr", "bl", "br")


@dataclass(frozen=True)
class Budget:
    """Threshold with cap, floor and anchors (GlimpsePrune, arXiv 2508.01548, section 3.3).

    Attributes:
        threshold: a token stays if sigmoid(score) > threshold, strictly; in [0, 1].
        max_remain_ratio: if more than this share of a group stays, its top floor(share * size) stay instead; (0, 1].
        min_remain_num: at least this many of a group stay (all of a smaller group).
        anchor_positions: corners ("tl", "tr", "bl", "br") of every picture that stay whatever their score.
        group: what a budget is counted over: all pictures of a "row" (a video slice counts by itself), or a "picture".
    """

    threshold: float = 0.5
    max_remain_ratio: float | None = None
    min_remain_num: int = 1
    anchor_positions: tuple[str, ...] = ()
    group: Literal["row", "picture"] = "row"

    def __post_init__(self) -> None:
        if not isinstance(self.threshold, Real) or not 0.0 <= self.threshold <= 1.0:
            raise GlimpseError(f"threshold: expected a probability in [0, 1], found {self.threshold!r}")
        ratio = self.max_remain_ratio
        if ratio is not None and not (isinstance(ratio, Real) and 0.0 < ratio <= 1.0):
            raise GlimpseError(f"max_remain_ratio: expected a share in (0, 1], found {ratio!r}")
        floor = self.min_remain_num
        if not isinstance(floor, int) or isinstance(floor, bool) or floor < 0:
            raise GlimpseError(f"min_remain_num: expected a number >= 0, found {floor!r}")
        anchors = self.anchor_positions
        if not isinstance(anchors, tuple) or any(a not in ANCHORS for a in anchors):
            raise GlimpseError(f"anchor_positions: expected some of {', '.join(ANCHORS)}, found {anchors!r}")
        if self.group not in ("row", "picture"):
            raise GlimpseError(f"group: expected 'row' or 'picture', found {self.group!r}")

    @property
    def capped(self) -> bool:
        """Whether fewer tokens than there are is the most that can stay, whatever their scores."""
        return self.max_remain_ratio is not None and self.max_remain_ratio < 1.0

    @property
    def logit_threshold(self) -> float:
        """The threshold on the score itself; sigmoid is monotone."""
        p = self.threshold
        return -math.inf if p == 0.0 else math.inf if p == 1.0 else math.log(p / (1.0 - p))


def select(logits: torch.Tensor, batch: PackedBatch, budget: Budget) -> Selection:
    """Apply `budget` to `logits [N]` fp32 (prompt order). Everything stays on the device."""
    groups = _groups(batch.pictures, budget.group)
    sizes = [stop - start for start, stop in groups]
    caps = [_cap(size, budget.max_remain_ratio) for size in sizes]
    floors = [min(budget.min_remain_num, size) for size in sizes]
    host = [
        torch.tensor(numbers, dtype=torch.int32, device="cpu")
        for numbers in ([0, *(stop for _, stop in groups)], caps, floors)
    ]
    mask = _forced_mask(batch, budget.anchor_positions)
    sent = upload_together(host if mask is None else [*host, mask], logits.device)
    cu_groups, caps_t, floors_t = sent[:3]
    return select_tokens(
        logits,
        cu_groups,
        threshold=budget.logit_threshold,
        caps=caps_t,
        floors=floors_t,
        forced=None if mask is None else sent[3],
        token_rows=batch.token_rows,
        row_keep=batch.always_kept,
        cu_seqlens=batch.cu_seqlens,
        capacity=batch.num_rows,
    )


def row_bounds(batch: PackedBatch, budget: Budget) -> list[int]:
    """The most rows each sequence can hold after pruning: what the pool has to have room for."""
    bounds = list(batch.prompt_lengths)
    anchors = len(set(budget.anchor_positions))
    for start, stop in _groups(batch.pictures, budget.group):
        members = [p for p in batch.pictures if start <= p.start < stop]
        size = stop - start
        most = max(_cap(size, budget.max_remain_ratio), min(budget.min_remain_num, size)) + anchors * len(
            members
        )
        bounds[members[0].row] -= size - min(size, most)
    return bounds


def _cap(size: int, ratio: float | None) -> int:
    return size if ratio is None else int(ratio * size)


def _groups(pictures: tuple[Picture, ...], by: str) -> list[tuple[int, int]]:
    """Token ranges that share one budget, in order."""
    ranges: list[tuple[int, int]] = []
    previous: Picture | None = None
    for picture in pictures:
        joined = (
            by == "row"
            and previous is not None
            and previous.row == picture.row
            and previous.kind == picture.kind == "image"
        )
        start = ranges.pop()[0] if joined else picture.start
        ranges.append((start, picture.stop))
        previous = picture
    return ranges


def _forced_mask(batch: PackedBatch, anchors: tuple[str, ...]) -> torch.Tensor | None:
    """`[N]` bool on the host: anchors, and visual tokens with which a prompt ends."""
    rows = list(batch.last_visual)
    for p in batch.pictures if anchors else ():
        corner = {"tl": 0, "tr": p.width - 1, "bl": (p.height - 1) * p.width, "br": p.tokens - 1}
        rows += [p.start + corner[a] for a in anchors]
    if not rows:
        return None
    mask = torch.zeros(batch.num_visual, dtype=torch.bool, device="cpu")
    mask[rows] = True
    return mask

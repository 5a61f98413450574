# SPDX-License-Identifier: Apache-2.0
"""GlimpsePrune's selection: a threshold with cap, floor and anchors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Literal

import torch

from glimpse_kernels import Selection, select_tokens
from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.packing import PackedBatch, Picture
from glimpse_runtime.stages.ratios import Ratio, check_ratio, ratio_for
from glimpse_runtime.stages.selection import Chosen, Selector
from glimpse_runtime.uploads import upload_together

if TYPE_CHECKING:
    from glimpse_runtime.stages.views import StageView

ANCHORS = ("tl", "tr", "bl", "br")


@dataclass(frozen=True)
class Budget(Selector):
    """Threshold with cap, floor and anchors (GlimpsePrune, arXiv 2508.01548, section 3.3).

    Attributes:
        threshold: a token stays if sigmoid(score) > threshold, strictly; in [0, 1].
        max_remain_ratio: if more than this share of a group stays, its top floor(share * size) stay instead; (0, 1], or a
            callable that gives such a share for a `Prompt`.
        min_remain_num: at least this many of a group stay (all of a smaller group).
        anchor_positions: corners ("tl", "tr", "bl", "br") of every picture that stay whatever their score.
        group: what a budget is counted over: all pictures of a "row" (a video slice counts by itself), or a "picture".
    """

    threshold: float = 0.5
    max_remain_ratio: Ratio | None = None
    min_remain_num: int = 1
    anchor_positions: tuple[str, ...] = ()
    group: Literal["row", "picture"] = "row"

    def __post_init__(self) -> None:
        if not isinstance(self.threshold, Real) or not 0.0 <= self.threshold <= 1.0:
            raise GlimpseError(f"threshold: expected a probability in [0, 1], found {self.threshold!r}")
        if self.max_remain_ratio is not None:
            check_ratio("max_remain_ratio", self.max_remain_ratio)
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
        ratio = self.max_remain_ratio
        return ratio is not None and (callable(ratio) or ratio < 1.0)

    @property
    def logit_threshold(self) -> float:
        """The threshold on the score itself; sigmoid is monotone."""
        p = self.threshold
        return -math.inf if p == 0.0 else math.inf if p == 1.0 else math.log(p / (1.0 - p))

    @property
    def exact(self) -> bool:
        return False

    def most(self, batch: PackedBatch) -> list[int]:
        return [min(p.tokens, most) for members, most in self._most(batch) for p in members]

    def row_bounds(self, batch: PackedBatch) -> list[int]:
        bounds = list(batch.prompt_lengths)
        for members, most in self._most(batch):
            bounds[members[0].row] -= sum(p.tokens for p in members) - most
        return bounds

    def _most(self, batch: PackedBatch) -> list[tuple[list[Picture], int]]:
        """Pictures that share one budget, and how many of their tokens can stay together."""
        found, anchors = [], len(set(self.anchor_positions))
        ending = [batch.pictures[number] for number in batch.ending]
        for members, size, cap in _budgets(batch, self):
            forced = sum(anchors + (p in ending) for p in members)
            found.append((members, min(size, max(cap, min(self.min_remain_num, size)) + forced)))
        return found

    def choose(self, view: StageView, scores: torch.Tensor | None) -> Chosen:
        if scores is None:
            raise GlimpseError(
                "a threshold: expected scores, or keep masks that come with the call, found neither"
            )
        return Chosen(select(scores, view.batch, self, view.row_keep))


def select(
    logits: torch.Tensor, batch: PackedBatch, budget: Budget, row_keep: torch.Tensor | None = None
) -> Selection:
    """Apply `budget` to `logits [N]` fp32 (prompt order). Everything stays on the device.

    Args:
        row_keep: `[T]` bool rows that stay in any case; None: those of the batch.
    """
    groups = _budgets(batch, budget)
    host = [
        torch.tensor(numbers, dtype=torch.int32, device="cpu")
        for numbers in (
            [0, *(members[-1].stop for members, _, _ in groups)],
            [cap for _, _, cap in groups],
            [min(budget.min_remain_num, size) for _, size, _ in groups],
        )
    ]
    mask = _forced_mask(batch, budget.anchor_positions)
    sent = upload_together(host if mask is None else [*host, mask], logits.device)
    cu_groups, caps, floors = sent[:3]
    forced = None if mask is None else sent[3]
    if forced is not None and batch.token_ids is not None:
        forced = forced.index_select(0, batch.token_ids)
    return select_tokens(
        logits,
        cu_groups,
        threshold=budget.logit_threshold,
        caps=caps,
        floors=floors,
        forced=forced,
        token_rows=batch.token_rows,
        row_keep=batch.always_kept if row_keep is None else row_keep,
        cu_seqlens=batch.cu_seqlens,
        capacity=batch.num_rows,
    )


def _budgets(batch: PackedBatch, budget: Budget) -> list[tuple[list[Picture], int, int]]:
    """Pictures that share one budget, in order, their tokens and how many of these may stay."""
    found = []
    for members in _groups(batch.pictures, budget.group):
        ratio, size = budget.max_remain_ratio, sum(p.tokens for p in members)
        share = None if ratio is None else ratio_for("max_remain_ratio", ratio, batch, members[0].row)
        found.append((members, size, size if share is None else int(share * size)))
    return found


def _groups(pictures: tuple[Picture, ...], by: str) -> list[list[Picture]]:
    groups: list[list[Picture]] = []
    for picture in pictures:
        previous = groups[-1][-1] if groups else None
        if (
            by == "row"
            and previous is not None
            and previous.row == picture.row
            and previous.kind == picture.kind == "image"
        ):
            groups[-1].append(picture)
        else:
            groups.append([picture])
    return groups


def _forced_mask(batch: PackedBatch, anchors: tuple[str, ...]) -> torch.Tensor | None:
    """`[tokens of whole pictures]` bool on the host: anchors, and visual tokens with which a prompt ends."""
    rows: list[int] = []
    at = 0
    for number, p in enumerate(batch.pictures):
        corner = {"tl": 0, "tr": p.width - 1, "bl": (p.height - 1) * p.width, "br": p.size - 1}
        rows += [at + corner[a] for a in anchors]
        if number in batch.ending:
            rows.append(at + p.size - 1)
        at += p.size
    if not rows:
        return None
    mask = torch.zeros(at, dtype=torch.bool, device="cpu")
    mask[rows] = True
    return mask

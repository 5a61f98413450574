# SPDX-License-Identifier: Apache-2.0
"""What the stages of a plan kept, told about the pictures as they came."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from glimpse_kernels import Selection
from glimpse_runtime.packing import PackedBatch
from glimpse_runtime.plan import Stage


@dataclass(frozen=True)
class StageOutcome:
    """One stage.

    Attributes:
        stage: what was done.
        keep: `[N]` bool of all visual tokens of the prompts: those that are left behind it.
        scores: `[N]` fp32, NaN where a token was gone before; None if the stage had no scores of its own.
    """

    stage: Stage
    keep: torch.Tensor
    scores: torch.Tensor | None

    @classmethod
    def of(
        cls, stage: Stage, batch: PackedBatch, selection: Selection, scores: torch.Tensor | None
    ) -> StageOutcome:
        """From what a stage decided about the tokens of `batch`, which earlier stages may have thinned out."""
        own = None if stage.score is None else scores
        told = None if own is None else of_whole_pictures(own, batch, math.nan)
        return cls(stage, of_whole_pictures(selection.keep, batch, False), told)


def of_whole_pictures(values: torch.Tensor, batch: PackedBatch, gone: float) -> torch.Tensor:
    """`values` of the tokens of `batch`, for all that its pictures came with: `gone` where earlier stages dropped one."""
    if batch.token_ids is None:
        return values
    total = sum(p.size for p in batch.pictures)
    return values.new_full((total,), gone).index_copy_(0, batch.token_ids, values)

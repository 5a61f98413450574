# SPDX-License-Identifier: Apache-2.0
"""The control: as many tokens at random. A method that does no better has not looked."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from glimpse_runtime.plan import PrunePlan, Stage
from glimpse_runtime.stages.places import Vision
from glimpse_runtime.stages.scorers import VisionScorer
from glimpse_runtime.stages.selectors import Share, TopK
from glimpse_runtime.stages.views import VisionView


@dataclass(frozen=True)
class Dice(VisionScorer):
    """Scores by lot, of each row of a batch anew, the same in every run."""

    def score(self, view: VisionView) -> torch.Tensor:
        tokens = view.features.shape[0]
        lots = torch.rand(tokens, generator=torch.Generator().manual_seed(tokens))
        return lots.to(view.features.device)


def at_random(ratio: float) -> PrunePlan:
    """That share of each picture's tokens, chosen before the decoder."""
    return PrunePlan("random", (Stage(at=Vision(), score=Dice(), select=TopK(Share(ratio, "nearest"))),))

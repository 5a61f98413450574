# SPDX-License-Identifier: Apache-2.0
"""DivPrune (arXiv:2503.02175): tokens that are as far from each other as can be had."""

from __future__ import annotations

from typing import Literal

from glimpse_runtime.plan import PrunePlan, Stage
from glimpse_runtime.stages.places import Vision
from glimpse_runtime.stages.ratios import Ratio
from glimpse_runtime.stages.selectors import FarthestPoints, Share


def divprune(
    ratio: Ratio = 0.098, *, repeat: bool = True, rounding: Literal["floor", "nearest"] = "nearest"
) -> PrunePlan:
    """DivPrune, section 3.3. First the token whose nearest other one is farthest, then again and again the one whose nearest picked one
    is farthest, by the cosine of the decoder's input embeddings. No scores.

    The original picks among all tokens of LLaVA's first picture, newlines included; here in each picture by itself.

    Args:
        repeat: the original lets tokens that were picked be picked again, so that fewer stay where fewer than wanted differ;
            sound is False.
        rounding: "nearest" is the original's `round`, halves to the even number.
    """
    select = FarthestPoints(Share(ratio, rounding), repeat)
    return PrunePlan("divprune", (Stage(at=Vision(), select=select),))

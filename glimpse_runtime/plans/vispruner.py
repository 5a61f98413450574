# SPDX-License-Identifier: Apache-2.0
"""VisPruner (arXiv:2412.01818): the tokens that the vision tower attends to, and of the others those without a close double."""

from __future__ import annotations

from typing import Literal

from glimpse_runtime.plan import PrunePlan, Stage
from glimpse_runtime.stages.places import Vision
from glimpse_runtime.stages.ratios import Ratio
from glimpse_runtime.stages.scorers import ReceivedAttention
from glimpse_runtime.stages.selectors import BestAndDistinct, Share, TopK
from glimpse_runtime.taps import Received


def vispruner(
    ratio: Ratio = 128 / 576,
    important: float = 0.5,
    *,
    block: int = -1,
    per_round: int = 8,
    rounding: Literal["floor", "nearest"] = "floor",
) -> PrunePlan:
    """VisPruner, section 3. The part `important` of the budget goes to the best tokens by attention; the rest of the list, best
    first, is thinned in rounds of bipartite matching that drop `per_round` close doubles each.

    The original scores by the class token's attention in CLIP. Qwen2.5-VL has none: as its authors advise, it is the attention
    that a token receives from all tokens of its picture (`block`), and doubles are found among merged tokens. The original counts
    tokens (128 of 576 with 0.5, 64 with 0.75) and fails where the list is odd or the rest of the budget is small; neither happens here.

    Args:
        rounding: "floor" is what the original's `int` does; "nearest" comes closer to the ratio.
    """
    return PrunePlan(
        "vispruner",
        (
            Stage(
                at=Vision(),
                score=ReceivedAttention(Received(block)),
                select=BestAndDistinct(Share(ratio, rounding), important, per_round),
            ),
        ),
    )


def fastervlm(ratio: Ratio = 0.25, *, block: int = -1) -> PrunePlan:
    """FasterVLM (arXiv:2412.01818, its first version): VisPruner with the whole budget for the best tokens by attention. The
    original has no default."""
    share = Share(ratio)
    return PrunePlan(
        "fastervlm", (Stage(at=Vision(), score=ReceivedAttention(Received(block)), select=TopK(share)),)
    )

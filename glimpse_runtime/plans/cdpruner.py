# SPDX-License-Identifier: Apache-2.0
"""CDPruner (arXiv:2506.10967): tokens that are relevant to the prompt and unlike each other."""

from __future__ import annotations

from typing import Literal

from glimpse_runtime.plan import PrunePlan, Stage
from glimpse_runtime.stages.places import Vision
from glimpse_runtime.stages.ratios import Ratio
from glimpse_runtime.stages.scorers import TextRelevance
from glimpse_runtime.stages.selectors import GreedyDpp, Share


def cdpruner(
    ratio: Ratio = 64 / 576,
    *,
    sign: Literal["plus", "minus"] = "plus",
    over: Literal["picture", "prompt"] = "picture",
    rounding: Literal["floor", "nearest"] = "nearest",
) -> PrunePlan:
    """CDPruner, section 3. The likeliest set of so many tokens under a determinantal point process whose kernel is the cosine of two
    tokens times the relevance of both, found greedily.

    The original takes relevance from CLIP's own text tower and counts tokens (64 of 576). Qwen2.5-VL has no such tower and
    its authors published nothing for it: as in OpenVINO GenAI, relevance is the mean cosine with the decoder's input
    embeddings of the prompt's text. Where features have fewer independent directions than tokens are wanted, the original's
    square roots become NaN and it keeps fewer; here the most relevant ones fill the budget.

    Args:
        sign: "minus" is what the original does for CLIP, whose patches point away from what they show; sound here is "plus".
        over: what relevance is scaled over. The original takes all tiles, and all pictures of a batch, together: "prompt"; sound is
            "picture".
    """
    select = GreedyDpp(Share(ratio, rounding))
    return PrunePlan("cdpruner", (Stage(at=Vision(), score=TextRelevance(sign, over), select=select),))

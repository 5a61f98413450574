# SPDX-License-Identifier: Apache-2.0
"""VisionZip (arXiv:2412.04467): dominant tokens, and contextual ones into which the others are merged."""

from __future__ import annotations

from typing import Literal

from glimpse_runtime.plan import PrunePlan, Stage
from glimpse_runtime.stages.mergers import IntoNearest
from glimpse_runtime.stages.places import Vision
from glimpse_runtime.stages.ratios import Ratio
from glimpse_runtime.stages.scorers import ReceivedAttention
from glimpse_runtime.stages.selectors import DominantAndContextual, Share
from glimpse_runtime.taps import Received


def visionzip(
    dominant: Ratio = 0.65,
    contextual: Ratio = 0.05,
    *,
    how: Literal["target_plus_mean", "mean"] = "target_plus_mean",
    block: int = -1,
) -> PrunePlan:
    """VisionZip, section 3.2. The tokens that receive most attention in a block of the tower are dominant. Of the others, every so
    many-th is contextual, and each of the rest goes into the contextual token whose key in that block is most like its own.

    This is the original's branch for Qwen2.5-VL and its defaults (on LLaVA: 54 and 10 of 576, the class token among them),
    for any number of pictures and without its matrix of all patches by all patches.

    Args:
        how: "target_plus_mean" is what the original's code does: a contextual token is itself plus the mean of what goes into it,
            about twice as long as others; sound is "mean", over itself and those, as the paper says.
    """
    return PrunePlan(
        "visionzip",
        (
            Stage(
                at=Vision(),
                score=ReceivedAttention(Received(block)),
                select=DominantAndContextual(Share(dominant), Share(contextual)),
                merge=IntoNearest(how, keys_of=block),
            ),
        ),
    )

# SPDX-License-Identifier: Apache-2.0
"""FastV (arXiv:2403.06764): after the first layers, tokens that the last row does not look at go."""

from __future__ import annotations

from typing import Literal

from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.plan import PrunePlan, Stage
from glimpse_runtime.stages.places import Layer
from glimpse_runtime.stages.ratios import Ratio
from glimpse_runtime.stages.scorers import LastRowAttention
from glimpse_runtime.stages.selectors import Share, TopK


def fastv(
    layer: int = 2, ratio: Ratio = 0.5, *, rounding: Literal["floor", "nearest"] = "nearest"
) -> PrunePlan:
    """FastV, section 4. Layer `layer` (K, counted from 0) and those behind it see only the tokens to which the last prompt row attended
    most in the layer before. Positions stay as they were, and the first K layers keep the keys of all tokens.

    This is the original's version with a cache. The paper speaks of the attention that a token receives on average; the code
    takes the last row, and so does this.

    Args:
        layer: K, at least 1. ratio: share that stays; the paper's R is the share that goes.
        rounding: "nearest" is the original's `round`.
    """
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < 1:
        raise GlimpseError(f"layer: expected the number of a layer, at least 1, found {layer!r}")
    stage = Stage(at=Layer(layer - 1), score=LastRowAttention(), select=TopK(Share(ratio, rounding)))
    return PrunePlan("fastv", (stage,))

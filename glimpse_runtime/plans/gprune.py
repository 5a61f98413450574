# SPDX-License-Identifier: Apache-2.0
"""G-Prune (arXiv:2501.02268): tokens to which much flows along the similarities of their picture."""

from __future__ import annotations

from typing import Literal

from glimpse_runtime.plan import PrunePlan, Stage
from glimpse_runtime.stages.places import Vision
from glimpse_runtime.stages.ratios import Ratio
from glimpse_runtime.stages.scorers import GraphFlow
from glimpse_runtime.stages.selectors import Share, TopK


def gprune(
    ratio: Ratio = 0.5,
    *,
    threshold: float = 0.5,
    temperature: float = 0.03,
    steps: int = 5,
    rounded: bool = True,
    degree: Literal["edges", "float16"] = "float16",
) -> PrunePlan:
    """G-Prune, information propagation. Tokens are a graph with an edge where two are alike; what each has flows along it for some
    steps, and what one has then, over the number of its edges, is its score. Positions stay as they were.

    The original runs on LLaVA-NeXT, one graph for the small picture and one for the large one, and keeps all newline tokens. Nobody
    has published it for Qwen2.5-VL; here each picture's merged tokens are a graph.

    Args:
        threshold: cosine from which there is an edge. temperature: of the shares in which a token passes on what it has.
        rounded: the original works in the model's dtype throughout; sound is False, float32.
        degree: "float16" is what the original comes to, where shares that underflow are no edges; sound is "edges".
    """
    score = GraphFlow(threshold, temperature, steps, rounded, degree)
    return PrunePlan("gprune", (Stage(at=Vision(), score=score, select=TopK(Share(ratio))),))

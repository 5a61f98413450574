# SPDX-License-Identifier: Apache-2.0
"""SparseVLM+ (arXiv:2410.04417): text tokens that have to do with the picture decide which of its tokens stay."""

from __future__ import annotations

from typing import Literal

from glimpse_runtime.plan import PrunePlan, Stage
from glimpse_runtime.plans.pyramiddrop import check_schedule
from glimpse_runtime.stages.places import Layer
from glimpse_runtime.stages.rater_attention import RaterAttention
from glimpse_runtime.stages.ratios import Ratio
from glimpse_runtime.stages.selectors import Share, TopK


def sparsevlm(
    shares: tuple[Ratio, ...] = (300 / 576, 200 / 576, 118 / 576),
    layers: tuple[int | float, ...] = (2, 6, 15),
    *,
    heads: int | None = 14,
    corrected: bool = True,
    fewer_heads: Literal["refuse", "all"] = "refuse",
) -> PrunePlan:
    """SparseVLM, section 3, in its second version: tokens leave behind some layers, by the attention that raters gave them there,
    and keep their positions. Nothing is recycled or merged, as in that version.

    The original counts tokens: 300, 200 and 118 of 576 for what it calls a budget of 192 (238, 108, 60 for 128; 66, 34, 20 for
    64), behind layers 2, 6 and 15 of 32. It holds a matrix of all rows by all rows in each layer; here raters' rows alone are made.

    Args:
        shares: of the tokens that the picture came with, behind each of `layers`, which may be shares of the depth, too.
        heads: so many heads count, those in which raters look at the picture most; the original's number, whatever the model
            has. None: all, as in the first version.
        corrected: the original divides by what positions alone make of a product, which can be next to zero; sound is False.
        fewer_heads: "refuse" is the original, which fails in a model with fewer heads than `heads`; "all" takes those that it has.
    """
    check_schedule("shares", shares, layers)
    score = RaterAttention(heads, corrected, fewer_heads)
    return PrunePlan(
        "sparsevlm",
        tuple(
            Stage(at=Layer(layer), score=score, select=TopK(Share(share, "nearest", of="original")))
            for share, layer in zip(shares, layers, strict=True)
        ),
    )

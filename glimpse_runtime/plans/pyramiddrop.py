# SPDX-License-Identifier: Apache-2.0
"""PyramidDrop (arXiv:2410.17247): ever fewer tokens from stage to stage of the decoder."""

from __future__ import annotations

from typing import Literal

from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.plan import PrunePlan, Stage
from glimpse_runtime.stages.places import LayerInput
from glimpse_runtime.stages.ratios import Ratio
from glimpse_runtime.stages.scorers import LastRowAttention
from glimpse_runtime.stages.selectors import Share, TopK


def pyramiddrop(
    ratios: tuple[Ratio, ...] = (0.5, 0.25, 0.125),
    layers: tuple[int | float, ...] = (0.25, 0.5, 0.75),
    *,
    rotary: bool = True,
    of: Literal["original", "current"] = "original",
    positions: Literal["keep", "renumber"] = "renumber",
) -> PrunePlan:
    """PyramidDrop, section 3. Before some layers, those tokens stay to which the last prompt row would attend most in the layer.

    The original drops before layers 8, 16 and 24 of 32, here the same shares of the depth. Earlier layers keep the keys of all
    their tokens. On Qwen2.5-VL, the numbers in the GlimpsePrune paper (arXiv:2508.01548) come from VScan's second stage:
    `rotary=False, of="current", positions="keep"`.

    Args:
        ratios: share that stays behind each of `layers`. of: of the tokens that the picture came with, as in the original, or of those
            that are left.
        rotary: whether queries and keys are rotated to their positions for the score; sound is True.
        positions: the original counts rows anew after each drop, so that keys of one token are rotated differently from layer to
            layer; sound is "keep".
    """
    check_schedule("ratios", ratios, layers)
    score = LastRowAttention(rotary)
    return PrunePlan(
        "pyramiddrop",
        tuple(
            Stage(at=LayerInput(layer), score=score, select=TopK(Share(ratio, of=of)), positions=positions)
            for ratio, layer in zip(ratios, layers, strict=True)
        ),
    )


def check_schedule(name: str, ratios: tuple[Ratio, ...], layers: tuple[int | float, ...]) -> None:
    """Raises GlimpseError unless there is a ratio for each layer, and at least one."""
    if not isinstance(ratios, (tuple, list)) or not isinstance(layers, (tuple, list)) or not ratios:
        raise GlimpseError(f"{name}: expected a tuple with one for each of layers, found {ratios!r}")
    if len(ratios) != len(layers):
        raise GlimpseError(f"{name}: expected one for each of {len(layers)} layers, found {len(ratios)}")

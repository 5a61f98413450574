# SPDX-License-Identifier: Apache-2.0
"""VScan (arXiv:2505.22654): a local and a global scan in the vision tower with merging, then the decoder's own choice."""

from __future__ import annotations

from typing import Literal

from glimpse_runtime.plan import PrunePlan, Stage
from glimpse_runtime.plans.pyramiddrop import check_schedule
from glimpse_runtime.stages.mergers import IntoNearest
from glimpse_runtime.stages.places import LayerInput, Vision
from glimpse_runtime.stages.ratios import Ratio
from glimpse_runtime.stages.scorers import LastRowAttention, ReceivedAttention
from glimpse_runtime.stages.selectors import LocalThenGlobal, Share, TopK
from glimpse_runtime.taps import Received


def vscan(
    ratio: Ratio = 0.167,
    later: tuple[Ratio, ...] = (0.333,),
    layers: tuple[int | float, ...] = (0.5,),
    *,
    rotations: int = 2,
    window: int = 4,
    windows: Literal["up", "down"] = "up",
    rotary: bool = False,
) -> PrunePlan:
    """VScan, section 4, as its authors have it for Qwen2.5-VL. Half of the budget goes to the best tokens of each window by the
    attention that they receive in the tower's first full-attention block, the rest to the best by the last block; the others
    go into the nearest token that stays. Then, before some layers, those stay to which the last prompt row would attend most.

    The original fails on grids smaller than a window and on two pictures; here a small grid is one window.

    Args:
        later: share of the tokens that are left, for each of `layers`.
        rotations: the original's flash-attention class rotates queries and keys of the tower twice for these scores; sound is 1, which
            its SDPA class does.
        window: side of a window in tokens. windows: what a half that the windows do not divide comes to; "down" is the original on LLaVA
            (with a window of 6), where each window gives equally many and what is over is lost.
        rotary: the original does not rotate the decoder's queries and keys for the score; sound is True.
    """
    if layers or later:
        check_schedule("later", later, layers)
    local, everywhere = Received("first_full", rotations), Received(-1, rotations)
    scan = Stage(
        at=Vision(),
        score=ReceivedAttention(everywhere),
        select=LocalThenGlobal(Share(ratio), local, window, windows),
        merge=IntoNearest("mean"),
    )
    score = LastRowAttention(rotary)
    return PrunePlan(
        "vscan",
        (
            scan,
            *(
                Stage(at=LayerInput(layer), score=score, select=TopK(Share(share)))
                for share, layer in zip(later, layers, strict=True)
            ),
        ),
    )

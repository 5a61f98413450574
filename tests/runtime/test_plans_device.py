# SPDX-License-Identifier: Apache-2.0
"""Stages of all plans on a GPU that is none: what a CPU chooses, and nothing that the host waits for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

from glimpse_runtime import plans
from glimpse_runtime.plan import Stage
from glimpse_runtime.stages.places import Vision
from glimpse_runtime.stages.scorers import RowScorer
from glimpse_runtime.taps import Received

from .on_stand_in import device
from .stage_views import batch_of, row_view, run_stage, vision_view

ROWS = [[3, (6, 5), 2, (1, 1), 4], [2, (5, 4), (2, 2)], [5], [1, (1, 3), 6, (8, 8), 1]]
WIDTH = 16
STAGES = {
    f"{name} at {stage.at}": stage
    for name in plans.names()
    if name != "glimpse"
    for stage in plans.make(name, **({"fewer_heads": "all"} if name == "sparsevlm" else {})).stages
}


def outcome(
    stage: Stage, where: torch.device, watch: Callable[[], AbstractContextManager[None]] = nullcontext
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Scores, what stays, and what tokens or rows are afterwards; `watch` looks on while the stage works."""
    batch = batch_of(ROWS, device=where)
    generator = torch.Generator().manual_seed(3)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(where)

    words = rand(100, WIDTH)
    taps = [Received(-1), Received("first_full", 2), Received(-1, 2)]
    view = vision_view(
        batch,
        rand(batch.num_visual, WIDTH),
        received={tap: rand(batch.num_visual).exp() for tap in taps},
        keys={-1: rand(batch.num_visual, 8)},
        text=lambda ids: words.index_select(0, ids),
    )
    weights = {"norm_weight": rand(WIDTH), "q_weight": rand(32, WIDTH), "k_weight": rand(16, WIDTH)}
    hidden = rand(batch.num_rows, WIDTH)
    rows = row_view(batch, hidden, weights, head_dim=8)
    with watch():
        if isinstance(stage.at, Vision):
            scores, chosen = run_stage(stage, view)
            after = view.features if stage.merge is None else stage.merge.merged(view, chosen)
        else:
            assert isinstance(stage.score, RowScorer)
            rows.prepared = stage.score.prepare(view)
            scores, chosen = run_stage(stage, rows)
            after = chosen.selection.index
    return scores, chosen.selection.keep, after


@pytest.mark.parametrize("name", STAGES)
def test_as_on_the_cpu(name: str) -> None:
    wanted = outcome(STAGES[name], torch.device("cpu"))
    with device() as here:
        found = outcome(STAGES[name], torch.device("cuda", 0), here.gpu.nothing_waits)
        assert not here.waits
        for ours, theirs in zip(found, wanted, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                assert ours.is_cuda
                torch.testing.assert_close(ours.cpu(), theirs, atol=1e-5, rtol=1e-5)

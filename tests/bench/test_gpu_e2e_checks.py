# SPDX-License-Identifier: Apache-2.0
"""The checks of `bench.gpu_e2e` on a GPU that is none (`tests/stand_in.py`), with graphs on tape: they see what they are for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_e2e_checks
from bench.gpu_e2e_contenders import Runtime
from bench.gpu_e2e_world import SMALL, TINY, World
from glimpse_runtime import GlimpseModel
from glimpse_runtime.engine import Engine
from glimpse_runtime.loading import BaseModel, load_base
from tests.graph_tape import Step, TapeCapture
from tests.runtime.on_stand_in import device

ALONE = replace(SMALL, batches=(1,))


class StandInWorld(World):
    """Models come from files: transformers cannot be moved to a device that is none."""

    @cached_property
    def base(self) -> BaseModel:
        return load_base(TINY / "base", dtype=torch.float32, device=self.device)

    def ours(self, **engine: Any) -> GlimpseModel:
        options = {"capture": TapeCapture()} | engine
        return GlimpseModel(self.base, self.plan, engine=Engine(self.base.decoder, **options))

    def patches(self, tokens: int, batch: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch * 4 * tokens, 1176, generator=generator).to(self.device)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(gpu_e2e_checks, "NEW", 4)
    with device():
        yield StandInWorld(ALONE, torch.device("cuda", 0), tmp_path)


def test_graphs_are_compared_with_single_launches(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_e2e_checks.graphs_equal_eager(world)["graphs"] > 1
    monkeypatch.setattr(Step, "again", lambda step: None)  # a graph that gives its first answer again
    with pytest.raises(AssertionError, match="1 rows"):
        gpu_e2e_checks.graphs_equal_eager(world)


def test_requests_are_measured(world: World) -> None:
    runtime = Runtime(world)
    prompt = world.prompt(SMALL.tokens[0], 2)
    made = runtime.serve(prompt, world.patches(SMALL.tokens[0], 2), gpu_e2e_checks.Keep(0.22), 5)
    assert made.tokens.shape == (2, 5) and made.kept == [7, 7] and len(made.beat.times) == 5

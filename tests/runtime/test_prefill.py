# SPDX-License-Identifier: Apache-2.0
"""Prefill on a GPU that is none: the same results as on the CPU, and nothing that the host waits for."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import glimpse_runtime as glimpse
from glimpse_runtime.models.qwen2_5_vl import layout, linear, vision
from glimpse_runtime.workspace import PrefillMemory
from tests.graph_tape import TapeCapture

from .conftest import make_batch
from .on_stand_in import COUNT, device, tapes

ROWS = [[5, (3, 5), 7], [9], [2, (1, 1), 3, (6, 2), 4], [1, (9, 7), 2]]


def same(ours: glimpse.PrefillResult, theirs: glimpse.PrefillResult, atol: float = 2e-5) -> None:
    """Logits, masks, positions, keys and values of two prefills of one batch."""
    torch.testing.assert_close(ours.last_logits.cpu(), theirs.last_logits, atol=atol, rtol=0)
    assert len(ours.pruning or ()) == len(theirs.pruning or ())
    for a, b in zip(ours.pruning or (), theirs.pruning or (), strict=True):
        assert torch.equal(a.keep.cpu(), b.keep)
    for row, (a, b) in enumerate(zip(ours.kept_positions, theirs.kept_positions, strict=True)):
        assert torch.equal(a.cpu(), b)
        for layer in range(6):
            for x, y in zip(ours.kv(row, layer), theirs.kv(row, layer), strict=True):
                torch.testing.assert_close(x.cpu(), y, atol=atol, rtol=0)


OPTIONS: dict[str, dict[str, Any]] = {
    "threshold": {},
    "cap": {"max_remain_ratio": 0.3},
    "cap that bites": {"max_remain_ratio": 0.05, "threshold": 0.0},
    "nothing": {"threshold": 1.0, "min_remain_num": 0},
    "everything": {"threshold": 0.0},
    "anchors": {"max_remain_ratio": 0.2, "anchor_positions": ("tl", "br")},
    "no plan": {"plan": None},
}


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_as_on_the_cpu(model: glimpse.GlimpseModel, name: str, captured: bool) -> None:
    batch, _ = make_batch(ROWS)
    wanted = model.prefill(**batch, **OPTIONS[name])
    with device() as here:
        ours = here.model(capture=TapeCapture() if captured else None)
        here.waits.clear()
        with here.gpu.nothing_waits():
            found = ours.prefill(**batch, **OPTIONS[name])
        capped = "max_remain_ratio" in OPTIONS[name] or name == "no plan"
        assert here.waits == ([] if capped else [COUNT])
        same(found, wanted)
        tokens, _ = found.decode(4)
        assert tokens.tolist() == wanted.decode(4)[0].tolist()
        assert not captured or len(tapes(ours)) >= (name != "no plan")


def test_masks_that_come_with_the_call(model: glimpse.GlimpseModel) -> None:
    batch, _ = make_batch(ROWS)
    generator = torch.Generator().manual_seed(3)
    mask = torch.randint(0, 2, (91,), generator=generator).bool()
    wanted = model.prefill(**batch, ref_masks=mask, min_remain_num=0)
    with device() as here:
        ours = here.model()
        here.waits.clear()
        with here.gpu.nothing_waits():
            found = ours.prefill(**batch, ref_masks=mask, min_remain_num=0)
        assert here.waits == [COUNT]
        same(found, wanted)


@pytest.mark.parametrize("layer", [3, 4, 5, 77])
def test_stage_in_any_layer(model: glimpse.GlimpseModel, layer: int) -> None:
    """In the last layer nothing is behind it; the rows of the last tokens are all that is finished."""
    batch, _ = make_batch(ROWS)
    stage = dataclasses.replace(model.plan.stages[0], at=glimpse.Layer(layer))
    wanted = model.prefill(**batch, plan=glimpse.PrunePlan("moved", (stage,)), max_remain_ratio=0.3)
    with device() as here:
        ours = here.model(capture=TapeCapture())
        stage = dataclasses.replace(ours.plan.stages[0], at=glimpse.Layer(layer))
        here.waits.clear()
        found = ours.prefill(**batch, plan=glimpse.PrunePlan("moved", (stage,)), max_remain_ratio=0.3)
        assert not here.waits
        same(found, wanted)
        assert len(tapes(ours)) == (layer < 5)


@pytest.mark.parametrize("modules", ["gp_v1", None])
def test_text_alone(model: glimpse.GlimpseModel, modules: str | None) -> None:
    batch, _ = make_batch([[9], [4], [31]])
    wanted = model.prefill(**batch)
    with device() as here:
        ours = here.model(modules, TapeCapture())
        here.waits.clear()
        found = ours.prefill(**batch)
        assert not here.waits
        same(found, wanted)


def test_selection_later(model: glimpse.GlimpseModel) -> None:
    """Two prompts on their way at once: neither works in the other's memory."""
    first, second = make_batch(ROWS)[0], make_batch(ROWS[:3], seed=5)[0]
    wanted = [model.prefill(**b, max_remain_ratio=0.3) for b in (first, second)]
    with device() as here:
        ours = here.model(capture=TapeCapture())
        waiting = [ours.prefill(**b, max_remain_ratio=0.3, select=False) for b in (first, second)]
        here.waits.clear()
        for found, theirs in zip(reversed(waiting), reversed(wanted), strict=True):
            same(found.select(), theirs)


def test_a_prompt_that_fails_leaves_nothing_behind(
    model: glimpse.GlimpseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, _ = make_batch(ROWS)
    wanted = model.prefill(**batch, max_remain_ratio=0.3)
    with device() as here:
        ours = here.model(capture=TapeCapture())
        same(ours.prefill(**batch, max_remain_ratio=0.3), wanted)
        scorer = type(ours.plan.stages[0].score)
        with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
            broken.setattr(scorer, "score", lambda *_: 1 // 0)
            ours.prefill(**batch, max_remain_ratio=0.3)
        same(ours.prefill(**batch, max_remain_ratio=0.3), wanted)


def test_memory_is_kept_for_the_next_prompt() -> None:
    batch, _ = make_batch(ROWS)
    short, _ = make_batch([[3, (2, 2)]])
    with device() as here:
        ours = here.model()
        memory = ours.engine.workspace
        assert memory.kept == 0
        ours.prefill(**batch)
        kept = memory.kept
        pieces = {piece.held.data_ptr() for piece in memory._idle._kept.values()}
        assert kept > 0
        for inputs in (short, batch):
            ours.prefill(**inputs)
            assert memory.kept == kept
            assert pieces == {piece.held.data_ptr() for piece in memory._idle._kept.values()}


def test_a_prompt_beyond_the_limit_has_memory_of_its_own(model: glimpse.GlimpseModel) -> None:
    batch, _ = make_batch(ROWS)
    wanted = model.prefill(**batch)
    with device() as here:
        ours = here.model()
        ours.engine.workspace = PrefillMemory(ours.base.decoder, limit=40_000)
        for _ in range(2):
            same(ours.prefill(**batch), wanted)
            assert ours.engine.workspace.kept <= 40_000


def test_a_cpu_keeps_nothing(model: glimpse.GlimpseModel) -> None:
    model.prefill(**make_batch(ROWS)[0])
    assert model.engine.workspace.kept == 0


def test_wide_rows_go_through_the_mlp_piece_by_piece(
    model: glimpse.GlimpseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, _ = make_batch(ROWS)
    wanted = model.prefill(**batch)
    monkeypatch.setattr(linear, "MLP_ROWS", 13)
    with device() as here:
        same(here.model().prefill(**batch), wanted)
    assert linear.mlp_rows(27, torch.device("cuda")) == 9 and linear.mlp_rows(27, torch.device("cpu")) == 27
    same(model.prefill(**batch), wanted, atol=0)


def test_many_pictures_go_through_the_tower_in_several_passes(
    model: glimpse.GlimpseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert vision._passes([(1, 2, 2)] * 3) == [((1, 2, 2),) * 3]
    monkeypatch.setattr(vision, "MOST_PATCHES", 300)  # the pictures have 60, 4, 48 and 252
    grids = [(1, 6, 10), (1, 2, 2), (1, 12, 4), (1, 18, 14)]
    assert vision._passes(grids) == [tuple(grids[:3]), (grids[3],)]
    assert vision._passes(grids[3:] + grids) == [(grids[3],), tuple(grids[:3]), (grids[3],)]
    batch, _ = make_batch(ROWS)
    wanted = model.prefill(**batch)
    with device() as here:
        same(here.model().prefill(**batch), wanted)


def test_where_patches_lie_follows_from_the_grids_alone(
    model: glimpse.GlimpseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, cpu = model.base.config.vision, torch.device("cpu")
    grids = ((1, 6, 10), (2, 4, 4), (1, 2, 2))
    wanted = layout.vision_layout(grids, config, cpu)
    assert layout.vision_layout(grids, config, cpu) is wanted
    with device() as here:
        place = torch.device("cuda", 0)
        found = layout.vision_layout(grids, config, place)
        assert not here.waits and found is layout.vision_layout(grids, config, place)
        for field in dataclasses.fields(found):
            ours, theirs = getattr(found, field.name), getattr(wanted, field.name)
            if isinstance(theirs, torch.Tensor):
                assert ours.device == place and torch.equal(ours.cpu(), theirs)
            else:
                assert ours == theirs
        monkeypatch.setattr(layout, "KEPT_PATCHES", wanted.patches)
        other = layout.vision_layout(grids[::-1], config, place)
        assert layout.vision_layout(grids[::-1], config, place) is other
        assert layout.vision_layout(grids, config, place) is not found
        monkeypatch.setattr(layout, "KEPT_PATCHES", wanted.patches - 1)
        assert layout.vision_layout(grids, config, place) is not layout.vision_layout(grids, config, place)

# SPDX-License-Identifier: Apache-2.0
"""Plans of several stages on a GPU that is none: what the CPU says, token for token, and the host waits only where scores decide
how many rows go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import glimpse_runtime as glimpse
from glimpse_runtime import plans
from glimpse_runtime.engine import Engine
from glimpse_runtime.plan import PrunePlan, Stage
from glimpse_runtime.stages.budget import Budget
from glimpse_runtime.stages.mergers import IntoNearest
from glimpse_runtime.stages.places import Layer, LayerInput, Vision
from glimpse_runtime.stages.scorers import ReceivedAttention
from glimpse_runtime.stages.selectors import FarthestPoints, Share, TopK
from tests.graph_tape import TapeCapture

from .conftest import make_batch
from .on_stand_in import COUNT, Device, device
from .test_prefill import same
from .test_stages import SEEN, STAGED, rows_at

NEW = 5
Make = Callable[[glimpse.GlimpseModel], PrunePlan]

UNSURE = Stage(Vision(), Budget(threshold=0.502, min_remain_num=2), ReceivedAttention())
"""How many tokens stay depends on their scores: sums of probabilities, about 1."""

METHODS: dict[str, tuple[Make, int]] = {
    "cdpruner": (lambda model: plans.cdpruner(0.3), 0),
    "divprune": (lambda model: plans.divprune(0.3), 1),  # those picked may be picked again
    "fastervlm": (lambda model: plans.fastervlm(0.4), 0),
    "fastv": (lambda model: plans.fastv(), 0),
    "glimpse": (lambda model: model.plan, 1),  # no cap
    "gprune": (lambda model: plans.gprune(0.4), 0),
    "pyramiddrop": (lambda model: plans.pyramiddrop(layers=(1, 3, 4)), 0),
    "sparsevlm": (lambda model: plans.sparsevlm(layers=(1, 2, 4), heads=2), 0),
    "visionzip": (lambda model: plans.visionzip(0.4, 0.1), 0),
    "vispruner": (lambda model: plans.vispruner(0.4, per_round=2), 0),
    "vscan": (lambda model: plans.vscan(0.5), 0),
}
"""A plan of each method, and how often the host has to wait for a number."""


def staged(*stages: Stage, glance: bool = False) -> Make:
    return lambda model: PrunePlan("staged", (*stages, *(model.plan.stages if glance else ())))


OTHERS: dict[str, tuple[Make, int]] = {
    **{f"decoder: {name}": (staged(*stages), 0) for name, (stages, _) in STAGED.items()},
    **{f"vision: {name}": (staged(stage), 0) for name, stage in SEEN.items()},
    **{
        f"{name}, later": (staged(SEEN[name], rows_at(LayerInput(3), 0.5)), 0)
        for name in ("renumbered", "contextual")
    },
    **{f"{name}, then glimpse": (staged(stage, glance=True), 1) for name, stage in SEEN.items()},
    "divprune, not twice": (lambda model: plans.divprune(0.3, repeat=False), 0),
    "divprune, then glimpse": (
        lambda model: plans.cascade(plans.divprune(0.5), model.plan),
        2,
    ),
    "divprune, then fastv": (lambda model: plans.cascade(plans.divprune(0.5), plans.fastv(3)), 1),
    "fastv, then glimpse": (staged(rows_at(Layer(0), 0.5), glance=True), 1),
    "glimpse, then fastv": (
        lambda model: PrunePlan("staged", (*model.plan.stages, rows_at(LayerInput(5), 0.5))),
        1,
    ),
    "unsure": (staged(UNSURE), 1),
    "unsure, then fastv": (staged(UNSURE, rows_at(Layer(2), 0.5)), 1),
    "unsure, then unsure": (
        staged(UNSURE, Stage(Vision(), FarthestPoints(Share(0.5), repeat=True)), rows_at(Layer(2), 0.5)),
        2,
    ),
    "merged, then merged": (
        staged(
            Stage(Vision(), TopK(Share(0.7)), ReceivedAttention(), IntoNearest()),
            Stage(
                Vision(), TopK(Share(0.5)), ReceivedAttention(), IntoNearest("target_plus_mean", keys_of=-1)
            ),
            rows_at(LayerInput(0), 0.8),
            rows_at(Layer(5), 0.5),
        ),
        0,
    ),
}
PLANS = {**METHODS, **OTHERS}

FEW = [[3, (2, 2), 1], [2], [1, (1, 1), 2]]
MORE = [[4, (5, 6), 3, (2, 2), 6], [9], [1, (4, 4), 2]]
MANY = [[1, (9, 7), 2], [2, (1, 1), 3, (6, 5), 4], [7]]


def tails(model: glimpse.GlimpseModel) -> list[tuple[int, Any]]:
    """The first layer and the tape of each piece of captured work behind a last stage."""
    return [(key[1], tape) for key, tape in model.engine.graphs._held.items() if key[0] == "tail"]  # type: ignore[index]


def fixed(here: Device) -> glimpse.GlimpseModel:
    """A model whose pool is large enough from the beginning: what is captured on it stays."""
    ours = here.model()
    ours.engine = Engine(ours.base.decoder, capture=TapeCapture(), kv_bytes=1 << 23)
    return ours


def cut(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the last token of each prompt, the end of a picture: they end with one of its tokens."""
    return {**inputs, **{name: inputs[name][:, :-1] for name in ("input_ids", "attention_mask")}}


def test_every_method_is_here() -> None:
    assert sorted(METHODS) == sorted(plans.names())


@pytest.mark.parametrize("name", PLANS)
def test_as_on_the_cpu(model: glimpse.GlimpseModel, name: str) -> None:
    """Captured with a few rows, replayed with more of them and with others."""
    make, waits = PLANS[name]
    batches = [make_batch(rows, seed=seed)[0] for seed, rows in enumerate([FEW, MORE, MANY, FEW])]
    wanted = [model.prefill(**batch, plan=make(model)) for batch in batches]
    said = [theirs.decode(NEW)[0].tolist() for theirs in wanted]
    with device() as here:
        ours = fixed(here)
        plan = make(ours)
        for batch, theirs, tokens in zip(batches, wanted, said, strict=True):
            here.waits.clear()
            with here.gpu.nothing_waits():
                found = ours.prefill(**batch, plan=plan)
            assert here.waits == [COUNT] * waits
            same(found, theirs, atol=5e-5)
            for a, b in zip(found.pruning.stages, theirs.pruning.stages, strict=True):
                assert torch.equal(a.keep.cpu(), b.keep)
            here.waits.clear()
            with here.gpu.nothing_waits():
                told, _ = found.decode(NEW)
            assert not here.waits
            assert told.tolist() == tokens
        captured = tails(ours)
        last = plan.resolved(6).stages[-1].at
        first = 0 if isinstance(last, Vision) else int(last.index) + isinstance(last, Layer)
        assert {layer for layer, _ in captured} == ({first} if first < 6 else set())
        assert first == 6 or sum(1 + tape.replays for _, tape in captured) == 4 > len(captured)
        steps = [key for key in ours.engine.graphs._held if key[0] == "step"]  # type: ignore[index]
        assert len(steps) == 1


WHOLE = [
    *METHODS,
    "unsure, then unsure",
    "glimpse, then fastv",
    "renumbered, later",
    "decoder: evicted, then not",
]


@pytest.mark.parametrize("name", WHOLE)
def test_answers_are_those_of_the_cpu(model: glimpse.GlimpseModel, name: str) -> None:
    """Whole calls on a pool that grows; nothing is left in it."""
    make, waits = PLANS[name]
    options = {"max_new_tokens": NEW, "eos_token_id": None}
    batches = [make_batch(rows, seed=seed)[0] for seed, rows in enumerate([FEW, MANY, FEW])]
    wanted = [model.generate(**batch, **options, plan=make(model)) for batch in batches]
    with device() as here:
        ours = here.model(capture=TapeCapture())
        plan = make(ours)
        for batch, theirs in zip(batches, wanted, strict=True):
            here.waits.clear()
            with here.gpu.nothing_waits():
                found = ours.generate(**batch, **options, plan=plan)
            assert here.waits == [COUNT] * waits
            assert found.tolist() == theirs.tolist()
        pool = ours.engine.pool
        assert pool is not None and pool.runs.free == pool.blocks


ENDING = [*METHODS, "vision: distinct", "contextual, later", "unsure, then fastv", "glimpse, then fastv"]


@pytest.mark.parametrize("name", ENDING)
def test_prompts_that_end_with_a_picture(model: glimpse.GlimpseModel, name: str) -> None:
    """Alone, and below one that does not."""
    make, _ = PLANS[name]
    alone = cut(make_batch([[4, (3, 4), 3, (4, 2)]])[0])
    both = cut(make_batch([[3, (3, 3), 9], [4, (3, 4), 3, (4, 2)]], seed=1)[0])
    wanted = [model.prefill(**inputs, plan=make(model)) for inputs in (alone, both)]
    said = [theirs.decode(NEW)[0].tolist() for theirs in wanted]
    with device() as here:
        ours = fixed(here)
        for inputs, theirs, tokens in zip((alone, both), wanted, said, strict=True):
            assert all(stage.keep[-1] for stage in theirs.pruning.stages)
            with here.gpu.nothing_waits():
                found = ours.prefill(**inputs, plan=make(ours))
            same(found, theirs, atol=5e-5)
            with here.gpu.nothing_waits():
                told, _ = found.decode(NEW)
            assert told.tolist() == tokens


@pytest.mark.parametrize("name", ["fastv", "fastv, then glimpse", "vision: windows"])
def test_selection_later(model: glimpse.GlimpseModel, name: str) -> None:
    """Two prompts on their way at once: neither works in the other's memory."""
    make, _ = PLANS[name]
    batches = [make_batch(rows, seed=seed)[0] for seed, rows in enumerate([MORE, MANY])]
    wanted = [model.prefill(**batch, plan=make(model)) for batch in batches]
    with device() as here:
        ours = fixed(here)
        for _ in range(2):
            waiting = [ours.prefill(**batch, plan=make(ours), select=False) for batch in batches]
            for found, theirs in zip(reversed(waiting), reversed(wanted), strict=True):
                same(found.select(), theirs, atol=5e-5)
            del waiting, found


@pytest.mark.parametrize("name", ["fastv", "vscan", "unsure, then fastv"])
def test_text_alone(model: glimpse.GlimpseModel, name: str) -> None:
    """There is nothing to prune: layers are not captured, and there is one segment."""
    make, _ = PLANS[name]
    batch, _ = make_batch([[9], [4]])
    options = {"max_new_tokens": NEW, "eos_token_id": None}
    wanted = model.generate(**batch, **options, plan=None)
    with device() as here:
        ours = here.model(capture=TapeCapture())
        here.waits.clear()
        with here.gpu.nothing_waits():
            found = ours.generate(**batch, **options, plan=make(ours))
        assert found.tolist() == wanted.tolist() and not here.waits and not tails(ours)


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "visionzip", "vscan"])
def test_behind_a_warm_up_nothing_is_captured(model: glimpse.GlimpseModel, name: str) -> None:
    """By shorter prompts: all layers if the last stage was before the decoder, and steps over all segments."""
    make, _ = PLANS[name]
    options = {"max_new_tokens": NEW, "eos_token_id": None}
    _, alone = make_batch([[40, (18, 20), 60]])
    with device() as here:
        ours = here.model(capture=TapeCapture())
        plan = make(ours)
        report = ours.warmup(alone[0], plan=plan, max_new_tokens=NEW)
        pool, graphs = ours.engine.pool, list(ours.engine.graphs._held)
        kinds = [key[0] for key in graphs]  # type: ignore[index]
        assert report.graphs == len(graphs) and kinds.count("step") and kinds.count("tail") >= 3
        for rows in ([5, (3, 5), 7], [40, (12, 12), 60], [2, (18, 20), 9]):
            batch, _ = make_batch([rows])
            wanted = model.generate(**batch, **options, plan=make(model))
            with here.gpu.nothing_waits():
                found = ours.generate(**batch, **options, plan=plan)
            assert found.tolist() == wanted.tolist()
        assert set(ours.engine.graphs._held) == set(graphs) and ours.engine.pool is pool

# SPDX-License-Identifier: Apache-2.0
"""Plans of several stages against the slow way, and a row of a batch against the row alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from glimpse_kernels import vip, vip_conditions, vip_rotary
from glimpse_runtime.models.qwen2_5_vl.layout import vision_layout
from glimpse_runtime.plan import PrunePlan, Stage
from glimpse_runtime.stages.mergers import IntoNearest
from glimpse_runtime.stages.places import Layer, LayerInput, Vision
from glimpse_runtime.stages.scorers import LastRowAttention, ReceivedAttention
from glimpse_runtime.stages.selectors import (
    BestAndDistinct,
    DominantAndContextual,
    FarthestPoints,
    LocalThenGlobal,
    Share,
    TopK,
)
from glimpse_runtime.taps import Received, VisionTaps

from .conftest import make_batch
from .slow_way import Drop, slow_way
from .test_pruned import assert_same_row

ROW = [4, (5, 6), 3, (2, 2), 6]
SIZES = (30, 4)
ROWS = [ROW, [9], [2, (1, 1), 3, (6, 5), 4], [1, (9, 7), 2]]


def rows_at(place: Layer | LayerInput, ratio: float, **options: object) -> Stage:
    rotary = options.pop("rotary", True)
    of = options.pop("of", "current")
    return Stage(place, TopK(Share(ratio, of=of)), LastRowAttention(rotary=rotary), **options)  # type: ignore[arg-type]


def best(ratio: float, sizes: tuple[int, ...] = SIZES) -> Callable[[torch.Tensor], torch.Tensor]:
    """Of the tokens of each picture that are there, that share of the whole picture; ties to the lower index."""

    def keep(scores: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(len(scores), dtype=torch.bool)
        at = 0
        for size in sizes:
            own = scores[at : at + size]
            there = int((~own.isnan()).sum())
            count = max(1, int(ratio * there))
            order = torch.where(own.isnan(), -1.0, own).argsort(descending=True, stable=True)[:count]
            found[at + order] = True
            at += size
        return found

    return keep


STAGED = {
    "inside": ((rows_at(Layer(1), 0.5),), (Drop(2, best(0.5), layer=1),)),
    "before": ((rows_at(LayerInput(2), 0.5),), (Drop(2, best(0.5), layer=2),)),
    "first": ((rows_at(LayerInput(0), 0.5),), (Drop(0, best(0.5), layer=0),)),
    "no rotation": (
        (rows_at(LayerInput(2), 0.5, rotary=False),),
        (Drop(2, best(0.5), layer=2, rotary=False),),
    ),
    "inside, no rotation": (
        (rows_at(Layer(2), 0.3, rotary=False),),
        (Drop(3, best(0.3), layer=2, rotary=False),),
    ),
    "renumbered": (
        (rows_at(LayerInput(2), 0.5, positions="renumber"),),
        (Drop(2, best(0.5), renumber=True, layer=2),),
    ),
    "inside, renumbered": (
        (rows_at(Layer(2), 0.5, positions="renumber"),),
        (Drop(3, best(0.5), renumber=True, layer=2),),
    ),
    "three": (
        tuple(rows_at(LayerInput(k), 0.6, positions="renumber") for k in (1, 3, 4)),
        tuple(Drop(k, best(0.6), renumber=True, layer=k) for k in (1, 3, 4)),
    ),
    "neighbours": (
        (rows_at(Layer(1), 0.7), rows_at(LayerInput(2), 0.6), rows_at(Layer(2), 0.5)),
        (Drop(2, best(0.7), layer=1), Drop(2, best(0.6), layer=2), Drop(3, best(0.5), layer=2)),
    ),
    "evicted": (
        (rows_at(Layer(1), 0.6), rows_at(Layer(3), 0.5, evict_earlier=True)),
        (Drop(2, best(0.6), layer=1), Drop(4, best(0.5), layer=3)),
    ),
    "evicted, then not": (
        (rows_at(Layer(1), 0.6, evict_earlier=True), rows_at(LayerInput(4), 0.5)),
        (Drop(2, best(0.6), layer=1), Drop(4, best(0.5), layer=4)),
    ),
    "last layer": ((rows_at(Layer(-1), 0.5),), (Drop(6, best(0.5), layer=5),)),
    "last layer, evicted": ((rows_at(Layer(5), 0.5, evict_earlier=True),), (Drop(6, best(0.5), layer=5),)),
}


@pytest.mark.parametrize("name", STAGED)
def test_stages_in_the_decoder(model, hf_model, name):
    stages, drops = STAGED[name]
    plan = PrunePlan(name, stages)
    (inputs,) = make_batch([ROW])[1]
    result = model.prefill(**inputs, plan=plan, max_new_tokens=6)
    logits, kept, rows = slow_way(hf_model, inputs, drops)
    assert len(result.pruning.stages) == len(kept)
    for ours, theirs in zip(result.pruning.stages, kept, strict=True):
        assert torch.equal(ours.keep, theirs)
    torch.testing.assert_close(result.last_logits[0], logits, atol=1e-4, rtol=0)
    # What is in the pool: what came into a layer, or what its stage or a later one left of it.
    evicted = [number for number, stage in enumerate(stages) if stage.evict_earlier]
    for layer, came in enumerate(rows):
        stays = came
        if evicted and layer <= plan.resolved(6).stages[evicted[-1]].at.index:
            stays = int(kept[evicted[-1]].sum()) + inputs["input_ids"].shape[1] - sum(SIZES)
        assert result.kv(0, layer)[0].shape[0] == stays, layer
    # Decoding: every layer sees what it kept, at the positions that hold there.
    tokens, ours = result.decode(5)
    masks = [dataclasses.replace(drop, keep=keep) for drop, keep in zip(drops, kept, strict=True)]
    if not evicted:
        for step in range(1, 5):
            theirs, _, _ = slow_way(hf_model, inputs, masks, tokens[0, :step].tolist())
            torch.testing.assert_close(ours[0, step], theirs, atol=2e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", STAGED)
def test_row_of_a_batch_equals_row_alone(model, name, side):
    plan = PrunePlan(name, STAGED[name][0])
    batch, alone = make_batch(ROWS, side=side)
    together = model.prefill(**batch, plan=plan)
    singles = [model.prefill(**inputs, plan=plan) for inputs in alone]
    for row, single in enumerate(singles):
        own = [p for p in together.pruning if p.row == row]
        assert len(own) == len(single.pruning or ())
        for ours, theirs in zip(own, single.pruning or (), strict=True):
            assert torch.equal(ours.keep, theirs.keep)
        assert_same_row(together, row, single, 6)
    tokens, _ = together.decode(5)
    for row, single in enumerate(singles):
        assert tokens[row].tolist() == single.decode(5)[0][0].tolist()


SEEN = {
    "best": Stage(Vision(), TopK(Share(0.4)), ReceivedAttention()),
    "renumbered": Stage(Vision(), TopK(Share(0.4)), ReceivedAttention(), positions="renumber"),
    "distinct": Stage(Vision(), BestAndDistinct(Share(0.4), important=0.5), ReceivedAttention()),
    "farthest": Stage(Vision(), FarthestPoints(Share(0.4))),
    "windows": Stage(Vision(), LocalThenGlobal(Share(0.4)), ReceivedAttention(), IntoNearest()),
    "contextual": Stage(
        Vision(),
        DominantAndContextual(Share(0.3), Share(0.1)),
        ReceivedAttention(),
        IntoNearest("target_plus_mean", keys_of=-1),
    ),
}


def merged(
    stage: Stage, keep: torch.Tensor, scores: torch.Tensor | None, keys: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What becomes of visual embeddings, token by token."""

    def change(embeds: torch.Tensor) -> torch.Tensor:
        found, at = embeds.clone(), 0
        for size in SIZES:
            own = range(at, at + size)
            kept = [i for i in own if keep[i]]
            targets, metric = kept, embeds
            if isinstance(stage.select, DominantAndContextual):
                assert scores is not None
                best = sorted(own, key=lambda i: (-float(scores[i]), i))[: max(1, int(0.3 * size))]
                targets, metric = [i for i in kept if i not in best], keys
            like = torch.nn.functional.normalize(metric, dim=1)
            joined: dict[int, list[int]] = {}
            for i in own:
                if not keep[i] and targets:
                    joined.setdefault(max(targets, key=lambda j: (float(like[i] @ like[j]), -j)), []).append(
                        i
                    )
            for target, sources in joined.items():
                total = embeds[sources].sum(0)
                mean = stage.merge.how == "mean"  # type: ignore[union-attr]
                found[target] = (
                    (embeds[target] + total) / (1 + len(sources))
                    if mean
                    else embeds[target] + total / len(sources)
                )
            at += size
        return found

    return change


LATER = {
    "alone": ((), ()),
    "then inside": ((rows_at(Layer(2), 0.5),), (Drop(3, best(0.5), layer=2),)),
    "then before, renumbered": (
        (rows_at(LayerInput(3), 0.5, positions="renumber"),),
        (Drop(3, best(0.5), renumber=True, layer=3),),
    ),
}


@pytest.mark.parametrize("later", LATER)
@pytest.mark.parametrize("name", SEEN)
def test_stages_before_the_decoder(model, hf_model, name, later):
    first, (stages, drops) = SEEN[name], LATER[later]
    plan = PrunePlan(name, (first, *stages))
    (inputs,) = make_batch([ROW])[1]
    result = model.prefill(**inputs, plan=plan, max_new_tokens=6)
    outcome = result.pruning.stages[0]
    budgets = [max(1, int(0.4 * size)) for size in SIZES] if name != "contextual" else [9 + 3, 1 + 1]
    assert [int(own.sum()) for own in outcome.keep.split(SIZES)] == budgets
    layout = vision_layout(
        tuple(map(tuple, inputs["image_grid_thw"].tolist())), model.base.config.vision, model.device
    )
    tower = model.base.vision(inputs["pixel_values"], layout, VisionTaps(received=(Received(),), keys=(-1,)))
    if first.score is not None:
        torch.testing.assert_close(outcome.scores, tower.received[Received()], atol=1e-5, rtol=1e-4)
    change = merged(first, outcome.keep, outcome.scores, tower.keys[-1]) if first.merge else None
    drops = (Drop(0, outcome.keep, first.positions == "renumber", layer=-1), *drops)
    logits, kept, rows = slow_way(hf_model, inputs, drops, embeds_of=change)
    for ours, theirs in zip(result.pruning.stages, kept, strict=True):
        assert torch.equal(ours.keep, theirs)
    torch.testing.assert_close(result.last_logits[0], logits, atol=1e-4, rtol=0)
    assert [result.kv(0, layer)[0].shape[0] for layer in range(6)] == rows
    tokens, ours = result.decode(4)
    masks = [dataclasses.replace(drop, keep=keep) for drop, keep in zip(drops, kept, strict=True)]
    for step in range(1, 4):
        theirs, _, _ = slow_way(hf_model, inputs, masks, tokens[0, :step].tolist(), change)
        torch.testing.assert_close(ours[0, step], theirs, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", SEEN)
def test_row_of_a_batch_equals_row_alone_before_the_decoder(model, name):
    plan = PrunePlan(name, (SEEN[name], rows_at(LayerInput(2), 0.5)))
    batch, alone = make_batch(ROWS)
    together = model.prefill(**batch, plan=plan)
    for row, inputs in enumerate(alone):
        single = model.prefill(**inputs, plan=plan)
        own = [p.keep for p in together.pruning if p.row == row]
        assert all(map(torch.equal, own, [p.keep for p in single.pruning or ()]))
        assert_same_row(together, row, single, 6)


@pytest.mark.parametrize("first", [*SEEN, "fastv"])
def test_cascade_into_a_glimpse(model, first):
    """The glimpse's scores of the tokens that are left are those of the predictor on these tokens alone."""
    stage = SEEN.get(first, rows_at(Layer(1), 0.5))
    plan = PrunePlan(f"{first}+glimpse", (stage, *model.plan.stages))
    batch, alone = make_batch(ROWS)
    together = model.prefill(**batch, plan=plan, max_remain_ratio=0.5)
    for row, inputs in enumerate(alone):
        single = model.prefill(**inputs, plan=plan, max_remain_ratio=0.5)
        own = [p.keep for p in together.pruning if p.row == row]
        assert all(map(torch.equal, own, [p.keep for p in single.pruning or ()]))
        assert_same_row(together, row, single, 6)
    before, after = together.pruning.stages
    assert not bool((after.keep & ~before.keep).any()) and 0 < after.keep.sum() < before.keep.sum()
    assert torch.equal(after.scores.isnan(), ~before.keep)
    tokens, _ = together.decode(4)
    assert (
        tokens[0].tolist()
        == model.prefill(**alone[0], plan=plan, max_remain_ratio=0.5).decode(4)[0][0].tolist()
    )


def test_a_first_stage_that_keeps_everything_changes_nothing(model, golden_inputs):
    inputs = golden_inputs("two_images")
    plain = model.prefill(**inputs)
    plan = PrunePlan(
        "all+glimpse", (Stage(Vision(), TopK(Share(1.0)), ReceivedAttention()), *model.plan.stages)
    )
    cascade = model.prefill(**inputs, plan=plan)
    torch.testing.assert_close(cascade.scores, plain.scores, atol=2e-5, rtol=0)
    torch.testing.assert_close(cascade.last_logits, plain.last_logits, atol=2e-5, rtol=0)


def test_the_predictor_sees_the_tokens_that_are_left(model):
    """Its conditions, positions and frames, gathered on the host."""
    batch, _ = make_batch([ROW])
    plan = PrunePlan("thinned", (SEEN["best"], *model.plan.stages))
    result = model.prefill(**batch, plan=plan)
    keep = result.pruning.stages[0].keep
    scorer = model.plan.glance
    layout = vision_layout(
        tuple(map(tuple, batch["image_grid_thw"].tolist())), model.base.config.vision, model.device
    )
    taps = model.base.vision(batch["pixel_values"], layout, scorer.taps).hidden
    left = keep.nonzero().flatten()
    counts = [int(own.sum()) for own in keep.split(SIZES)]
    cu = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    weights = scorer.modules.vip
    conditions = vip_conditions([taps[block][left] for block in scorer.taps.hidden], weights)
    cos, sin = vip_rotary(layout.rows[left], layout.cols[left], weights.qk_dim, weights.theta)
    wanted = vip(torch.cat(result.glimpse_scores, dim=1), conditions, weights, cu, cos, sin)
    torch.testing.assert_close(result.pruning.stages[1].scores[left], wanted, atol=1e-5, rtol=1e-5)

# SPDX-License-Identifier: Apache-2.0
"""Pruning: batches, the stage inside its layer, given masks, delayed selection."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import glimpse_runtime as glimpse

from .conftest import for_hf, make_batch

ROWS = [[5, (3, 5), 7], [9], [2, (1, 1), 3, (6, 2), 4], [1, (9, 7), 2]]


def assert_same_row(batch_result, row, alone_result, layers):
    torch.testing.assert_close(batch_result.last_logits[row], alone_result.last_logits[0], atol=2e-5, rtol=0)
    torch.testing.assert_close(
        batch_result.kept_positions[row], alone_result.kept_positions[0], atol=0, rtol=0
    )
    for layer in range(layers):
        for ours, theirs in zip(batch_result.kv(row, layer), alone_result.kv(0, layer), strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"max_remain_ratio": 0.3}, {"threshold": 1.0, "min_remain_num": 0}])
def test_row_of_a_batch_equals_row_alone(model, side, options):
    batch, alone = make_batch(ROWS, side=side)
    together = model.prefill(**batch, **options)
    for row, inputs in enumerate(alone):
        single = model.prefill(**inputs, **options)
        own = [p for p in together.pruning or () if p.row == row]
        assert len(own) == len(single.pruning or ())
        for ours, theirs in zip(own, single.pruning or (), strict=True):
            assert torch.equal(ours.keep, theirs.keep)
            torch.testing.assert_close(ours.logits, theirs.logits, atol=2e-5, rtol=0)
        assert_same_row(together, row, single, model.base.config.text.num_layers)
    tokens, _ = together.decode(5)
    for row, inputs in enumerate(alone):
        assert tokens[row].tolist() == model.prefill(**inputs, **options).decode(5)[0][0].tolist()


pictures = st.tuples(st.integers(1, 6), st.integers(1, 6))
prompts = st.lists(st.one_of(st.integers(1, 4), pictures), min_size=0, max_size=3).map(lambda r: [1, *r, 2])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(prompts, min_size=1, max_size=3),
    side=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 99),
    mask=st.sampled_from(["all", "none", "random", "predicted"]),
)
def test_any_packing(model, rows, side, seed, mask):
    batch, alone = make_batch(rows, side=side, seed=seed)
    tokens = [sum(h * w for h, w in (s for s in r if isinstance(s, tuple))) for r in rows]
    generator = torch.Generator().manual_seed(seed)
    keep = {"all": torch.ones, "none": torch.zeros}.get(
        mask, lambda n: torch.randint(0, 2, (n,), generator=generator)
    )(sum(tokens))
    options = {} if mask == "predicted" else {"min_remain_num": 0}
    together = model.prefill(**batch, **options, **({} if mask == "predicted" else {"ref_masks": keep}))
    at = 0
    for row, inputs in enumerate(alone):
        own = keep[at : at + tokens[row]]
        at += tokens[row]
        single = model.prefill(**inputs, **options, **({} if mask == "predicted" else {"ref_masks": own}))
        assert_same_row(together, row, single, 2)
        if mask != "predicted":
            text = inputs["input_ids"].shape[1] - tokens[row]
            assert single.kept_positions[0].shape[1] == text + int(own.sum())


@pytest.mark.parametrize("stage_layer", [0, 3, 5, 77])
def test_pruning_inside_the_layer_equals_finishing_it_and_dropping_afterwards(model, hf_model, stage_layer):
    """The slow way in transformers' own layers: all rows through layer K, drop, the rest through the others."""
    import dataclasses

    inputs = make_batch([[4, (5, 6), 3, (2, 2), 6]])[0]
    generator = torch.Generator().manual_seed(1)
    keep = torch.randint(0, 2, (34,), generator=generator).bool()
    stage = dataclasses.replace(model.plan.stages[0], at=glimpse.Layer(stage_layer))
    if stage_layer < 3:
        with pytest.raises(glimpse.GlimpseError, match="scores are read in layers"):
            glimpse.PrunePlan("too early", (stage,))
    plan = glimpse.PrunePlan("given", (dataclasses.replace(stage, score=None),))
    result = model.prefill(**inputs, plan=plan, ref_masks=keep, min_remain_num=0)

    core, text = hf_model.model, hf_model.model.language_model
    ids, hf_inputs = inputs["input_ids"], for_hf(inputs)
    with torch.inference_mode():
        embeds = text.embed_tokens(ids)
        seen = core.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        embeds[ids == 606] = seen
        positions, _ = core.get_rope_index(
            ids,
            hf_inputs["mm_token_type_ids"],
            inputs["image_grid_thw"],
            attention_mask=inputs["attention_mask"],
        )
        rows = torch.ones(ids.shape[1], dtype=torch.bool)
        rows[ids[0] == 606] = keep
        hidden, last = embeds, len(text.layers) - 1
        for number, layer in enumerate(text.layers):
            rotary = text.rotary_emb(hidden, positions)
            length = hidden.shape[1]
            causal = torch.full((length, length), float("-inf")).triu(1)[None, None]
            hidden = layer(hidden, attention_mask=causal, position_embeddings=rotary, position_ids=None)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            if number == min(stage_layer, last):
                hidden, positions = hidden[:, rows], positions[:, :, rows]
        logits = hf_model.lm_head(text.norm(hidden))[0, -1]
    torch.testing.assert_close(result.last_logits[0], logits, atol=1e-4, rtol=0)
    assert torch.equal(result.kept_positions[0], positions[:, 0])
    assert torch.equal(torch.cat([p.keep.flatten() for p in result.pruning]), keep)


def test_all_tokens_kept_is_the_plain_model(model, golden_inputs):
    inputs = golden_inputs("two_images")
    plain = model.prefill(**inputs, plan=None)
    kept = model.prefill(**inputs, threshold=0.0)
    assert kept.pruning.kept == kept.pruning.total == 45
    torch.testing.assert_close(kept.last_logits, plain.last_logits, atol=2e-5, rtol=0)
    for layer in range(6):
        for ours, theirs in zip(kept.kv(0, layer), plain.kv(0, layer), strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_delayed_selection(model, golden_inputs):
    inputs = golden_inputs("wide_5x11")
    at_once = model.prefill(**inputs)
    waiting = model.prefill(**inputs, select=False)
    for attribute in ("last_logits", "pruning", "kept_positions"):
        with pytest.raises(glimpse.GlimpseError, match="waits for select"):
            getattr(waiting, attribute)
    done = waiting.select()
    torch.testing.assert_close(done.last_logits, at_once.last_logits, atol=0, rtol=0)
    with pytest.raises(glimpse.GlimpseError, match="was not selected yet"):
        done.select()
    mask = torch.cat([p.keep.flatten() for p in at_once.pruning])
    by_mask = model.prefill(**inputs, select=False).select([p.keep for p in at_once.pruning])
    assert torch.equal(torch.cat([p.keep.flatten() for p in by_mask.pruning]), mask)
    torch.testing.assert_close(by_mask.last_logits, at_once.last_logits, atol=0, rtol=0)
    with pytest.raises(glimpse.GlimpseError, match="expected 55 values"):
        model.prefill(**inputs, select=False).select(mask[:-1])


def test_budgets_per_picture(model, golden_inputs):
    inputs = golden_inputs("two_images")
    plan = model.plan.with_budget(group="picture", max_remain_ratio=0.1, threshold=0.0)
    assert [p.kept for p in model.prefill(**inputs, plan=plan).pruning] == [2, 2]  # of 24 and 21
    everything = model.prefill(**inputs, min_remain_num=1000, threshold=1.0)
    assert everything.pruning.kept == 45


def test_anchors_of_several_pictures(model, golden_inputs):
    result = model.prefill(
        **golden_inputs("two_images"), threshold=1.0, min_remain_num=0, anchor_positions=["tl", "br"]
    )
    for picture in result.pruning:
        assert picture.keep.nonzero().tolist() == [[0, 0], [picture.grid[0] - 1, picture.grid[1] - 1]]


def test_decoding_continues_from_the_original_positions(model, golden_inputs):
    """The rotated key of the first generated token carries the position after the whole prompt."""
    inputs = golden_inputs("square_8x8")
    result = model.prefill(**inputs, max_remain_ratio=0.05)
    plain = model.prefill(**inputs, plan=None)
    assert result.kept_positions[0][0, -1] == plain.kept_positions[0][0, -1]
    assert torch.equal(result._state.batch.next_positions, plain._state.batch.next_positions)


def test_video_slices_have_their_own_budget(model):
    ids = torch.tensor([[5, 9, 603, *[607] * 12, 604, 603, *[606] * 4, 604, 17]])
    generator = torch.Generator().manual_seed(0)
    result = model.prefill(
        ids,
        pixel_values_videos=torch.randn(48, 1176, generator=generator),
        video_grid_thw=torch.tensor([[2, 4, 6]]),
        pixel_values=torch.randn(16, 1176, generator=generator),
        image_grid_thw=torch.tensor([[1, 4, 4]]),
        threshold=0.0,
        max_remain_ratio=0.5,
    )
    assert [(p.kind, p.frame, p.kept, p.total) for p in result.pruning] == [
        ("video", 0, 3, 6),
        ("video", 1, 3, 6),
        ("image", 0, 2, 4),
    ]

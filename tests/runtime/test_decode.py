# SPDX-License-Identifier: Apache-2.0
"""The decoding loop: a replayed step is the step, and what it hands out belongs to the caller."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch

import glimpse_runtime as glimpse
from glimpse_kernels import force_backend, quantize_int8, recording
from glimpse_runtime import decode, device_decode, sampling
from glimpse_runtime.cache import BLOCK_SIZE
from glimpse_runtime.decode import CHUNK, DecodeLoop
from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.models.qwen2_5_vl.linear import GatedLinear, Linear, LinearGroup

from .conftest import GOLDEN, for_hf, make_batch

ROWS = [[5, (3, 5), 7], [3], [9, (2, 2), 4, (4, 3), 2]]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def either(request):
    return glimpse.GlimpseModel.from_pretrained(GOLDEN / "base", GOLDEN / "gp_v1", dtype=request.param)


def loop_of(model, inputs, room, plan="default", record=True):
    """A loop behind a finished prefill, and the first tokens."""
    state = model.prefill(**inputs, plan=plan, max_new_tokens=room)._state
    loop = DecodeLoop(state.decoder, state.leases, state.next_positions, room, record=record)
    return loop, state.last_logits.argmax(-1)


def can_record(model):
    return recording.available("cpu", model.dtype, decode._OPS)


@torch.no_grad()
def test_recorded_steps_are_the_eager_ones_over_block_and_chunk_borders(either):
    steps = CHUNK + 2 * BLOCK_SIZE + 3
    batch, _ = make_batch(ROWS)
    (recorded, tokens), (eager, other) = (
        loop_of(either, batch, steps, record=record) for record in (True, False)
    )
    assert torch.equal(tokens, other)
    for step in range(steps):
        logits, expected = recorded.step(tokens), eager.step(tokens)
        assert torch.equal(logits, expected), step
        assert torch.equal(recorded.lengths, eager.lengths)
        tokens = (logits.argmax(-1) + step) % 600  # not only what the model says, which soon repeats
        if step in (3, CHUNK + 1):
            finished = torch.arange(3) == (0 if step == 3 else 2)
            recorded.retire(finished)
            eager.retire(finished)
    assert (recorded.recording is not None) == can_record(either) and eager.recording is None
    for row, length in enumerate(eager.lengths[0].tolist()):
        for layer in range(6):
            a, b = (torch.stack(loop.leases[0].rows(row, layer, length)) for loop in (recorded, eager))
            assert torch.equal(a, b)


@torch.no_grad()
def test_steps_give_the_logits_of_transformers(model, hf_model):
    """From the first token of each row on, over a block border, fed with tokens of our choice."""
    batch, _ = make_batch([[5, (3, 5), 7], [3, (2, 2), 4]])
    loop, _ = loop_of(model, batch, 40, plan=None)
    fed = torch.randint(0, 600, (2, 40), generator=torch.Generator().manual_seed(5))
    prompt = batch["input_ids"].shape[1]
    longer = {**batch, "input_ids": torch.cat([batch["input_ids"], fed], 1)}
    longer["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(fed)], 1)
    expected = hf_model(**for_hf(longer)).logits
    for step in range(40):
        logits = loop.step(fed[:, step])
        torch.testing.assert_close(logits, expected[:, prompt + step], atol=2e-4, rtol=0)


@torch.no_grad()
def test_a_retired_row_keeps_its_cache_and_changes_no_other(model):
    batch, alone = make_batch(ROWS)
    loop, tokens = loop_of(model, batch, 8)
    solo, solo_tokens = loop_of(model, alone[2], 8)
    loop.step(tokens), solo.step(solo_tokens)
    lease, length = loop.leases[0], int(loop.lengths[0, 1])
    for layer in range(6):
        lease.rows(1, layer, length + 4)[0][length:] = 7.0
    before = [lease.rows(1, layer, length + 4)[0].clone() for layer in range(6)]
    loop.retire(torch.tensor([False, True, False]))
    lengths = loop.lengths.clone()
    for _ in range(4):
        together, single = loop.step(tokens), solo.step(tokens[2:])
        torch.testing.assert_close(together[2:], single, atol=1e-4, rtol=0)
    assert (loop.lengths - lengths).tolist() == [[4, 0, 4]]
    for layer, rows in enumerate(before):
        assert torch.equal(lease.rows(1, layer, length + 4)[0], rows)


@torch.no_grad()
def test_logits_of_a_step_are_the_callers_own(model):
    batch, _ = make_batch(ROWS)
    loop, tokens = loop_of(model, batch, 5)
    handed, copies = [], []
    for _ in range(4):
        handed.append(loop.step(tokens))
        copies.append(handed[-1].clone())
        handed[-1][0, 0] += 1.0  # and writing to it changes nothing of the loop
        copies[-1][0, 0] += 1.0
        tokens = handed[-1].argmax(-1)
    for a, b in zip(handed, copies, strict=True):
        assert torch.equal(a, b)
    view = loop.advance(tokens)
    assert view.data_ptr() not in {h.data_ptr() for h in handed}


@pytest.mark.parametrize("kept", ["output_logits", "output_scores"])
def test_kept_logits_are_not_overwritten(either, golden_inputs, kept):
    inputs = golden_inputs("square_8x8")
    options = {"max_new_tokens": 6, "eos_token_id": None}
    out = either.generate(**inputs, **options, return_dict_in_generate=True, **{kept: True})
    tokens, logits = either.prefill(**inputs, max_new_tokens=6).decode(6)
    assert torch.equal(out.sequences[:, -6:], tokens)
    found = torch.stack(out[kept.removeprefix("output_")], 1)
    assert torch.equal(found, logits.float())
    assert torch.equal(either.generate(**inputs, **options), out.sequences)


@torch.no_grad()
def test_a_full_pool_is_an_error(model):
    batch, _ = make_batch(ROWS)
    loop, tokens = loop_of(model, batch, 2)
    loop.step(tokens), loop.step(tokens)
    with pytest.raises(GlimpseError, match="pool is full"):
        loop.step(tokens)


@torch.no_grad()
def test_without_compiled_kernels_the_same_steps_run_op_by_op(model):
    batch, _ = make_batch(ROWS)
    want, tokens = loop_of(model, batch, 4)
    expected = [want.step(tokens) for _ in range(3)]
    with force_backend("naive"):
        loop, same = loop_of(model, batch, 4)
        assert torch.equal(tokens, same)
        for logits in expected:
            torch.testing.assert_close(loop.step(tokens), logits, atol=1e-4, rtol=0)
        assert loop.recording is None


@torch.no_grad()
def test_a_batch_whose_products_no_recording_sees_runs_op_by_op(monkeypatch):
    """Many bf16 rows are torch's where it has AMX tiles: replaying what was recorded would leave these products out."""
    monkeypatch.setattr(importlib.import_module("glimpse_kernels.linear.cpu"), "_has_amx", lambda: True)
    model = glimpse.GlimpseModel.from_pretrained(GOLDEN / "base", dtype=torch.bfloat16)
    batch, alone = make_batch([[5 + n] for n in range(20)])
    loop, tokens = loop_of(model, batch, 4)
    solo, own = loop_of(model, alone[7], 4)
    for _ in range(3):
        logits, expected = loop.step(tokens), solo.step(own)
        torch.testing.assert_close(logits[7:8], expected, atol=0.2, rtol=0)
        tokens, own = logits.argmax(-1), expected.argmax(-1)
        tokens[7] = own[0]
    assert loop.recording is None


def test_generate_is_the_same_with_and_without_recordings(either, monkeypatch):
    batch, _ = make_batch(ROWS)
    options = {"max_new_tokens": 50, "eos_token_id": [7, 11, 13, 17, 19], "pad_token_id": 600}
    replayed = either.generate(**batch, **options)
    loops = []

    def eager(*args, **kwargs):
        loops.append(DecodeLoop(*args, record=False, **kwargs))
        return loops[-1]

    monkeypatch.setattr(device_decode, "DecodeLoop", eager)
    assert torch.equal(either.generate(**batch, **options), replayed)
    assert loops and loops[0].recording is None


def test_greedy_takes_the_first_of_equal_scores_and_nan_before_all():
    generator = torch.Generator().manual_seed(3)
    for vocabulary in (1, 7, 640, 5000):
        scores = torch.randint(-3, 4, (3, vocabulary), generator=generator).float()
        first = [row.index(max(row)) for row in scores.tolist()]
        found = sampling.pick(scores, sample=False)
        assert found.tolist() == first and found.dtype is torch.int64
        assert sampling.pick(scores.bfloat16(), sample=False).tolist() == first
    scores[1, 77] = float("nan")  # as torch and Hugging Face have it
    assert sampling.pick(scores, sample=False).tolist() == [first[0], 77, first[2]]
    assert sampling.pick(scores.masked_fill(scores < 9, float("-inf")), sample=False)[0] == 0


@torch.no_grad()
def test_recorded_steps_with_8_bit_weights(either):
    def small(part):
        return Linear(quantize_int8(part.weight, 64), part.bias)

    whole = either.base.decoder
    layers = [
        dataclasses.replace(
            layer,
            qkv=LinearGroup([small(part) for part in layer.qkv.parts]),
            o_proj=small(layer.o_proj),
            gated=GatedLinear(small(layer.gated.gate), small(layer.gated.up)),
            down=small(layer.down),
        )
        for layer in whole.layers
    ]
    decoder = dataclasses.replace(whole, layers=tuple(layers), lm_head=small(whole.lm_head))
    batch, _ = make_batch(ROWS)
    loops = []
    for record in (True, False):
        state = either.prefill(**batch, max_new_tokens=8)._state
        loops.append(DecodeLoop(decoder, state.leases, state.next_positions, 8, record=record))
    tokens = torch.tensor([3, 4, 5])
    for _ in range(8):
        logits, expected = (loop.step(tokens) for loop in loops)
        assert torch.equal(logits, expected)
        tokens = logits.argmax(-1)
    assert (loops[0].recording is not None) == can_record(either)

# SPDX-License-Identifier: Apache-2.0
"""`generate` on a GPU that is none: token for token what the CPU says, and the host only reads what it has to."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessor
from transformers.generation import BaseStreamer, StoppingCriteria

from glimpse_runtime.device_decode import LAG
from tests.graph_tape import TapeCapture

from .conftest import make_batch
from .on_stand_in import device

ROWS = [[5, (3, 5), 7], [3], [9, (2, 2), 4, (4, 3), 2]]


class OnStandIn:
    """A model whose calls alone are made on the stand-in: what they are compared with runs as always."""

    def __init__(self, **options):
        with device() as here:
            self._model = here.model(**options)

    def generate(self, *args, **kwargs):
        with device():
            return self._model.generate(*args, **kwargs)

    @property
    def graphs(self):
        return self._model.engine.graphs

    @property
    def generation(self):
        return self._model.engine.pool.generation


@pytest.fixture(scope="module")
def gpu():
    """It keeps what it captured from test to test, as a real one would."""
    return OnStandIn(capture=TapeCapture())


@pytest.fixture(scope="module")
def free(model):
    """What the CPU says to `ROWS` without end tokens: `[3, prompt + 9]`."""
    return model.generate(**make_batch(ROWS)[0], max_new_tokens=9, eos_token_id=None)


def adopted(x):
    """What a tensor of the stand-in holds, outside of it."""
    return x.held


class Reader(BaseStreamer):
    """Keeps what comes, when, and how far the device was then."""

    def __init__(self):
        self.seen, self.ended = [], False

    def put(self, value):
        assert not self.ended and value.device.type == "cpu"
        self.seen.append(value.tolist())

    def end(self):
        self.ended = True


def ends_at(free, prompt, *places):
    """End tokens that let row r end at its token number p, for each (r, p)."""
    return [int(free[row, prompt + place]) for row, place in places]


def picks(model):
    return [key for key in model.graphs._held if key[0] == "pick"]


CALLS = {
    "plain": {"eos_token_id": None, "max_new_tokens": 9},
    "one token": {"eos_token_id": None, "max_new_tokens": 1},
    "one more than the device is ahead": {"eos_token_id": None, "max_new_tokens": LAG + 1},
    "no plan": {"eos_token_id": None, "max_new_tokens": 5, "plan": None},
    "default end": {"max_new_tokens": 6},
    "penalty": {"eos_token_id": None, "max_new_tokens": 6, "repetition_penalty": 1.5},
    "as checkpoints of Qwen2.5-VL ask": {"max_new_tokens": 6, "repetition_penalty": 1.05, "do_sample": True}
    | {"temperature": 1e-6},
    "penalty and no end yet": {"max_new_tokens": 5, "repetition_penalty": 1.4, "min_new_tokens": 4},
    "a few options": {"max_new_tokens": 5, "min_new_tokens": 2, "max_remain_ratio": 0.3},
}


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS.keys())
def test_tokens_are_those_of_the_cpu(model, gpu, options):
    batch, _ = make_batch(ROWS)
    expected = model.generate(**batch, **options)
    found = gpu.generate(**batch, **options)
    assert torch.equal(found, expected) and found.device.type == "cpu"


@pytest.mark.parametrize(
    "places",
    [[(0, 2), (1, 5), (2, 0)], [(0, 0), (1, 0), (2, 0)], [(0, 1), (2, 8)], [(1, 7)]],
    ids=["one by one", "all at the first token", "one goes on to the last", "one alone"],
)
@pytest.mark.parametrize("least", [0, 3])
def test_rows_that_end_at_different_steps(model, gpu, free, places, least):
    batch, _ = make_batch(ROWS)
    prompt = batch["input_ids"].shape[1]
    options = {"eos_token_id": ends_at(free, prompt, *places), "pad_token_id": 600, "max_new_tokens": 9}
    if least:
        options["min_new_tokens"] = least
    expected = model.generate(**batch, **options)
    reader = Reader()
    found = gpu.generate(**batch, **options, streamer=reader, return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected)
    assert found.timings.new_tokens == expected.shape[1] - prompt and 0 < found.timings.ttft
    assert reader.seen[0] == batch["input_ids"].tolist() and reader.ended
    assert reader.seen[1:] == expected[:, prompt:].T.tolist()
    assert (
        found.pruning.kept
        == model.generate(**batch, max_new_tokens=1, return_dict_in_generate=True).pruning.kept
    )


def test_end_tokens_without_a_pad_token(model, gpu, free):
    batch, _ = make_batch(ROWS)
    ends = ends_at(free, batch["input_ids"].shape[1], (0, 1), (1, 2))
    options = {"eos_token_id": ends, "max_new_tokens": 5, "pad_token_id": None, "plan": None}
    assert torch.equal(gpu.generate(**batch, **options), model.generate(**batch, **options))


def test_prompts_that_are_on_the_device_come_back_on_it(model, gpu):
    batch, _ = make_batch(ROWS[:1])
    with device():
        moved = {name: value.to("cuda") for name, value in batch.items()}
    expected = model.generate(**batch, max_new_tokens=4, eos_token_id=None)
    for options in ({}, {"repetition_penalty": 1.3}):
        found = gpu.generate(**moved, max_new_tokens=4, eos_token_id=None, **options)
        assert found.device.type == "cuda"
        if not options:
            assert torch.equal(adopted(found), expected)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6, "top_k": 0, "top_p": 0.8}, {"top_k": 4, "min_p": 0.1, "min_new_tokens": 2}],
    ids=["plain", "top_p", "top_k min_p"],
)
def test_sampling_is_reproducible_and_draws_as_torch_does(model, gpu, rows, options):
    """The same noise in the same order: with as many rows as lanes even the tokens are those of `torch.multinomial`."""
    batch, _ = make_batch(ROWS[:rows])
    found = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        found.append([gpu.generate(**batch, do_sample=True, max_new_tokens=5, **options) for _ in range(2)])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    if rows != 3:
        torch.manual_seed(1)
        expected = model.generate(**batch, do_sample=True, max_new_tokens=5, **options)
        assert torch.equal(found[0][0], expected)


def test_the_host_reads_the_ring_and_nothing_else():
    """Whole calls, captured and replayed: tokens come through page-locked memory, and nothing else is waited for."""
    batch, _ = make_batch(ROWS[:2])
    with device() as here:
        gpu = here.model(capture=TapeCapture())
        here.waits.clear()
        for options in ({}, {"do_sample": True, "top_p": 0.9}, {"repetition_penalty": 1.2}):
            for _ in range(2):  # captured, replayed
                with here.gpu.nothing_waits():
                    out = gpu.generate(**batch, max_new_tokens=4, max_remain_ratio=0.4, **options)
                assert out.shape[0] == 2 and not here.waits


def test_captured_short_replayed_long_and_the_other_way_round(model):
    """One capture of the layers for a bucket, of whatever length it was made."""
    gpu = OnStandIn(capture=TapeCapture())
    with device():
        gpu._model.engine.lease([8 * 32]).release()  # room for the longest, so that the pool stays
    for rows in ([[4]], [[40, (4, 6), 90]], [[9, (2, 2), 2]]):
        batch, _ = make_batch(rows)
        options = {"max_new_tokens": 5, "eos_token_id": None}
        assert torch.equal(gpu.generate(**batch, **options), model.generate(**batch, **options))
    assert sum(key[0] == "step" for key in gpu.graphs._held) == 1


def test_a_bucket_is_fixed_for_a_call(model):
    """Room for the new tokens counts from the start: 250 rows may become 260, and the wider table is there at once."""
    short, _ = make_batch([[250]])
    gpu = OnStandIn(capture=TapeCapture())
    for budget, width in ((4, 8), (9, 16)):
        options = {"max_new_tokens": budget, "eos_token_id": None}
        assert torch.equal(gpu.generate(**short, **options), model.generate(**short, **options))
        assert ("step", 1, (width,), gpu.generation, (range(6),)) in gpu.graphs


def test_without_capture_it_is_the_same(model):
    batch, _ = make_batch(ROWS)
    gpu = OnStandIn(capture=None)
    options = {"max_new_tokens": 4, "eos_token_id": None}
    assert torch.equal(gpu.generate(**batch, **options), model.generate(**batch, **options))
    assert len(gpu.graphs) == 0


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Same(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


STEPWISE = {
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "output_scores": {"output_scores": True, "return_dict_in_generate": True},
    "output_logits": {"output_logits": True, "return_dict_in_generate": True},
    "logits_processor": {"logits_processor": [Same()]},
    "stopping_criteria": {"stopping_criteria": [Never()]},
    "min_length": {"no_repeat_ngram_size": 3, "min_length": 60, "eos_token_id": [448, 505, 601]},
}


@pytest.mark.parametrize("options", STEPWISE.values(), ids=STEPWISE.keys())
def test_what_the_host_has_to_see_goes_step_by_step(model, gpu, options):
    """Layers are captured all the same; tokens are chosen on the host."""
    batch, _ = make_batch(ROWS)
    before = picks(gpu)
    options = {"max_new_tokens": 5, "pad_token_id": 600} | options
    expected, found = model.generate(**batch, **options), gpu.generate(**batch, **options)
    assert picks(gpu) == before
    if isinstance(found, torch.Tensor):
        assert torch.equal(found, expected)
        return
    assert torch.equal(found.sequences, expected.sequences)
    name = "scores" if "output_scores" in options else "logits"
    for a, b in zip(found[name], expected[name], strict=True):
        torch.testing.assert_close(adopted(a), b, atol=2e-5, rtol=0)


def test_a_reader_that_is_slow_or_stops_early_loses_nothing(model, gpu, free):
    """A call that is left in the middle does not disturb the next one."""

    class Leaves(Reader):
        def put(self, value):
            super().put(value)
            if len(self.seen) == 4:
                raise KeyboardInterrupt

    batch, _ = make_batch(ROWS)
    prompt = batch["input_ids"].shape[1]
    reader = Leaves()
    with pytest.raises(KeyboardInterrupt):
        gpu.generate(**batch, max_new_tokens=9, eos_token_id=None, streamer=reader)
    assert reader.seen[1:] == free[:, prompt : prompt + 3].T.tolist()
    again = gpu.generate(**batch, max_new_tokens=9, eos_token_id=None)
    assert torch.equal(again, free)


def test_calls_in_inference_mode_and_outside_share_what_is_kept(model):
    batch, _ = make_batch(ROWS[:2])
    options = {"max_new_tokens": 4, "eos_token_id": None}
    expected = model.generate(**batch, **options)
    gpu = OnStandIn(capture=None)  # a tape keeps what a graph would have in memory of its own
    with torch.inference_mode():
        first = gpu.generate(**batch, **options)
    assert torch.equal(first, expected)
    assert torch.equal(gpu.generate(**batch, **options), expected)

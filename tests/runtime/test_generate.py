# SPDX-License-Identifier: Apache-2.0
"""`generate`: every honoured option against transformers on the unpruned model, every other one refused by name."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, PreTrainedTokenizerFast
from transformers.generation import StoppingCriteria, TextStreamer

import glimpse_runtime as glimpse

from .conftest import for_hf, make_batch


def both(model, hf_model, inputs, seed=0, **options):
    """The same call on transformers and on the engine without a plan."""
    torch.manual_seed(seed)
    expected = hf_model.generate(**for_hf(inputs), **options)
    torch.manual_seed(seed)
    return model.generate(**for_hf(inputs), plan=None, **options), expected


OPTIONS = {
    "greedy": {"max_new_tokens": 12},
    "default length": {},
    "max_length": {"max_length": 90},
    "repetition": {"max_new_tokens": 12, "repetition_penalty": 1.7},
    "ngram": {"max_new_tokens": 12, "no_repeat_ngram_size": 2},
    "sampled": {"max_new_tokens": 12, "do_sample": True},
    "temperature": {"max_new_tokens": 12, "do_sample": True, "temperature": 0.6, "top_k": 0},
    "top_k": {"max_new_tokens": 12, "do_sample": True, "top_k": 4},
    "top_p": {"max_new_tokens": 12, "do_sample": True, "top_p": 0.4, "top_k": 0},
    "min_p": {"max_new_tokens": 12, "do_sample": True, "min_p": 0.2},
    "all": {"max_new_tokens": 12, "do_sample": True, "temperature": 1.4, "top_k": 20, "top_p": 0.9}
    | {"repetition_penalty": 1.2},
    "beams of one": {"max_new_tokens": 4, "num_beams": 1, "use_cache": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_tokens_equal_transformers(model, hf_model, golden_inputs, options):
    ours, expected = both(model, hf_model, golden_inputs("square_8x8"), **options)
    assert torch.equal(ours, expected)


def test_end_tokens_pad_the_rows_that_ended(model, hf_model):
    batch, _ = make_batch([[5, (3, 5), 7], [3, (2, 2), 4]])
    free = model.generate(**batch, plan=None, max_new_tokens=8, eos_token_id=None)
    prompt = batch["input_ids"].shape[1]
    ends = [int(free[0, prompt + 2]), int(free[1, prompt + 5])]
    options = {"max_new_tokens": 8, "eos_token_id": ends, "pad_token_id": 600, "do_sample": False}
    ours, expected = both(model, hf_model, batch, **options)
    assert torch.equal(ours, expected)
    shortest, _ = both(model, hf_model, batch, **(options | {"min_new_tokens": 7}))
    assert shortest.shape[1] >= prompt + 7
    assert torch.equal(shortest, both(model, hf_model, batch, **(options | {"min_new_tokens": 7}))[1])


def test_rows_of_a_batch_sample_with_their_own_history(model):
    """A repetition penalty counts no padding: the batch gives what each row gives alone."""
    batch, alone = make_batch([[3, (3, 3), 9], [2]])
    options = {"max_new_tokens": 6, "repetition_penalty": 3.0, "eos_token_id": None, "plan": None}
    together = model.generate(**batch, **options)
    for row, inputs in enumerate(alone):
        assert torch.equal(together[row, -6:], model.generate(**inputs, **options)[0, -6:])


def test_full_output(model, hf_model, golden_inputs):
    options = {
        "max_new_tokens": 5,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    ours, expected = both(model, hf_model, golden_inputs("wide_5x11"), repetition_penalty=1.3, **options)
    assert torch.equal(ours.sequences, expected.sequences)
    for name in ("scores", "logits"):
        assert len(ours[name]) == 5
        for a, b in zip(ours[name], expected[name], strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    assert ours.pruning is None
    pruned = model.generate(**golden_inputs("wide_5x11"), **options)
    assert pruned.pruning.kept == 29 and pruned.pruning.total == 55
    assert pruned.pruning[0].keep.shape == pruned.pruning[0].logits.shape == (5, 11)
    assert pruned.timings.new_tokens == 5 and 0 < pruned.timings.ttft
    phases = [getattr(pruned.timings, phase) for phase in ("vision", "before", "select", "after")]
    assert min(phases) > 0 and sum(phases) <= pruned.timings.ttft


def test_a_second_call_is_the_first_again(model, golden_inputs):
    inputs = golden_inputs("two_images")
    assert torch.equal(model.generate(**inputs, max_new_tokens=6), model.generate(**inputs, max_new_tokens=6))


def test_without_a_mask_padding_is_inferred(model):
    batch, _ = make_batch([[5, (3, 5), 7], [4]])
    mask = batch.pop("attention_mask")
    assert torch.equal(
        model.generate(**batch, pad_token_id=600, eos_token_id=601, max_new_tokens=4),
        model.generate(**batch, attention_mask=mask, pad_token_id=600, eos_token_id=601, max_new_tokens=4),
    )


def test_streamer_and_custom_processors(model, golden_inputs):
    class Collect(TextStreamer):
        def __init__(self):
            self.seen, self.ended = [], False

        def put(self, value):
            self.seen.append(value.tolist())

        def end(self):
            self.ended = True

    class Only(LogitsProcessor):
        def __call__(self, input_ids, scores):
            only = torch.full_like(scores, float("-inf"))
            only[:, 7] = 0.0
            return only

    class After(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), int((input_ids == 7).sum()) >= 3)

    inputs, streamer = golden_inputs("square_8x8"), Collect()
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == 7, 8)
    out = model.generate(
        **inputs, max_new_tokens=9, streamer=streamer, logits_processor=[Only()], stopping_criteria=[After()]
    )
    assert out[0, -4:].tolist() == [inputs["input_ids"][0, -1].item(), 7, 7, 7]
    assert streamer.seen == [inputs["input_ids"].tolist(), [7], [7], [7]] and streamer.ended


def test_stop_strings(model, hf_model, golden_inputs):
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(
        BPE({**{c: i for i, c in enumerate(alphabet)}, **{f"w{i}": i for i in range(256, 640)}}, [])
    )
    words.pre_tokenizer, words.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    inputs = golden_inputs("square_8x8")
    free = model.generate(**inputs, plan=None, max_new_tokens=8)
    stop = tokenizer.decode(free[0, -5:-3])
    ours, expected = both(
        model, hf_model, inputs, max_new_tokens=8, stop_strings=[stop], tokenizer=tokenizer, do_sample=False
    )
    assert torch.equal(ours, expected) and ours.shape[1] < free.shape[1]
    with pytest.raises(glimpse.GlimpseError, match="tokenizer"):
        model.generate(**inputs, stop_strings=[stop])


REFUSED = {
    "num_beams": {"num_beams": 3},
    "num_return_sequences": {"num_return_sequences": 2, "do_sample": True},
    "assistant_model": {"assistant_model": object()},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
    "dola_layers": {"dola_layers": "high"},
    "typical_p": {"typical_p": 0.5, "do_sample": True},
    "output_attentions": {"output_attentions": True, "return_dict_in_generate": True},
    "bad_words_ids": {"bad_words_ids": [[3]]},
    "past_key_values": {"past_key_values": object()},
    "thresold": {"thresold": 0.4},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(model, golden_inputs, name):
    with pytest.raises(glimpse.UnsupportedOptionError, match=name):
        model.generate(**golden_inputs("square_8x8"), **REFUSED[name])


def test_generation_config_object(model, hf_model, golden_inputs):
    config = GenerationConfig(max_new_tokens=7, do_sample=True, top_k=3, eos_token_id=601, pad_token_id=600)
    ours, expected = both(model, hf_model, golden_inputs("two_images"), generation_config=config)
    assert torch.equal(ours, expected)
    assert config.max_new_tokens == 7
    with pytest.raises(glimpse.UnsupportedOptionError, match="num_beams=4"):
        model.generate(**golden_inputs("two_images"), generation_config=GenerationConfig(num_beams=4))

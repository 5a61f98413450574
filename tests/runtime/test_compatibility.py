# SPDX-License-Identifier: Apache-2.0
"""Corners of Hugging Face's call in which a stand-in is easily told from the real thing."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, RepetitionPenaltyLogitsProcessor
from transformers.generation import StoppingCriteria, TextStreamer

import glimpse_runtime as glimpse

from .conftest import GOLDEN, for_hf, load_hf, make_batch


def greedy(hf, inputs, n=6, **options):
    return hf.generate(**for_hf(inputs), max_new_tokens=n, min_new_tokens=n, do_sample=False, **options)


def test_short_text_after_a_video_continues_like_transformers(model, hf_model):
    ids = torch.tensor([[603, *[607] * 8, 604, 17, 30]])
    generator = torch.Generator().manual_seed(3)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": torch.randn(32, 1176, generator=generator),
        "video_grid_thw": torch.tensor([[8, 2, 2]]),
        "second_per_grid_ts": torch.tensor([1.0]),
    }
    options = {
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    expected = hf_model.generate(**inputs, mm_token_type_ids=(ids == 607).int() * 2, **options)
    ours = model.generate(**inputs, plan=None, **options)
    for a, b in zip(ours.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_a_head_of_its_own_under_a_tied_config(tmp_path):
    base = shutil.copytree(GOLDEN / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    inputs, _ = make_batch([[5, (3, 5), 7]])
    untied = glimpse.GlimpseModel.from_pretrained(GOLDEN / "base", dtype=torch.float32).prefill(**inputs)
    loaded = glimpse.GlimpseModel.from_pretrained(base, dtype=torch.float32)
    assert torch.equal(loaded.prefill(**inputs).last_logits, untied.last_logits)
    tensors = load_file(base / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, base / "model.safetensors")
    tied = glimpse.GlimpseModel.from_pretrained(base, dtype=torch.float32)
    assert tied.base.decoder.lm_head.weight is tied.base.decoder.embed


def test_an_accelerated_model_stays_in_step_with_its_weights(golden_inputs):
    hf, inputs = load_hf(), golden_inputs("square_8x8")
    glimpse.accelerate(hf)
    clone = copy.deepcopy(hf)
    before = greedy(hf, inputs)
    with torch.no_grad():
        hf.lm_head.weight.copy_(hf.lm_head.weight.roll(1, dims=0))
    changed = greedy(hf, inputs, 1)
    assert changed[0, -1] == (before[0, -6] + 1) % 640
    hf.to(torch.bfloat16)
    half = greedy(hf, inputs)
    glimpse.restore(hf)
    assert half.shape == greedy(hf, inputs).shape
    assert torch.equal(greedy(clone, inputs), before), "a deep copy answers with its own weights"
    weight = clone.generate.engine().base.decoder.lm_head.weight
    assert weight.data_ptr() == clone.lm_head.weight.data_ptr()
    again = pickle.loads(pickle.dumps(clone))
    assert torch.equal(greedy(again, inputs), before)
    clone.generation_config = GenerationConfig(max_new_tokens=3)
    assert clone.generate(**for_hf(inputs)).shape[1] == inputs["input_ids"].shape[1] + 3


def test_positional_arguments(model, hf_model, golden_inputs):
    inputs = for_hf(golden_inputs("wide_5x11"))
    ids, config = inputs.pop("input_ids"), GenerationConfig(max_new_tokens=4, do_sample=False)
    assert torch.equal(
        model.generate(ids, config, plan=None, **inputs), hf_model.generate(ids, config, **inputs)
    )


def test_outputs_are_ordinary_tensors(model, golden_inputs):
    out = model.generate(**golden_inputs("square_8x8"), max_new_tokens=2)
    out[out == 600] = 0
    assert not out.is_inference()


def test_autocast_around_the_call_changes_nothing(model, golden_inputs):
    inputs = golden_inputs("square_8x8")
    expected = model.generate(**inputs, max_new_tokens=4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.generate(**inputs, max_new_tokens=4), expected)


def test_own_processor_takes_the_place_of_the_options(model, hf_model, golden_inputs):
    inputs = for_hf(golden_inputs("square_8x8"))
    options = {"max_new_tokens": 8, "repetition_penalty": 3.0, "do_sample": False}
    own = [RepetitionPenaltyLogitsProcessor(penalty=1.1)]
    expected = hf_model.generate(**inputs, **options, logits_processor=own)
    assert torch.equal(model.generate(**inputs, **options, logits_processor=own, plan=None), expected)


def test_rows_go_on_until_all_have_stopped_when_nothing_ends_a_text(model, hf_model):
    class FirstRowEarly(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            done = torch.zeros(input_ids.shape[0], dtype=torch.bool)
            done[0] = True
            return done

    batch, _ = make_batch([[5, (3, 5), 7], [3, (2, 2), 4]])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 600}
    ours = model.generate(**batch, **options, plan=None, stopping_criteria=[FirstRowEarly()])
    free = model.generate(**batch, **options, plan=None)
    assert torch.equal(ours, free)


def test_no_padding_is_made_up_from_an_unset_pad_id(model):
    ids = torch.tensor([[0, 5, 0, 9, 11]])
    options = {"plan": None, "max_new_tokens": 4, "pad_token_id": None, "eos_token_id": None}
    model_without = glimpse.GlimpseModel(model.base)
    model_without.generation_config = GenerationConfig()
    masked = model_without.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(model_without.generate(ids, **options), masked)


def test_prefill_infers_padding_like_generate(model):
    batch, _ = make_batch([[5, (3, 5), 7], [4]])
    expected = model.prefill(**batch).last_logits
    del batch["attention_mask"]
    plain = glimpse.GlimpseModel(model.base, model.plan)
    plain.generation_config = GenerationConfig(pad_token_id=600, eos_token_id=601)
    assert torch.equal(plain.prefill(**batch).last_logits, expected)


def test_text_streamer_refuses_batches_itself(model):
    batch, _ = make_batch([[3], [4]])
    with pytest.raises(ValueError, match="batch size 1"):
        model.generate(**batch, streamer=TextStreamer(None))


def test_a_prompt_that_ends_in_a_picture_keeps_its_last_token(model):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(24, 1176, generator=generator)
    inputs = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 6]])}
    for ids in ([5, 603, *[606] * 6], [606] * 6):
        result = model.prefill(
            torch.tensor([ids]), **inputs, threshold=1.0, min_remain_num=0, max_remain_ratio=0.2
        )
        assert result.pruning[0].keep.flatten().tolist() == [False] * 5 + [True]
        assert result.decode(2)[0].shape == (1, 2)


def test_two_step_selection_of_prompts_without_pictures(model):
    batch, _ = make_batch([[5], [3]])
    for options in ({}, {"plan": None}):
        expected = model.prefill(**batch, **options).last_logits
        assert torch.equal(model.prefill(**batch, **options, select=False).select().last_logits, expected)


def test_decoding_leaves_the_prompt_readable_and_happens_once(model, golden_inputs):
    result = model.prefill(**golden_inputs("square_8x8"), max_new_tokens=4)
    keys, values = (t.clone() for t in result.kv(0, 2))
    positions = result.kept_positions[0].clone()
    with pytest.raises(glimpse.GlimpseError, match="expected 1 to 4 steps"):
        result.decode(5)
    result.decode(4)
    assert torch.equal(result.kv(0, 2)[0], keys) and torch.equal(result.kv(0, 2)[1], values)
    assert torch.equal(result.kept_positions[0], positions)
    with pytest.raises(glimpse.GlimpseError, match="not decoded yet"):
        result.decode(1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"ref_masks": torch.ones(15), "threshold": 0.8}, "threshold: expected none together with ref_masks"),
        ({"ref_masks": torch.ones(5, 3)}, r"picture 0: expected shape \[3, 5\], found \[5, 3\]"),
        ({"ref_masks": [torch.ones(3, 5)] * 2}, "expected 1, one a picture"),
        ({"plan": {"a": 1}}, "expected a PrunePlan"),
        ({"threshold": "0.5"}, "expected a probability"),
        ({"attention_mask": [[1, 1]]}, "attention_mask: expected a tensor, found list"),
        ({"image_grid_thw": [[1, 6, 10]]}, "image_grid_thw: expected a tensor, found list"),
        ({"max_new_tokens": -100}, "at least one token"),
    ],
)
def test_bad_calls(model, options, match):
    batch, _ = make_batch([[5, (3, 5), 7]])
    with pytest.raises(glimpse.GlimpseError, match=match):
        model.prefill(**(batch | options))


def test_masks_of_every_form(model):
    batch, _ = make_batch([[5, (3, 5), 7, (2, 2), 1]])
    keep = [torch.rand(3, 5) > 0.5, torch.tensor([[1, 0], [0, 1]])]
    forms = [keep, [keep[0].float(), keep[1].flatten()], torch.cat([k.flatten() for k in keep])]
    results = [model.prefill(**batch, ref_masks=form, min_remain_num=0).pruning for form in forms]
    for pruning in results:
        assert torch.equal(pruning[0].keep, keep[0]) and torch.equal(pruning[1].keep, keep[1].bool())


def test_the_cap_of_the_modules_can_be_lifted(model, golden_inputs):
    capped = glimpse.GlimpseModel(model.base, model.plan.with_budget(max_remain_ratio=0.1, threshold=0.0))
    assert capped.prefill(**golden_inputs("square_8x8")).pruning.kept == 6
    assert capped.prefill(**golden_inputs("square_8x8"), max_remain_ratio=None).pruning.kept == 64


def test_plans_that_cannot_be_executed_are_refused(model, golden_inputs):
    stage = model.plan.stages[0]
    for name, value in {"positions": "renumber", "evict_earlier": False}.items():
        with pytest.raises(glimpse.UnsupportedOptionError, match=name):
            glimpse.PrunePlan("other", (dataclasses.replace(stage, **{name: value}),))
    with pytest.raises(glimpse.GlimpseError, match="the tokens have passed it already"):
        glimpse.PrunePlan("two", (stage, stage))
    later = dataclasses.replace(stage, at=glimpse.Layer(5))
    with pytest.raises(glimpse.GlimpseError, match="at most one stage whose score needs rows of its own"):
        glimpse.PrunePlan("two", (stage, later))
    blind = glimpse.PrunePlan("blind", (dataclasses.replace(stage, score=None),))
    with pytest.raises(glimpse.GlimpseError, match="keep masks must come with the call"):
        model.prefill(**golden_inputs("square_8x8"), plan=blind)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"use_zero_masks": True}, "use_zero_masks"),
        ({"model_type": "llava_gp"}, "model_type"),
        ({"le_layers": [0, 1, 1, 3, 4, 5]}, "no layer twice"),
        ({"selected_layers": 3}, "selected_layers"),
        ({"reduce_layer": "3"}, "reduce_layer"),
        ({"reduce_threshold": "x"}, "threshold"),
    ],
)
def test_module_settings_that_make_no_sense(tmp_path, changes, match):
    modules = shutil.copytree(GOLDEN / "gp_v1", tmp_path / "gp")
    config = json.loads((modules / "config.json").read_text())
    (modules / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(glimpse.GlimpseError, match=match):
        glimpse.GlimpseModel.from_pretrained(GOLDEN / "base", modules)


@pytest.mark.parametrize("text", ["[]", "garbage"])
def test_files_that_are_no_json_objects(tmp_path, text):
    base = shutil.copytree(GOLDEN / "base", tmp_path / "base")
    (base / "config.json").write_text(text)
    with pytest.raises(glimpse.CheckpointError, match="expected a JSON object"):
        glimpse.GlimpseModel.from_pretrained(base)
    for index in (text, '{"metadata": {}}'):
        shutil.copy(GOLDEN / "base" / "config.json", base)
        (base / "model.safetensors.index.json").write_text(index)
        with pytest.raises(glimpse.CheckpointError, match="JSON object|weight_map"):
            glimpse.GlimpseModel.from_pretrained(base)


def test_names_and_devices_that_do_not_exist():
    with pytest.raises(glimpse.CheckpointError):
        glimpse.GlimpseModel.from_pretrained("a b/c d")
    with pytest.raises(glimpse.GlimpseError, match="device"):
        glimpse.GlimpseModel.from_pretrained(GOLDEN / "base", device="no_such_device")

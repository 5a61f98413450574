# SPDX-License-Identifier: Apache-2.0
"""Without a plan the engine gives stock Hugging Face results."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import glimpse_runtime as glimpse
from glimpse_runtime.loading import share_base

from .conftest import GOLDEN, for_hf, load_hf, make_batch

INPUTS = ["square_8x8", "wide_5x11", "two_images", "batch2_leftpad"]
MIXED = [[5, (3, 5), 7], [9], [2, (1, 1), 3, (6, 2), 4], [1, (9, 7), 2]]


@pytest.mark.parametrize("name", INPUTS)
def test_logits_and_tokens_of_the_recorded_plain_runs(model, golden_inputs, name):
    stored = np.load(GOLDEN / f"inputs_{name}.npz")
    result = model.prefill(**golden_inputs(name), plan=None)
    assert result.pruning is None
    np.testing.assert_allclose(result.last_logits.numpy(), stored["plain_logits_last"], atol=1e-4)
    tokens, logits = result.decode(16)
    np.testing.assert_array_equal(tokens.numpy(), stored["plain_greedy_ids"])
    top = np.take_along_axis(logits.numpy(), stored["plain_step_top_ids"], 2)
    np.testing.assert_allclose(top, stored["plain_step_top_logits"], atol=1e-4)


@pytest.mark.parametrize("name", INPUTS)
def test_vision_tower_and_positions(model, golden_inputs, name):
    from glimpse_runtime.models.qwen2_5_vl.inputs import pack, read_grids
    from glimpse_runtime.models.qwen2_5_vl.layout import vision_layout
    from glimpse_runtime.taps import VisionTaps

    stored, inputs = np.load(GOLDEN / f"inputs_{name}.npz"), golden_inputs(name)
    config = model.base.config
    grids = read_grids("image", inputs["image_grid_thw"], inputs["pixel_values"], config)
    layout = vision_layout(tuple(grids), config.vision, torch.device("cpu"))
    np.testing.assert_array_equal(layout.token_order, stored["window_index"])
    np.testing.assert_array_equal(layout.cu_frames, stored["cu_seqlens"])
    np.testing.assert_array_equal(layout.cu_windows, stored["cu_window_seqlens"])
    out = model.base.vision(inputs["pixel_values"], layout, VisionTaps(hidden=(0, 1, 2, -1)))
    np.testing.assert_allclose(out.embeds, stored["image_embeds"], atol=1e-5)
    for block, asked in enumerate((0, 1, 2, -1)):
        np.testing.assert_allclose(out.hidden[asked], stored[f"vis_hidden_{block}"], atol=1e-5)
    batch = pack(inputs["input_ids"], inputs["attention_mask"], grids, [], config, device=torch.device("cpu"))
    mask = stored["attention_mask"].astype(bool)
    np.testing.assert_array_equal(batch.positions, stored["position_ids"][:, mask])
    following = stored["rope_deltas"][:, 0] + mask.shape[1]  # recorded against the padded length
    np.testing.assert_array_equal(batch.next_positions, np.broadcast_to(following, (3, len(following))))


@pytest.mark.parametrize("side", ["left", "right"])
def test_mixed_batch_against_transformers_row_by_row(model, hf_model, side):
    batch, alone = make_batch(MIXED, side=side)
    result = model.prefill(**batch, plan=None)
    tokens, _ = result.decode(6)
    for row, inputs in enumerate(alone):
        with torch.inference_mode():
            logits = hf_model(**for_hf(inputs)).logits[0, -1]
            greedy = hf_model.generate(**for_hf(inputs), max_new_tokens=6, min_new_tokens=6, do_sample=False)
        torch.testing.assert_close(result.last_logits[row], logits, atol=1e-4, rtol=0)
        assert tokens[row].tolist() == greedy[0, -6:].tolist()


def test_video_against_transformers(model, hf_model):
    generator = torch.Generator().manual_seed(3)
    grid = torch.tensor([[3, 4, 6]])
    ids = torch.tensor([[5, 9, 603, *[607] * 18, 604, 17, 30, 41]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": torch.randn(72, 1176, generator=generator),
        "video_grid_thw": grid,
        "second_per_grid_ts": torch.tensor([2.0]),  # whole: transformers before 5.2x truncates it
    }
    with torch.inference_mode():
        expected = hf_model(**inputs, mm_token_type_ids=(ids == 607).int() * 2).logits[0, -1]
    torch.testing.assert_close(model.prefill(**inputs, plan=None).last_logits[0], expected, atol=1e-4, rtol=0)


def test_bf16_is_as_close_to_fp32_as_transformers_is(hf_model, golden_inputs):
    bf16 = glimpse.GlimpseModel.from_pretrained(GOLDEN / "base", dtype=torch.bfloat16)
    theirs = load_hf(torch.bfloat16)
    for name in INPUTS:
        truth = torch.from_numpy(np.load(GOLDEN / f"inputs_{name}.npz")["plain_logits_last"])
        with torch.inference_mode():
            stock = theirs(**for_hf(golden_inputs(name))).logits[:, -1].float()
        ours = bf16.prefill(**golden_inputs(name)).last_logits.float()
        assert (ours - truth).abs().max() <= 2 * (stock - truth).abs().max()


def test_weights_of_a_loaded_model_are_shared(hf_model):
    shared = share_base(hf_model)
    layers = hf_model.model.language_model.layers
    assert shared.decoder.layers[2].down.weight.data_ptr() == layers[2].mlp.down_proj.weight.data_ptr()
    assert (
        shared.decoder.layers[0].qkv.parts[1].weight.data_ptr()
        == layers[0].self_attn.k_proj.weight.data_ptr()
    )
    assert (
        shared.vision.patch_embed.weight.data_ptr()
        == hf_model.model.visual.patch_embed.proj.weight.data_ptr()
    )

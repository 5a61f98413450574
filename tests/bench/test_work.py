# SPDX-License-Identifier: Apache-2.0
"""The counts behind the shares: against arithmetic by hand, torch's own counter on transformers' model, and real weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import glimpse_runtime as glimpse
from bench import work
from bench.work import Flops
from glimpse_runtime.models.qwen2_5_vl.config import ModelConfig, TextConfig, VisionConfig

TINY = Path(__file__).parents[2] / "models" / "tiny"

TEXT = TextConfig(
    num_layers=3, hidden_size=10, num_heads=4, num_kv_heads=2, head_dim=5, intermediate_size=7, vocab_size=11,
    eps=1e-6, rope_theta=1e4, mrope_section=(1, 1, 0), max_positions=64, tie_word_embeddings=False,
)  # fmt: skip
Q, KV, BEHIND = 10 * 20, 2 * 10 * 10, 20 * 10 + 3 * 10 * 7  # multiply-adds a row


@pytest.fixture(scope="module")
def tiny() -> glimpse.GlimpseModel:
    return glimpse.GlimpseModel.from_pretrained(TINY / "base", TINY / "glimpse")


def test_layers_by_hand() -> None:
    # 3 rows see 1 + 2 + 3 keys; a pair costs two products of 4 heads with 5 values.
    assert work.layers(TEXT, 3, 2) == Flops(2 * 2 * 3 * (Q + KV + BEHIND), 2 * 2 * 2 * 6 * 20)


def test_the_last_layer_works_for_one_row() -> None:
    two = work.layers(TEXT, 6, 2)
    last = Flops(2 * (6 * KV + Q + BEHIND) + 2 * 10 * 11, 4 * 6 * 20)
    assert work.to_first_token(TEXT, 6) == two + last
    assert work.to_first_token(TEXT, 6, first=2) == last


def test_after_pruning_by_hand() -> None:
    # Stage in layer 0; rows 0, 2, 5 stay and see 1, 3 and 6 keys of the whole prompt there; then 3 rows among themselves.
    stage = Flops(2 * 3 * (Q + BEHIND), 4 * (1 + 3 + 6) * 20)
    assert work.after_pruning(TEXT, 0, [0, 2, 5]) == stage + work.to_first_token(TEXT, 3, 1)


def test_pruning_nothing_costs_what_no_pruning_does(tiny: glimpse.GlimpseModel) -> None:
    text = tiny.base.config.text
    scorer = tiny.plan.stages[0].score  # type: ignore[union-attr]
    rows, stage = 40, 5
    before = work.to_scores(text, rows, stage, 0, scorer.weights)  # type: ignore[union-attr]
    after = work.after_pruning(text, stage, range(rows))
    glance = 2 * text.hidden_size * text.num_heads * text.head_dim  # the probe's query, made twice
    assert (before + after).total == work.to_first_token(text, rows).total + glance


def test_predictor_by_hand(tiny: glimpse.GlimpseModel) -> None:
    scorer = tiny.plan.stages[0].score  # type: ignore[union-attr]
    n, width, condition, heads, layers = 12, 64, 64, 4, 4
    both = width + condition
    a_layer = (
        2 * both * both + 2 * width * width + 3 * 2 * width * width
    )  # q, k; v, o; gate, up, down of twice the width
    wanted = Flops(2 * n * (layers * a_layer + width * heads + width), 2 * n * n * layers * (both + width))
    assert work.prediction(scorer.weights, n) == wanted  # type: ignore[union-attr]
    text = tiny.base.config.text
    nothing = work.to_scores(text, 20, 5, 0, scorer.weights)  # type: ignore[union-attr]
    conditions = Flops(
        2 * n * layers * condition * 128, 2 * n * 4 * 32
    )  # and the glance at n keys: 4 heads of 32
    assert work.to_scores(text, 20, 5, n, scorer.weights) == nothing + conditions  # type: ignore[union-attr]


def vision_config() -> VisionConfig:
    return VisionConfig(
        depth=3, hidden_size=8, num_heads=2, intermediate_size=6, out_hidden_size=5, patch_size=14,
        temporal_patch_size=2, merge_size=2, in_channels=3, window_size=56, full_attention_blocks=(1,),
        tokens_per_second=2, rope_theta=1e4,
    )  # fmt: skip


def test_vision_by_hand() -> None:
    config = vision_config()
    # 6 x 4 patches in windows of 4 x 4: one full window, and one of 2 x 4.
    assert work.windows(config, 6, 4) == [16, 8]
    assert sorted(work.windows(config, 6, 10)) == [4, 8, 8, 8, 16, 16]
    block = 4 * 8 * 8 + 3 * 8 * 6
    gemm = 24 * (1176 * 8 + 3 * block) + 6 * (32 * 32 + 32 * 5)
    seen = 24 * 24 + 2 * (16 * 16 + 8 * 8)  # of one full block and two of windows
    assert work.vision(config, (1, 6, 4)) == Flops(2 * gemm, 4 * 8 * seen)
    frames = work.vision(config, (3, 6, 4))
    assert (frames.gemm, frames.attention) == (3 * 2 * gemm, 3 * 4 * 8 * seen)
    full = work.vision(replace(config, full_attention_blocks=(0, 1, 2)), (1, 6, 4))
    assert full == Flops(2 * gemm, 4 * 8 * 3 * 24 * 24)


def test_products_are_those_of_transformers() -> None:
    """torch counts what transformers multiplies: all rows in the last layer and its head, too, which we leave out."""
    config = Qwen2_5_VLConfig.from_pretrained(TINY / "base")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        TINY / "base", attn_implementation="eager"
    ).eval()
    ours = ModelConfig.from_hf(config)
    grid, image = (1, 12, 8), 24
    ids = torch.tensor([[5, config.vision_start_token_id, *[config.image_token_id] * image, 7, 8, 9]])
    rows = ids.shape[1]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(4 * image, 1176),
        "image_grid_thw": torch.tensor([grid]),
        "mm_token_type_ids": (ids == config.image_token_id).int(),
    }
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        model(**inputs, logits_to_keep=1)
    total = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    linear = sum(flops for op, flops in total.items() if "bmm" not in op and "attention" not in op)
    # The patch projection is a convolution there; rotary tables are products of positions and frequencies in both.
    tower, text = work.vision(ours.vision, grid), ours.text
    head = 2 * text.hidden_size * text.vocab_size
    wanted = tower.gemm + work.layers(text, rows, text.num_layers).gemm + head
    assert linear == pytest.approx(wanted, rel=1e-3)


def test_bytes_of_a_decode_step(tiny: glimpse.GlimpseModel) -> None:
    decoder, text = tiny.base.decoder, tiny.base.config.text
    h, i, q, kv = text.hidden_size, text.intermediate_size, text.num_heads * text.head_dim, 64
    a_layer = (
        h * q + 2 * h * kv + q * h + 3 * h * i + q + 2 * kv + 2 * h
    )  # matrices, biases of q, k and v, norms
    values = text.num_layers * a_layer + h + h * text.vocab_size + h  # last norm, head, one embedded token
    cached = 2 * text.num_layers * 100 * kv
    assert work.decode_bytes(decoder, 100) == 2 * (values + cached)
    assert work.kv_bytes(text, 100, torch.bfloat16) == 2 * cached


def test_bytes_of_eight_bit_weights() -> None:
    int8 = glimpse.GlimpseModel.from_pretrained(TINY / "base", quantize="int8")
    plain = glimpse.GlimpseModel.from_pretrained(TINY / "base")
    half = work.decode_bytes(int8.base.decoder, 0) / work.decode_bytes(plain.base.decoder, 0)
    assert (
        0.5 < half < 0.56
    )  # a byte and a share of 4 bytes a group of 128 instead of two; norms and biases as before


def test_shared_memory_counts_once() -> None:
    weight = torch.zeros(4, 6)
    assert work.nbytes((weight, [weight, {"a": weight}], None, 3)) == 96
    assert work.nbytes([weight, weight.clone()]) == 192

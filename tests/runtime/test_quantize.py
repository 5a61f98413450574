# SPDX-License-Identifier: Apache-2.0
"""`quantize="int8"`: the model with its decoder's matrices rounded to 8 bits, and nothing else changed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import glimpse_runtime as glimpse
from glimpse_kernels import Int8Weight, force_backend

from .conftest import GOLDEN, for_hf, load_hf, make_batch

ROWS = [[5, (3, 5), 7], [3], [9, (2, 2), 4, (4, 3), 2]]
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def rounded(weight: torch.Tensor, group: int = 128) -> torch.Tensor:
    """What 8 bits with a scale for every `group` inputs leave of a matrix, by the definition of the format."""
    result = weight.clone()
    for start in range(0, weight.shape[1], group):
        run = weight[:, start : start + group]
        scale = run.abs().amax(dim=1, keepdim=True) / 127
        result[:, start : start + group] = torch.where(scale > 0, (run / scale).round() * scale, 0.0)
    return result


@pytest.fixture(scope="module")
def rounded_hf() -> Any:
    """Hugging Face's model with the decoder's matrices rounded by hand."""
    model = load_hf()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "visual" not in name and name.endswith(tuple(f"{m}.weight" for m in MATRICES)):
                weight.copy_(rounded(weight))
        # Of its own, where it is tied to the token embedding, which is only looked up.
        model.lm_head.weight = torch.nn.Parameter(rounded(model.lm_head.weight))
    return model


@pytest.fixture(scope="module")
def int8() -> glimpse.GlimpseModel:
    return glimpse.GlimpseModel.from_pretrained(
        GOLDEN / "base", GOLDEN / "gp_v1", dtype=torch.float32, quantize="int8"
    )


def test_tokens_equal_the_rounded_model(int8: glimpse.GlimpseModel, rounded_hf: Any) -> None:
    batch, _ = make_batch(ROWS)
    options: dict[str, Any] = {
        "max_new_tokens": 24,
        "do_sample": False,
        "eos_token_id": None,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    ours = int8.generate(**batch, plan=None, **options)
    theirs = rounded_hf.generate(**for_hf(batch), **options)
    for step, (a, b) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4, msg=lambda m, step=step: f"step {step}: {m}")
    assert torch.equal(ours.sequences, theirs.sequences)


def test_only_the_decoders_matrices_are_int8(int8: glimpse.GlimpseModel, model: glimpse.GlimpseModel) -> None:
    assert int8.base.quantization == "int8" and model.base.quantization is None
    decoder = int8.base.decoder
    for layer in decoder.layers:
        parts = (*layer.qkv.parts, layer.o_proj, layer.gated.gate, layer.gated.up, layer.down)
        assert all(isinstance(part.weight, Int8Weight) for part in parts)
    assert isinstance(decoder.lm_head.weight, Int8Weight)
    assert decoder.embed.dtype is torch.float32
    for ours, plain in zip(int8.base.vision.blocks, model.base.vision.blocks, strict=True):
        assert torch.equal(ours.qkv.weight, plain.qkv.weight)


def test_pruned_and_plain_are_near_the_unquantized(
    int8: glimpse.GlimpseModel, model: glimpse.GlimpseModel
) -> None:
    """Scores move by the rounding of the weights and no more."""
    batch, _ = make_batch(ROWS)
    ours, plain = (m.prefill(**batch).scores for m in (int8, model))
    assert ours is not None and plain is not None
    assert 0 < (ours - plain).abs().max() < 0.1 * plain.abs().max()


@pytest.mark.parametrize("backend", ["naive", "auto"])
def test_every_backend_gives_the_same_tokens(int8: glimpse.GlimpseModel, backend: str) -> None:
    batch, _ = make_batch(ROWS)
    expected = int8.generate(**batch, max_new_tokens=12, eos_token_id=None)
    with force_backend(backend):
        assert torch.equal(int8.generate(**batch, max_new_tokens=12, eos_token_id=None), expected)


def test_a_loaded_model_may_be_quantized_too(int8: glimpse.GlimpseModel, tmp_path: Path) -> None:
    hf = load_hf()
    before = copy.deepcopy(hf.state_dict())
    shared = glimpse.GlimpseModel.from_hf(hf, GOLDEN / "gp_v1", quantize="int8")
    batch, _ = make_batch(ROWS)
    expected = int8.generate(**batch, max_new_tokens=12, eos_token_id=None)
    assert torch.equal(shared.generate(**batch, max_new_tokens=12, eos_token_id=None), expected)
    assert shared.base.decoder.embed.data_ptr() == hf.get_input_embeddings().weight.data_ptr()
    assert all(torch.equal(value, before[name]) for name, value in hf.state_dict().items())


@pytest.mark.parametrize("wrong", ["int4", 8, True])
def test_unknown_forms_are_refused(wrong: Any) -> None:
    with pytest.raises(glimpse.GlimpseError, match="quantize: expected one of None, 'int8', found"):
        glimpse.GlimpseModel.from_pretrained(GOLDEN / "base", quantize=wrong)

# SPDX-License-Identifier: Apache-2.0
"""Matrices with the same input as one matrix: the same model, one product where there were three or two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import glimpse_runtime as glimpse
from glimpse_kernels.linear.torch_gemm import one_below_the_other, side_by_side
from glimpse_runtime import loading
from glimpse_runtime.models.qwen2_5_vl import weights
from glimpse_runtime.models.qwen2_5_vl.decoder import Buffers
from glimpse_runtime.models.qwen2_5_vl.linear import Linear, lay_together

from .conftest import load_hf, make_batch
from .on_stand_in import device

ROWS = [[5, (3, 5), 7], [9], [2, (1, 1), 3, (6, 2), 4]]


def test_loaded_on_a_gpu_they_lie_together(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, _ = make_batch(ROWS)
    with device() as here:
        fused = here.model()
        monkeypatch.setattr(weights, "lay_together", list)
        apart = here.model()
        for model, together in ((fused, True), (apart, False)):
            for layer in model.base.decoder.layers:
                parts = [layer.qkv.parts, (layer.gated.gate, layer.gated.up)]
                held = [[p.weight for p in group] for group in parts] + [[p.bias for p in layer.qkv.parts]]
                assert all((one_below_the_other(group) is not None) is together for group in held)
            for block in model.base.vision.blocks:
                both = block.gated.gate, block.gated.up
                assert (one_below_the_other([p.weight for p in both]) is not None) is together
                assert (one_below_the_other([p.bias for p in both]) is not None) is together
        found, wanted = (model.prefill(**batch).last_logits.cpu() for model in (fused, apart))
        assert torch.equal(found, wanted)


def test_on_a_cpu_they_stay_as_they_were(model: glimpse.GlimpseModel) -> None:
    parts = [Linear(torch.ones(2, 3)), Linear(torch.ones(4, 3))]
    assert all(a is b for a, b in zip(lay_together(parts), parts, strict=True))
    layer = model.base.decoder.layers[0]
    assert one_below_the_other([part.weight for part in layer.qkv.parts]) is None


def test_eight_bits_stay_apart() -> None:
    with device():
        base = loading.load_base(
            Path(__file__).parents[1] / "golden" / "glimpse" / "base",
            dtype=torch.float32,
            device=torch.device("cuda", 0),
            quantize="int8",
        )
        group = base.decoder.layers[0].qkv
        assert group.sizes == [part.weight.shape[0] for part in group.parts]


def test_results_of_the_three_lie_side_by_side(model: glimpse.GlimpseModel) -> None:
    config = model.base.config.text
    with device():
        into = Buffers.allocate(config, 7, torch.float32, torch.device("cuda", 0))
        whole = side_by_side(into.qkv)
        assert whole is not None
        assert list(whole.shape) == [7, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim]
    assert side_by_side(Buffers.allocate(config, 7, torch.float32, torch.device("cpu")).qkv) is None


def test_a_checkpoint_that_lacks_one_is_still_named(tmp_path: Path) -> None:
    """The error is about the missing key, not about the matrices that should have been laid together."""
    with device():
        reader = weights.WeightReader(
            ["visual.blocks.0.mlp.gate_proj.weight"], lambda _: torch.ones(4, 3, device="cuda")
        )
        reader.gated("visual.blocks.0.mlp", 4, 3, bias=False)
        with pytest.raises(glimpse.CheckpointError, match="missing 1: visual.blocks.0.mlp.up_proj.weight"):
            reader.finish()


def test_parameters_of_a_loaded_model_are_moved_not_copied(tmp_path: Path) -> None:
    model, reference = load_hf(), load_hf()
    parameters = dict(model.named_parameters())
    before = {name: p.data_ptr() for name, p in parameters.items()}
    loading._move_together(parameters)
    moved = {name.rsplit(".", 2)[-2] for name, p in parameters.items() if p.data_ptr() != before[name]}
    assert moved == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    after = {name: p.data_ptr() for name, p in parameters.items()}
    loading._move_together(parameters)
    assert after == {name: p.data_ptr() for name, p in parameters.items()}
    for (name, ours), (_, theirs) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert ours is parameters[name] and torch.equal(ours, theirs)
    layer = model.model.language_model.layers[0]
    attention = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
    assert one_below_the_other([linear.weight for linear in attention]) is not None
    assert one_below_the_other([linear.bias for linear in attention]) is not None
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(held.values()) == sum(p.nbytes for p in model.parameters())
    model.save_pretrained(tmp_path)  # as before: none of them counts as a part of another
    saved = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    for ours, theirs in zip(saved.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs)

# SPDX-License-Identifier: Apache-2.0
"""Bad input: a clear error that names what was expected and what was found, before anything is computed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import glimpse_runtime as glimpse

from .conftest import GOLDEN, make_batch


def load(base=GOLDEN / "base", modules=None, **options):
    return glimpse.GlimpseModel.from_pretrained(base, modules, **options)


@pytest.fixture
def base(tmp_path):
    return shutil.copytree(GOLDEN / "base", tmp_path / "base")


@pytest.fixture
def modules(tmp_path):
    return shutil.copytree(GOLDEN / "gp_v1", tmp_path / "gp")


def edit_weights(base, change):
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors")


def edit_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_modules(modules, change):
    parts = torch.load(modules / "new_modules_gp.pt", weights_only=True)
    change(parts)
    torch.save(parts, modules / "new_modules_gp.pt")


def refused(match, **where):
    return pytest.raises(glimpse.CheckpointError, match=match)


def test_missing_and_left_over_base_keys(base):
    def change(tensors):
        tensors["model.layers.0.mlp.extra.weight"] = tensors.pop("model.layers.2.mlp.up_proj.weight")

    edit_weights(base, change)
    lacking, unknown = r"text\.layers\.2\.mlp\.up_proj\.weight", r"model\.layers\.0\.mlp\.extra\.weight"
    with refused(f"missing 1: {lacking}; left over 1: {unknown}"):
        load(base)


def test_wrong_shape(base):
    edit_weights(base, lambda t: t.update({"model.norm.weight": torch.ones(3)}))
    with refused(r"model\.norm\.weight: expected shape \[128\], found \[3\]"):
        load(base)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "llama"}, "expected model_type 'qwen2_5_vl', found 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', found 'gelu'"),
        ({"use_sliding_window": True}, "sliding_window"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 9]}}, "add up to head_dim / 2 = 16"),
    ],
)
def test_configs_that_cannot_be_computed(base, changes, match):
    edit_json(base / "config.json", **changes)
    with refused(match):
        load(base)


def test_no_folder_no_file(base, tmp_path):
    with refused("expected a folder with config.json"):
        load(tmp_path / "nothing")
    (base / "model.safetensors").unlink()
    with refused(r"missing \['model.safetensors'\]"):
        load(base)
    (base / "model.safetensors").write_bytes(b"not a checkpoint")
    with refused("expected a safetensors file"):
        load(base)


def test_unknown_dtype():
    for dtype in (torch.float16, "float8", "no_such"):
        with refused("dtype: expected one of float32, bfloat16"):
            load(dtype=dtype)


def test_modules_for_another_base(modules):
    edit_json(modules / "config.json", hidden_size=2048, num_hidden_layers=36)
    with refused(
        r"another base: the given base has hidden_size 128 \(the modules were made for 2048\), num_hidden"
    ):
        load(modules=modules)


def test_module_shapes_of_another_base(modules):
    edit_json(modules / "config.json", selected_layers=[2, 3])
    with refused("attn_in_proj.weight: expected 8 inputs for this base, found 4"):
        load(modules=modules)


def test_module_layers_beyond_the_base(modules):
    edit_json(modules / "config.json", selected_layers=[23])
    with refused(r"selected_layers: expected numbers below the base's 6 layers, found \[23\]"):
        load(modules=modules)


def test_missing_settings(modules):
    edit_json(modules / "config.json", le_length=None)
    with refused("le_length"):
        load(modules=modules)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda p: p["attn_fuser"].pop("layers.2.norm1.weight"), "missing layers.2.norm1.weight"),
        (lambda p: p["attn_fuser"].update(extra=torch.ones(1)), "left-over keys extra"),
        (lambda p: p.pop("le_norm"), "expected the entries"),
        (
            lambda p: p.update(learnable_embeddings=torch.ones(6, 2, 128)),
            r"expected shape \[6, 1, 128\], found \[6, 2",
        ),
        (
            lambda p: p["le_proj"].pop("bias"),
            r"le_proj: expected the keys \['bias', 'weight'\], found \['weight'\]",
        ),
    ],
)
def test_module_keys(modules, change, match):
    edit_modules(modules, change)
    with refused(match):
        load(modules=modules)


def test_modules_are_never_unpickled(modules):
    class Harmful:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"attn_fuser": Harmful()}, modules / "new_modules_gp.pt")
    with refused("weights_only=True"):
        load(modules=modules)


# -- calls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_remain_ratio": 0.0}, r"expected a share in \(0, 1\], found 0.0"),
        ({"max_remain_ratio": 1.5}, r"expected a share in \(0, 1\], found 1.5"),
        ({"threshold": -0.1}, r"expected a probability in \[0, 1\], found -0.1"),
        ({"min_remain_num": -1}, "expected a number >= 0"),
        ({"anchor_positions": ["middle"]}, "expected some of tl, tr, bl, br"),
        ({"anchor_positions": 5}, "expected some of tl, tr, bl, br, found 5"),
        ({"ref_masks": 5}, "keep masks: expected a tensor or a list of them, found 5"),
        ({"ref_masks": "abc"}, "keep masks: expected a tensor or a list of them, found 'abc'"),
        ({"ref_masks": torch.ones(3)}, "expected 15 values, one a visual token, found 3"),
        ({"plan": "fastest"}, "expected one of cdpruner, .*found .fastest"),
        ({"plan": None, "threshold": 0.5}, "expected a pruning plan to apply to"),
        ({"max_new_tokens": 0}, "max_new_tokens` must be greater than 0"),
        ({"max_length": 10}, r"at least one new token, found -19"),
    ],
)
def test_options(model, options, match):
    batch, _ = make_batch([[5, (3, 5), 7]])
    with pytest.raises(glimpse.GlimpseError, match=match):
        model.generate(**batch, **options)


def changed(**changes):
    batch, _ = make_batch([[5, (3, 5), 7]])
    return {k: v for k, v in {**batch, **changes}.items() if v is not None}


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        (
            changed(input_ids=torch.ones(4, dtype=torch.int64)),
            r"expected an integer tensor \[batch, length\]",
        ),
        (changed(attention_mask=torch.ones(1, 3)), "expected the shape of input_ids"),
        (changed(attention_mask=torch.zeros(1, 29, dtype=torch.int64)), "found only padding"),
        (changed(image_grid_thw=torch.tensor([[1, 6, 12]])), r"expected \[72, 1176\]"),
        (changed(image_grid_thw=torch.tensor([[1, 5, 12]])), "multiples of 2"),
        (changed(image_grid_thw=torch.tensor([[60, 1]])), r"expected shape \[images, 3\]"),
        (changed(image_grid_thw=None), "come together"),
        (
            changed(image_grid_thw=torch.tensor([[1, 6, 8]]), pixel_values=torch.zeros(48, 1176)),
            "more image tokens in input_ids than image grids",
        ),
        (
            changed(image_grid_thw=torch.tensor([[1, 6, 12]]), pixel_values=torch.zeros(72, 1176)),
            r"image 0 has grid \(1, 6, 12\), that is 18 image tokens; found 15 in a row",
        ),
        (
            changed(input_ids=torch.ones(1, 29, dtype=torch.int64)),
            "image grids: 1 more than the image tokens",
        ),
        (changed(pixel_values=None, image_grid_thw=None), "more image tokens"),
        (
            {"input_ids": torch.ones(1, 5000, dtype=torch.int64)},
            r"expected at most 4096 prompt tokens \(the model's context\), found 5000",
        ),
    ],
)
def test_inputs_that_do_not_fit_together(model, inputs, match):
    with pytest.raises(glimpse.GlimpseError, match=match):
        model.generate(**inputs)

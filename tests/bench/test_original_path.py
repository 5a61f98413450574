# SPDX-License-Identifier: Apache-2.0
"""The transcription of the original does what the original did: its recorded runs (`tests/golden/glimpse`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from bench.original_path import OriginalPath

GOLDEN = Path(__file__).parents[1] / "golden" / "glimpse"
CASES = ("v1_square", "v1_wide", "ratio_0111", "thr_07", "min5_none_kept")
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())


@pytest.fixture(scope="module")
def hf() -> Any:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(
        GOLDEN / "base", dtype=torch.float32, attn_implementation="sdpa"
    ).eval()


def recorded(case: dict[str, Any]) -> tuple[dict[str, torch.Tensor], Any]:
    inputs = np.load(GOLDEN / f"inputs_{case['input']}.npz")
    names = ("input_ids", "pixel_values", "image_grid_thw")
    return {n: torch.from_numpy(inputs[n]) for n in names}, np.load(GOLDEN / case["file"])


@pytest.mark.parametrize("vision", ["flash", "dense"])
@pytest.mark.parametrize("name", CASES)
def test_recorded_case(hf: Any, name: str, vision: Any, tmp_path: Path) -> None:
    case = MANIFEST["cases"][name]
    inputs, found = recorded(case)
    settings = case["settings"]
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "new_modules_gp.pt").symlink_to(GOLDEN / case["gp_dir"] / "new_modules_gp.pt")
    (folder / "config.json").write_text(json.dumps(settings))
    path = OriginalPath(hf, folder, vision)
    marks: list[str] = []
    prompt = path.prefill(
        **inputs,
        threshold=settings["reduce_threshold"],
        max_remain_ratio=settings["max_remain_ratio"],
        mark=marks.append,
    )
    assert marks == ["vision", "before", "select", "after"]
    compare = {
        "glimpse_attn": prompt.seen[0][:, None],
        "vip_logits": prompt.scores[0],
        "logits_last": prompt.logits,
    }
    for array, ours in compare.items():
        np.testing.assert_allclose(ours.numpy(), found[array], atol=1e-4, rtol=0, err_msg=array)
    assert (prompt.keep[0].numpy() == found["keep_image_tokens"]).all()
    for layer in case["kv_layers_stored"]:
        for which, tensor in zip("kv", prompt.cache[layer], strict=True):
            np.testing.assert_allclose(tensor.numpy(), found[f"{which}_{layer}"], atol=2e-5, rtol=0)
    assert (path.decode(prompt, 16).numpy() == found["greedy_ids"]).all()


def test_rows_of_a_batch_are_what_they_are_alone(hf: Any) -> None:
    inputs, _ = recorded(MANIFEST["cases"]["v1_square"])
    path = OriginalPath(hf, GOLDEN / "gp_v1")
    other = inputs | {
        "pixel_values": inputs["pixel_values"].flip(0),
        "input_ids": inputs["input_ids"].clone(),
    }
    other["input_ids"][0, -1] = 17
    alone = [path.prefill(**each, max_remain_ratio=0.25, threshold=0.0) for each in (inputs, other)]
    both = {name: torch.cat((inputs[name], other[name])) for name in inputs}
    batch = path.prefill(**both, max_remain_ratio=0.25, threshold=0.0)
    assert batch.keep.sum(1).tolist() == [16, 16]
    for b, one in enumerate(alone):
        assert torch.equal(batch.keep[b], one.keep[0])
        torch.testing.assert_close(batch.logits[b], one.logits[0], atol=1e-4, rtol=0)
    tokens = torch.cat([path.decode(one, 6) for one in alone])
    assert torch.equal(path.decode(batch, 6), tokens)


def test_given_masks_take_the_place_of_the_choice(hf: Any) -> None:
    inputs, found = recorded(MANIFEST["cases"]["v1_wide"])
    path = OriginalPath(hf, GOLDEN / "gp_v1")
    keep = torch.from_numpy(found["keep_image_tokens"])[None]
    prompt = path.prefill(**inputs, threshold=0.99, keep=keep)
    assert torch.equal(prompt.keep, keep)
    assert (path.decode(prompt, 16).numpy() == found["greedy_ids"]).all()


def test_settings_it_does_not_follow_are_refused(hf: Any) -> None:
    with pytest.raises(ValueError, match="attn_fuse_type"):
        OriginalPath(hf, GOLDEN / "gp_dummy")
    with pytest.raises(ValueError, match="le_length"):
        OriginalPath(hf, GOLDEN / "gp_v1_two_layers_le2")
    inputs, _ = recorded(MANIFEST["cases"]["v1_square"])
    rows = {name: torch.cat((t, t if name != "pixel_values" else t * -2)) for name, t in inputs.items()}
    with pytest.raises(ValueError, match="same number"):
        OriginalPath(hf, GOLDEN / "gp_v1").prefill(**rows)
    two = inputs | {"image_grid_thw": rows["image_grid_thw"], "pixel_values": rows["pixel_values"]}
    with pytest.raises(ValueError, match="one picture a row"):
        OriginalPath(hf, GOLDEN / "gp_v1").prefill(**two)

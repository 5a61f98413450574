# SPDX-License-Identifier: Apache-2.0
"""A loaded Hugging Face model: the same call before, during and after."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import glimpse_runtime as glimpse

from .conftest import GOLDEN, for_hf, load_hf


def test_round_trip_leaves_the_model_as_it_was(golden_inputs):
    hf = load_hf()
    inputs = for_hf(golden_inputs("square_8x8"))
    before = {name: (t.data_ptr(), t.clone()) for name, t in hf.state_dict(keep_vars=True).items()}
    attributes = set(vars(hf))
    plain = hf.generate(**inputs, max_new_tokens=8, do_sample=False)

    assert glimpse.accelerate(hf, GOLDEN / "gp_v1") is hf
    pruned = hf.generate(
        **inputs, max_new_tokens=16, do_sample=False, eos_token_id=None, return_dict_in_generate=True
    )
    stored = np.load(GOLDEN / "case_v1_square.npz")
    np.testing.assert_array_equal(pruned.sequences[:, -16:], stored["greedy_ids"])
    assert torch.equal(hf.generate(**inputs, max_new_tokens=8, do_sample=False, plan=None), plain)
    with pytest.raises(glimpse.GlimpseError, match="accelerated already"):
        glimpse.accelerate(hf)

    glimpse.restore(hf)
    assert set(vars(hf)) == attributes
    after = hf.state_dict(keep_vars=True)
    assert set(after) == set(before)
    for name, (pointer, value) in before.items():
        assert after[name].data_ptr() == pointer and torch.equal(after[name], value)
    assert torch.equal(hf.generate(**inputs, max_new_tokens=8, do_sample=False), plain)
    with pytest.raises(glimpse.GlimpseError, match="accelerate"):
        glimpse.restore(hf)


def test_off_means_off(hf_model, golden_inputs):
    inputs = for_hf(golden_inputs("two_images"))
    plain = hf_model.generate(**inputs, max_new_tokens=8, do_sample=False)
    glimpse.accelerate(hf_model)
    try:
        assert torch.equal(hf_model.generate(**inputs, max_new_tokens=8, do_sample=False), plain)
    finally:
        glimpse.restore(hf_model)


def test_failure_leaves_the_model_alone(hf_model, tmp_path):
    with pytest.raises(glimpse.CheckpointError):
        glimpse.accelerate(hf_model, tmp_path)
    assert "generate" not in vars(hf_model)

# SPDX-License-Identifier: Apache-2.0
"""Every recorded run of the original GlimpsePrune on Qwen2.5-VL, one quantity at a time (`glimpse_runtime.parity`)."""

from __future__ import annotations

import json
from contextlib import ExitStack

import numpy as np
import pytest

from glimpse_kernels import _triton
from glimpse_runtime.parity import case_names, load_manifest, run_case
from tests.kernels.kernel_cases import Case, forced_isa, isas_here

from .conftest import GOLDEN

MANIFEST = load_manifest(GOLDEN)
CASES = case_names(MANIFEST)


def test_the_manifest_lists_every_recording_in_the_folder():
    cases = {case["file"] for case in MANIFEST["cases"].values()}
    assert cases == {path.name for path in GOLDEN.glob("case_*.npz")} and len(cases) == 22


@pytest.mark.parametrize("name", CASES)
def test_case(name):
    result = run_case(GOLDEN, name)
    assert result.ok, result.failures
    compared = set(result.errors) | set(result.equal)
    recorded = set(MANIFEST["cases"].get(name, {"arrays": {"logits_last": []}})["arrays"])
    for array, quantity in {
        "glimpse_attn": "glimpse",
        "vip_logits": "vip",
        "keep_image_tokens": "mask",
        "reduced_position_ids": "positions",
        "k_0": "kv",
        "logits_last": "logits",
    }.items():
        assert array not in recorded or quantity in compared
    if result.dtype == "float32":
        assert max(result.errors.values()) <= 1e-4
        assert {"greedy"} <= set(result.equal) and {"steps"} <= set(result.errors)


@pytest.mark.parametrize("isa", isas_here())
@pytest.mark.parametrize("name", CASES)
def test_case_on_every_instruction_set(name, isa):
    """What an older processor runs gives the recorded masks and tokens too."""
    with forced_isa(isa):
        result = run_case(GOLDEN, name)
    assert result.ok, result.failures


INTERPRETED = (
    "v1_two_images",
    "v1_wide_windowed",
    "ratio_0111_batch2",
    "two_layers_le2",
    "dummy_two_images_thr",
    "logprob_wide",
    "bf16_square",
)
"""Cases that reach every kernel and layout: Triton's interpreter is slow."""


def _triton_cases() -> list[object]:
    if _triton.missing():
        return [pytest.param(CASES[0], marks=pytest.mark.skip(reason=_triton.missing()))]
    if _triton.interpreting():
        return list(INTERPRETED)
    return [pytest.param(name, marks=pytest.mark.gpu) for name in CASES]


@pytest.mark.parametrize("name", _triton_cases())
def test_case_on_triton_kernels(name):
    """The whole runtime on a GPU, or on its stand-in, gives what the original gave: nothing is left on the host."""
    with ExitStack() as stack:
        stack.enter_context(Case("all", "triton", None, None, "cuda").active())
        if _triton.interpreting():  # few programs: each costs milliseconds, whatever it does
            from glimpse_kernels.linear.triton import ROW, Row
            from tests.kernels.interpreter_bf16 import exact_bfloat16

            stack.enter_context(exact_bfloat16())
            stack.enter_context(ROW.forced(Row(warps=4, outputs=256)))
        result = run_case(GOLDEN, name, device="cuda")
    assert result.ok, result.failures


@pytest.mark.parametrize(
    ("name", "spoil", "quantity"),
    [
        ("v1_square", {"attn_fuse_global": False}, "vip"),
        ("v1_square", {"selected_visual_layers": [0, 1, 2, 3]}, "vip"),
        ("v1_square", {"use_attention_logits": False}, "glimpse"),
        ("v1_square", {"le_layers": [0, 1, 2, 3, 5, 4]}, None),
        ("v1_square", {"le_layers": [0, 2, 1, 3, 4, 5]}, "glimpse"),
    ],
)
def test_a_wrong_variant_is_noticed(tmp_path, name, spoil, quantity):
    """The comparison can fail: settings that change the computation are caught by the quantity they change."""
    for path in GOLDEN.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "manifest.json").unlink()
    manifest = json.loads((GOLDEN / "manifest.json").read_text())
    manifest["cases"][name]["overrides"] = spoil
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    result = run_case(tmp_path, name)
    if quantity is None:  # embeddings of layers behind the stage are never used
        assert result.ok
    else:
        assert result.errors[quantity] > 0.01 and not result.ok


def test_tied_scores_keep_the_recorded_number(manifest):
    """Where equal scores straddle the cut only the number of kept tokens means anything; no public case is one."""
    assert not any(case["margins"].get("mask_depends_on_tie_order") for case in manifest["cases"].values())


def test_second_prefill_of_the_same_model_is_unchanged(model, golden_inputs):
    stored = np.load(GOLDEN / "case_v1_square.npz")
    for _ in range(2):
        result = model.prefill(**golden_inputs("square_8x8"))
        np.testing.assert_allclose(result.last_logits, stored["logits_last"], atol=1e-4)

# SPDX-License-Identifier: Apache-2.0
"""Recorded runs of the original GlimpsePrune against this runtime, quantity by quantity.

A golden folder holds a ``manifest.json``, a base model, folders of modules, and ``.npz`` files with inputs and with
what the original computed (``tests/golden/glimpse/README.md`` describes every array). `run_case` replays one case and
says how far each quantity is off; the ``glimpse parity`` command and the tests print and judge the same results.

Limits. float32: every value within 1e-4; masks, positions and greedy tokens equal. bfloat16: two correct programs
round differently, so a value may be off by twice what two attention back-ends of the original were apart (the
manifest says how far), and the mask by at most 2 tokens; what follows the mask is computed from the recorded mask, and
greedy tokens, whose recorded margin is exactly 0, are not judged.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.model import GlimpseModel
from glimpse_runtime.modules import MODULES_FILE
from glimpse_runtime.prefill_result import PrefillResult

PLAIN = "plain/"
FLOAT32_LIMIT = 1e-4
BFLOAT16_MASK_LIMIT = 2
_NOISE = {
    "glimpse": "glimpse_attn_max_abs",
    "vip": "vip_logits_max_abs",
    "kv": "kv_max_abs",
    "logits": "prefill_last_logits_max_abs",
}
# What a call can say for itself; everything else of a case's settings goes into the modules' config.
_PER_CALL = {
    "reduce_threshold": "threshold",
    "max_remain_ratio": "max_remain_ratio",
    "min_remain_num": "min_remain_num",
    "anchor_positions": "anchor_positions",
}


@dataclass
class CaseResult:
    """How one case compares with the recording.

    Attributes:
        name, dtype: the case.
        errors: largest absolute difference of each quantity that was recorded: "glimpse" (logits of the glimpse
            token against the visual keys), "vip" (scores before the sigmoid), "kv" (pruned cache), "logits" (after
            the last prompt token), "steps" (best eight logits of every decoding step); "mask" counts tokens that
            differ.
        equal: "mask", "positions", "kept" (count), "greedy": exact comparisons.
        limits: the bound of each entry of `errors`.
        kept, total: visual tokens.
    """

    name: str
    dtype: str
    errors: dict[str, float] = field(default_factory=dict)
    equal: dict[str, bool] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    kept: int = 0
    total: int = 0

    @property
    def failures(self) -> list[str]:
        """What is off, in words; empty when the case passes."""
        wrong = [
            f"{name}: error {error:.3g} > {self.limits[name]:.3g}"
            for name, error in self.errors.items()
            if not error <= self.limits[name]  # NaN fails
        ]
        return wrong + [f"{name}: not equal" for name, same in self.equal.items() if not same]

    @property
    def ok(self) -> bool:
        return not self.failures


def load_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a golden folder.

    Raises:
        GlimpseError: the folder has none, or it describes another kind of recording.
    """
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise GlimpseError(f"golden folder: expected {str(path)!r}, found no such file")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GlimpseError(f"golden folder: {str(path)!r} is not JSON ({error})") from None
    missing = [key for key in ("base", "inputs", "cases", "gp_dirs") if key not in manifest]
    if missing:
        raise GlimpseError(
            f"golden folder: {str(path)!r} lacks {', '.join(missing)}: not a Qwen2.5-VL recording"
        )
    return manifest


def case_names(manifest: Mapping[str, Any]) -> list[str]:
    """Every case: the unpruned runs as ``plain/<input>`` first, then the pruned ones."""
    return [PLAIN + name for name in manifest["inputs"]] + list(manifest["cases"])


def run_case(folder: str | Path, name: str, *, device: str = "cpu") -> CaseResult:
    """Replays one case.

    Args:
        folder: golden folder.
        name: one of `case_names`.

    Raises:
        GlimpseError: no such case.
    """
    root, manifest = Path(folder), load_manifest(folder)
    if name not in case_names(manifest):
        raise GlimpseError(f"case: expected one of {', '.join(case_names(manifest))}; found {name!r}")
    if name.startswith(PLAIN):
        return _run_plain(root, manifest, name, device)
    case = manifest["cases"][name]
    recorded = _arrays(root / case["file"])
    source = _arrays(root / manifest["inputs"][case["input"]]["file"])
    inputs = _model_inputs(source)
    dtype = getattr(torch, case["dtype"])
    result = CaseResult(name, case["dtype"], limits=_limits(case))
    with _modules(root, manifest, case) as modules:
        model = GlimpseModel.from_pretrained(
            root / manifest["base"], glimpse=modules, dtype=dtype, device=device
        )
    if not case["do_selection"]:
        _compare_decoding(result, model.prefill(**inputs, plan=None), recorded, manifest["new_tokens"])
        return result
    options = {ours: case["settings"][theirs] for theirs, ours in _PER_CALL.items()}
    if "ref_masks" in recorded:
        inputs["ref_masks"] = recorded["ref_masks"]
        options = {key: options[key] for key in ("max_remain_ratio", "min_remain_num", "anchor_positions")}
    if dtype is torch.float32:
        ready = model.prefill(**inputs, **options)
        _compare_scores(result, ready, recorded)
    else:
        own = model.prefill(**inputs, **options)
        ready = model.prefill(**inputs, **options, select=False)
        _compare_scores(result, own, recorded)
        ready.select(recorded["keep_image_tokens"])
    _compare_cache(result, ready, recorded, case["kv_layers_stored"])
    _compare_decoding(result, ready, recorded, manifest["new_tokens"])
    return result


def _run_plain(root: Path, manifest: Mapping[str, Any], name: str, device: str) -> CaseResult:
    source = _arrays(root / manifest["inputs"][name.removeprefix(PLAIN)]["file"])
    model = GlimpseModel.from_pretrained(root / manifest["base"], dtype=torch.float32, device=device)
    result = CaseResult(name, "float32", limits=_limits({"dtype": "float32"}))
    recorded = {
        key.removeprefix("plain_"): value for key, value in source.items() if key.startswith("plain_")
    }
    _compare_decoding(result, model.prefill(**_model_inputs(source)), recorded, manifest["new_tokens"])
    return result


def _limits(case: Mapping[str, Any]) -> dict[str, float]:
    if case["dtype"] == "float32":
        return {**dict.fromkeys((*_NOISE, "steps"), FLOAT32_LIMIT), "mask": 0}
    apart = case["sdpa_vs_eager"]
    return {
        **{name: 2 * apart[key] for name, key in _NOISE.items() if key in apart},
        "mask": BFLOAT16_MASK_LIMIT,
    }


def _arrays(path: Path) -> dict[str, torch.Tensor]:
    with np.load(path, allow_pickle=False) as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored.files}


def _model_inputs(source: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
    return {name: source[name] for name in names}


@contextmanager
def _modules(root: Path, manifest: Mapping[str, Any], case: Mapping[str, Any]) -> Iterator[Path]:
    """A modules folder with a case's settings: the recorded weights under a rewritten config."""
    original = root / case["gp_dir"]
    config = json.loads((original / "config.json").read_text(encoding="utf-8"))
    config.update({key: value for key, value in case["overrides"].items() if key not in _PER_CALL})
    with tempfile.TemporaryDirectory(prefix="glimpse-parity-") as name:
        changed = Path(name)
        (changed / "config.json").write_text(json.dumps(config), encoding="utf-8")
        (changed / MODULES_FILE).symlink_to((original / MODULES_FILE).resolve())
        yield changed


def _distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    difference = (ours.double().cpu() - theirs.double()).abs()
    return float(difference.max()) if difference.numel() else 0.0


def _compare_scores(result: CaseResult, ready: PrefillResult, recorded: Mapping[str, torch.Tensor]) -> None:
    report = ready.pruning
    assert report is not None
    keep = torch.cat([picture.keep.flatten() for picture in report]).cpu()
    result.kept, result.total = int(keep.sum()), keep.numel()
    theirs = recorded["keep_image_tokens"]
    result.errors["mask"] = int((keep != theirs).sum()) if keep.shape == theirs.shape else float("inf")
    if result.dtype == "float32":
        result.equal["mask"] = torch.equal(keep, theirs)
        result.equal["kept"] = result.kept == int(theirs.sum())
    if "vip_logits" in recorded:
        logits = torch.cat([picture.logits.flatten() for picture in report if picture.logits is not None])
        result.errors["vip"] = _distance(logits, recorded["vip_logits"])
    if "glimpse_attn" in recorded:
        result.errors["glimpse"] = _distance(torch.stack(ready.glimpse_scores, 1), recorded["glimpse_attn"])


def _compare_cache(
    result: CaseResult, ready: PrefillResult, recorded: Mapping[str, torch.Tensor], layers: Sequence[int]
) -> None:
    """Pruned keys, values and positions, row by row without the recording's padding."""
    result.errors["kv"] = 0.0
    result.equal["positions"] = True
    for row, mask in enumerate(recorded["reduced_attention_mask"].bool()):
        positions = recorded["reduced_position_ids"][:, row, mask]
        result.equal["positions"] &= torch.equal(ready.kept_positions[row].cpu().long(), positions)
        for layer in layers:
            for ours, name in zip(ready.kv(row, layer), ("k", "v"), strict=True):
                theirs = recorded[f"{name}_{layer}"][row][:, mask].transpose(0, 1)
                result.errors["kv"] = max(result.errors["kv"], _distance(ours, theirs))


def _compare_decoding(
    result: CaseResult, ready: PrefillResult, recorded: Mapping[str, torch.Tensor], steps: int
) -> None:
    result.errors["logits"] = _distance(ready.last_logits, recorded["logits_last"])
    if result.dtype != "float32":
        return
    tokens, logits = ready.decode(steps)
    result.equal["greedy"] = torch.equal(tokens.cpu(), recorded["greedy_ids"])
    if result.equal["greedy"]:  # after a different token the steps are different questions
        best = logits.cpu().gather(-1, recorded["step_top_ids"])
        result.errors["steps"] = _distance(best, recorded["step_top_logits"])

# SPDX-License-Identifier: Apache-2.0
"""GlimpsePrune's trained modules: settings, folded glimpse vectors, and the predictor's weights."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from glimpse_kernels import VipWeights
from glimpse_runtime.errors import CheckpointError
from glimpse_runtime.hub import read_json, resolve_folder
from glimpse_runtime.models.qwen2_5_vl.config import ModelConfig
from glimpse_runtime.stages.scorers import Probe

MODULES_FILE = "new_modules_gp.pt"
PARTS = ("attn_fuser", "learnable_embeddings", "le_proj", "le_norm")


@dataclass(frozen=True)
class GlimpseSettings:
    """The settings of a GlimpsePrune folder's `config.json` that matter for inference."""

    selected_layers: tuple[int, ...]
    reduce_layer: int
    selected_visual_layers: tuple[int, ...]
    le_layers: tuple[int, ...]
    le_length: int
    le_norm_type: str
    attn_fuse_type: str
    attn_fuse_num_heads: int
    attn_fuse_size: int
    visual_cond_size: int
    attn_fuse_hidden_act: str = "silu"
    attn_fuse_global: bool = True
    use_attention_logits: bool = True
    reduce_threshold: float = 0.5
    max_remain_ratio: float | None = None
    min_remain_num: int = 1
    anchor_positions: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> GlimpseSettings:
        """Read a parsed `config.json`.

        Raises:
            CheckpointError: a required setting is missing or has a value this runtime does not know.
        """
        required = [f.name for f in fields(cls) if f.default is MISSING]
        missing = [name for name in required if config.get(name) is None]
        if missing:
            raise CheckpointError(
                f"config.json: expected the GlimpsePrune settings {missing}, found none of them"
            )
        # A setting that is null means its default.
        values = {f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None}
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        settings = cls(**values)
        settings._check_types()
        asked = [name for name in ("use_ref_masks", "use_zero_masks") if config.get(name)]
        if asked:
            raise CheckpointError(
                f"{asked[0]}: expected false, found true; keep masks come with the call (ref_masks=)"
            )
        if settings.le_norm_type not in ("rmsnorm", "layernorm"):
            raise CheckpointError(
                f"le_norm_type: expected 'rmsnorm' or 'layernorm', found {settings.le_norm_type!r}"
            )
        if settings.le_length < 1:
            raise CheckpointError(f"le_length: expected at least 1, found {settings.le_length}")
        if 0 not in settings.le_layers or len(set(settings.le_layers)) != len(settings.le_layers):
            raise CheckpointError(
                f"le_layers: expected layer 0 and no layer twice, found {list(settings.le_layers)}"
            )
        return settings

    def _check_types(self) -> None:
        numbers = ("reduce_layer", "le_length", "attn_fuse_num_heads", "attn_fuse_size", "visual_cond_size")
        for name in numbers:
            if not isinstance(getattr(self, name), int):
                raise CheckpointError(f"{name}: expected an integer, found {getattr(self, name)!r}")
        for name in ("selected_layers", "selected_visual_layers", "le_layers"):
            layers = getattr(self, name)
            if not isinstance(layers, tuple) or not layers or not all(isinstance(n, int) for n in layers):
                raise CheckpointError(f"{name}: expected a list of layer numbers, found {layers!r}")


@dataclass(frozen=True)
class GlimpseModules:
    """A loaded GlimpsePrune folder, fitted to one base model."""

    settings: GlimpseSettings
    probe: Probe
    vip: VipWeights

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, base: ModelConfig, *, dtype: torch.dtype, device: torch.device
    ) -> GlimpseModules:
        """Load `config.json` and `new_modules_gp.pt` from a folder or hub id, for the given base.

        Raises:
            CheckpointError: files, keys or shapes are missing, left over, or belong to another base.
        """
        path = resolve_folder(folder, "config.json", MODULES_FILE)
        config = read_json(path / "config.json")
        settings = GlimpseSettings.from_config(config)
        _check_base(config, settings, base)
        parts = _read_parts(path / MODULES_FILE)
        if settings.attn_fuse_type != "AttnFuserDummy":
            _check_fuser_inputs(settings, base, parts["attn_fuser"])
        try:
            vip = VipWeights.from_state_dict(parts["attn_fuser"], config).to(dtype=dtype, device=device)
        except ValueError as error:
            raise CheckpointError(f"{path / MODULES_FILE}: {error}") from error
        vectors = _fold_probe(settings, base, parts)
        probe = Probe(
            settings.le_length, {layer: v.to(dtype=dtype, device=device) for layer, v in vectors.items()}
        )
        return cls(settings, probe, vip)


def _read_parts(path: Path) -> dict[str, Any]:
    try:
        parts = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(
            f"{path}: expected a dict of tensors (read with weights_only=True): {error}"
        ) from error
    found = sorted(parts) if isinstance(parts, dict) else type(parts).__name__
    if not isinstance(parts, dict) or set(parts) != set(PARTS):
        raise CheckpointError(f"{path}: expected the entries {sorted(PARTS)}, found {found}")
    return parts


def _check_base(config: Mapping[str, Any], settings: GlimpseSettings, base: ModelConfig) -> None:
    text, vision = base.text, base.vision
    family = config.get("model_type", "qwen2_5_vl_gp")
    if family != "qwen2_5_vl_gp":
        raise CheckpointError(f"model_type: expected modules of type 'qwen2_5_vl_gp', found {family!r}")
    expected = {
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "vocab_size": text.vocab_size,
    }
    flat = {**config, **(config.get("text_config") or {})}
    wrong = {k: (v, flat[k]) for k, v in expected.items() if k in flat and flat[k] != v}
    if wrong:
        told = ", ".join(
            f"{name} {have} (the modules were made for {want})" for name, (have, want) in wrong.items()
        )
        raise CheckpointError(f"these GlimpsePrune modules belong to another base: the given base has {told}")
    for name, layers, depth in (
        ("selected_layers", settings.selected_layers, text.num_layers),
        ("le_layers", settings.le_layers, text.num_layers),
        ("selected_visual_layers", settings.selected_visual_layers, vision.depth),
    ):
        beyond = [layer for layer in layers if not 0 <= layer < depth]
        if beyond:
            raise CheckpointError(f"{name}: expected numbers below the base's {depth} layers, found {beyond}")


def _check_fuser_inputs(
    settings: GlimpseSettings, base: ModelConfig, fuser: Mapping[str, torch.Tensor]
) -> None:
    wanted = {"attn_in_proj.weight": len(settings.selected_layers) * base.text.num_heads}
    if settings.attn_fuse_type == "AttnFuserV1":
        for i in range(len(settings.selected_visual_layers)):
            wanted[f"cond_in_projs.{i}.weight"] = base.vision.hidden_size
    for name, width in wanted.items():
        if name in fuser and fuser[name].shape[-1] != width:
            raise CheckpointError(
                f"attn_fuser {name}: expected {width} inputs for this base, found {fuser[name].shape[-1]}; "
                "the modules belong to another base"
            )


def _fold_probe(
    settings: GlimpseSettings, base: ModelConfig, parts: Mapping[str, Any]
) -> dict[int, torch.Tensor]:
    """`le_norm(le_proj(embedding))` of every layer: constants of the checkpoint. fp32 `[le_length, width]` each."""
    width = base.text.hidden_size
    shape = (len(settings.le_layers), settings.le_length, width)
    embeddings = _tensor("learnable_embeddings", parts["learnable_embeddings"], shape)
    proj = _state("le_proj", parts["le_proj"], {"weight": (width, width), "bias": (width,)})
    projected = F.linear(embeddings, proj["weight"], proj["bias"])
    if settings.le_norm_type == "rmsnorm":
        norm = _state("le_norm", parts["le_norm"], {"weight": (width,)})
        vectors = F.rms_norm(projected, (width,), norm["weight"], eps=1e-6)
    else:
        norm = _state("le_norm", parts["le_norm"], {"weight": (width,), "bias": (width,)})
        vectors = F.layer_norm(projected, (width,), norm["weight"], norm["bias"])
    return dict(zip(settings.le_layers, vectors.unbind(0), strict=True))


def _state(part: str, found: Any, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    if not isinstance(found, Mapping) or set(found) != set(wanted):
        keys = sorted(found) if isinstance(found, Mapping) else type(found).__name__
        raise CheckpointError(f"{part}: expected the keys {sorted(wanted)}, found {keys}")
    return {key: _tensor(f"{part}.{key}", found[key], shape) for key, shape in wanted.items()}


def _tensor(name: str, found: Any, shape: tuple[int, ...]) -> torch.Tensor:
    if not isinstance(found, torch.Tensor) or tuple(found.shape) != shape:
        have = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise CheckpointError(f"{name}: expected shape {list(shape)}, found {have}")
    return found.float()

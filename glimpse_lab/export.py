# SPDX-License-Identifier: Apache-2.0
"""Writes the small model as Hugging Face and GlimpsePrune folders. A folder is replaced as a whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from glimpse_lab.tokens import save_processor_files
from glimpse_lab.train.config import ModelShape


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Lets ``write`` fill a fresh folder, then puts it in the place of ``folder``."""
    part = folder.with_name(folder.name + ".part")
    old = folder.with_name(folder.name + ".old")
    for stale in (part, old):
        shutil.rmtree(stale, ignore_errors=True)
    part.mkdir(parents=True)
    write(part)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def export_base(
    shape: ModelShape, tokenizer: PreTrainedTokenizerFast, state: dict[str, torch.Tensor], folder: Path
) -> None:
    """The base model, bfloat16, with tokenizer, processor settings, chat template and generation settings."""
    model = Qwen2_5_VLForConditionalGeneration(shape.hf_config(tokenizer))
    model.load_state_dict(state)
    model = model.to(torch.bfloat16)
    model.generation_config.do_sample = False
    model.generation_config.max_new_tokens = 64
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(model.config.text_config, name))

    def write(part: Path) -> None:
        model.save_pretrained(part)
        save_processor_files(tokenizer, part)
        (part / "model.safetensors").chmod(0o644)

    replace_folder(folder, write)


def glimpse_settings(shape: ModelShape) -> dict[str, Any]:
    """GlimpsePrune's settings for this base."""
    return {
        "selected_layers": [shape.reduce_layer],
        "use_attention_logits": True,
        "attn_fuse_type": "AttnFuserV1",
        "attn_fuse_size": shape.fuse_size,
        "visual_cond_size": shape.cond_size,
        "attn_fuse_num_heads": shape.fuse_heads,
        "attn_fuse_hidden_act": "silu",
        "attn_fuse_global": True,
        "selected_visual_layers": list(reversed(range(shape.vision_layers))),
        "ori_attn_supervision": False,
        "deep_supervision": False,
        "le_layers": list(range(shape.layers)),
        "le_length": 1,
        "le_dropout_prob": 0.0,
        "le_norm_type": "rmsnorm",
        "reduce_threshold": 0.5,
        "use_ref_masks": False,
        "use_zero_masks": False,
        "reduce_layer": shape.reduce_layer,
        "anchor_positions": [],
        "min_remain_num": 1,
        "max_remain_ratio": None,
    }


def export_glimpse(
    shape: ModelShape, tokenizer: PreTrainedTokenizerFast, new_modules: dict[str, Any], folder: Path
) -> None:
    """GlimpsePrune's modules, bfloat16: ``new_modules_gp.pt`` and a flat ``config.json`` (model type qwen2_5_vl_gp)."""
    config = shape.hf_config(tokenizer)
    text, vision = config.text_config, config.vision_config
    text_names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "hidden_act", "rms_norm_eps", "vocab_size", "max_position_embeddings", "max_window_layers",
        "initializer_range", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    vision_names = (
        "model_type", "depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size", "hidden_act",
        "in_channels", "patch_size", "spatial_merge_size", "temporal_patch_size", "tokens_per_second", "window_size",
        "fullatt_block_indexes",
    )  # fmt: skip
    token_names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    rope = text.rope_parameters
    settings = {
        "model_type": "qwen2_5_vl_gp",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": list(rope["mrope_section"])},
        **{name: getattr(text, name) for name in text_names},
        **{name: getattr(config, name) for name in token_names},
        "vision_config": {name: getattr(vision, name) for name in vision_names},
        **glimpse_settings(shape),
    }

    def cast(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: cast(v) for k, v in value.items()}
        return value.detach().to("cpu", torch.bfloat16).contiguous().clone()

    def write(part: Path) -> None:
        (part / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        torch.save(cast(new_modules), part / "new_modules_gp.pt")

    replace_folder(folder, write)

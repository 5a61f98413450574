# SPDX-License-Identifier: Apache-2.0
"""Model shapes to measure on, as Hugging Face configs, and random weights for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # the kernel benchmarks want sizes only, and transformers takes seconds to import
    from transformers import Qwen2_5_VLForConditionalGeneration

MERGED_PIXELS = 28  # side of the square that becomes one visual token


def _config(text: dict[str, Any], vision: dict[str, Any], sections: list[int]) -> dict[str, Any]:
    special = text["vocab_size"] - 8
    return {
        "model_type": "qwen2_5_vl",
        "text_config": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "bos_token_id": None,
            "eos_token_id": None,
            **text,
        },
        "vision_config": {
            "patch_size": 14,
            "window_size": 112,
            "out_hidden_size": text["hidden_size"],
            **vision,
        },
        "image_token_id": special,
        "video_token_id": special + 1,
        "vision_start_token_id": special + 2,
        "vision_end_token_id": special + 3,
    }


# name → (config, glimpse layer K, vision taps of the predictor)
SHAPES: dict[str, tuple[dict[str, Any], int, list[int]]] = {
    "mid": (
        _config(
            {
                "hidden_size": 1024,
                "num_hidden_layers": 16,
                "num_attention_heads": 8,
                "num_key_value_heads": 2,
                "intermediate_size": 4096,
                "vocab_size": 8192,
                "tie_word_embeddings": False,
            },
            {
                "depth": 16,
                "hidden_size": 640,
                "num_heads": 8,
                "intermediate_size": 1712,
                "fullatt_block_indexes": [3, 7, 11, 15],
            },
            [16, 24, 24],
        ),
        10,
        [15, 11, 7, 3],
    ),
    "3b": (
        _config(
            {
                "hidden_size": 2048,
                "num_hidden_layers": 36,
                "num_attention_heads": 16,
                "num_key_value_heads": 2,
                "intermediate_size": 11008,
                "vocab_size": 151936,
                "tie_word_embeddings": True,
            },
            {
                "depth": 32,
                "hidden_size": 1280,
                "num_heads": 16,
                "intermediate_size": 3420,
                "fullatt_block_indexes": [7, 15, 23, 31],
            },
            [16, 24, 24],
        ),
        23,
        [31, 23, 15, 7],
    ),
    "7b": (
        _config(
            {
                "hidden_size": 3584,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "intermediate_size": 18944,
                "vocab_size": 152064,
                "tie_word_embeddings": False,
            },
            {
                "depth": 32,
                "hidden_size": 1280,
                "num_heads": 16,
                "intermediate_size": 3420,
                "fullatt_block_indexes": [7, 15, 23, 31],
            },
            [16, 24, 24],
        ),
        18,
        [31, 23, 15, 7],
    ),
}


def build(name: str, dtype: torch.dtype, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """Stock transformers model of a shape: weights uniform in ±0.02, norms 1, sdpa attention."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.initialization import no_init_weights

    config = Qwen2_5_VLConfig(**SHAPES[name][0])
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights():
            model = Qwen2_5_VLForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator().manual_seed(seed)
    for key, weight in model.named_parameters():
        with torch.no_grad():
            if weight.ndim == 1 and "bias" not in key:
                weight.fill_(1.0)
            else:
                weight.uniform_(-0.02, 0.02, generator=generator)
    model.tie_weights()
    return model


def write_modules(name: str, folder: Path, seed: int = 0) -> Path:
    """GlimpsePrune modules of published size with random weights for a shape."""
    config, layer, taps = SHAPES[name]
    text, vision = config["text_config"], config["vision_config"]
    width, size, cond = text["hidden_size"], 256, 512
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    def linear(prefix: str, rows: int, cols: int, *, bias: bool = True) -> dict[str, torch.Tensor]:
        return {f"{prefix}.weight": rand(rows, cols)} | (
            {f"{prefix}.bias": torch.zeros(rows)} if bias else {}
        )

    fuser = linear("attn_in_proj", size, text["num_attention_heads"])
    for i in range(len(taps)):
        at = f"layers.{i}"
        fuser |= linear(f"cond_in_projs.{i}", cond, vision["hidden_size"])
        fuser |= {f"{at}.norm1.weight": torch.ones(size), f"{at}.norm2.weight": torch.ones(size)}
        for which in "qk":
            fuser |= linear(f"{at}.attn.{which}_proj", size + cond, size + cond, bias=False)
        for which in "vo":
            fuser |= linear(f"{at}.attn.{which}_proj", size, size, bias=False)
        fuser |= linear(f"{at}.mlp.gate_proj", 2 * size, size) | linear(f"{at}.mlp.up_proj", 2 * size, size)
        fuser |= linear(f"{at}.mlp.down_proj", size, 2 * size)
    fuser |= linear(f"attn_out_projs.{len(taps) - 1}", 1, size)
    parts = {
        "attn_fuser": fuser,
        "learnable_embeddings": rand(text["num_hidden_layers"], 1, width),
        "le_proj": {"weight": rand(width, width), "bias": torch.zeros(width)},
        "le_norm": {"weight": torch.full((width,), 0.02)},
    }
    settings = {
        "selected_layers": [layer],
        "reduce_layer": layer,
        "selected_visual_layers": taps,
        "le_layers": list(range(text["num_hidden_layers"])),
        "le_length": 1,
        "le_norm_type": "rmsnorm",
        "attn_fuse_type": "AttnFuserV1",
        "attn_fuse_num_heads": 4,
        "attn_fuse_size": size,
        "visual_cond_size": cond,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    torch.save(parts, folder / "new_modules_gp.pt")
    return folder


def question(name: str, pixels: int, text_tokens: int = 61, seed: int = 0) -> dict[str, torch.Tensor]:
    """Processor outputs for one noise picture of `pixels` × `pixels` and `text_tokens` of text around it."""
    config = SHAPES[name][0]
    side = pixels // MERGED_PIXELS
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, 4096, (text_tokens - 2,), generator=generator).tolist()
    image = [config["image_token_id"]] * side**2
    ids = [*words[:14], config["vision_start_token_id"], *image, config["vision_end_token_id"], *words[14:]]
    input_ids = torch.tensor([ids])
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn(4 * side**2, 1176, generator=generator),
        "image_grid_thw": torch.tensor([[1, 2 * side, 2 * side]]),
        "mm_token_type_ids": (input_ids == config["image_token_id"]).int(),
    }

# SPDX-License-Identifier: Apache-2.0
"""The numbers of a Qwen2.5-VL checkpoint, read from any spelling of its Hugging Face config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from glimpse_runtime.errors import CheckpointError


@dataclass(frozen=True)
class VisionConfig:
    """Shape of the vision tower."""

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    out_hidden_size: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    in_channels: int
    window_size: int
    full_attention_blocks: tuple[int, ...]
    tokens_per_second: float
    rope_theta: float
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def merge_unit(self) -> int:
        """Patches that become one visual token."""
        return self.merge_size**2

    @property
    def patch_dim(self) -> int:
        """Values of one flattened patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class TextConfig:
    """Shape of the decoder."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    max_positions: int
    tie_word_embeddings: bool


@dataclass(frozen=True)
class ModelConfig:
    """Everything the runtime needs to know about a Qwen2.5-VL checkpoint."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    video_token_id: int

    @classmethod
    def from_hf(cls, config: Any) -> ModelConfig:
        """Read a `transformers` `Qwen2_5_VLConfig`.

        Raises:
            CheckpointError: the config is of another family or asks for something this runtime does not compute.
        """
        if getattr(config, "model_type", None) != "qwen2_5_vl":
            raise CheckpointError(
                f"expected a checkpoint of model_type 'qwen2_5_vl', found {getattr(config, 'model_type', None)!r}"
            )
        text, vision = config.text_config, config.vision_config
        _require("text hidden_act", text.hidden_act, "silu")
        _require("vision hidden_act", vision.hidden_act, "silu")
        if getattr(text, "use_sliding_window", False):
            raise CheckpointError(
                "use_sliding_window=true is not supported: expected full attention in every layer"
            )
        rope = dict(text.rope_parameters)
        _require("rope type", rope.get("rope_type", "default"), "default")
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        sections = tuple(int(s) for s in rope.get("mrope_section", (16, 24, 24)))
        if len(sections) != 3 or sum(sections) != head_dim // 2:
            raise CheckpointError(
                f"mrope_section must be three numbers that add up to head_dim / 2 = {head_dim // 2}, found {sections}"
            )
        return cls(
            text=TextConfig(
                num_layers=text.num_hidden_layers,
                hidden_size=text.hidden_size,
                num_heads=text.num_attention_heads,
                num_kv_heads=text.num_key_value_heads,
                head_dim=head_dim,
                intermediate_size=text.intermediate_size,
                vocab_size=text.vocab_size,
                eps=text.rms_norm_eps,
                rope_theta=float(rope.get("rope_theta", 1e6)),
                mrope_section=(sections[0], sections[1], sections[2]),
                max_positions=text.max_position_embeddings,
                tie_word_embeddings=bool(config.tie_word_embeddings),
            ),
            vision=VisionConfig(
                depth=vision.depth,
                hidden_size=vision.hidden_size,
                num_heads=vision.num_heads,
                intermediate_size=vision.intermediate_size,
                out_hidden_size=vision.out_hidden_size,
                patch_size=vision.patch_size,
                temporal_patch_size=vision.temporal_patch_size,
                merge_size=vision.spatial_merge_size,
                in_channels=vision.in_channels,
                window_size=vision.window_size,
                full_attention_blocks=tuple(vision.fullatt_block_indexes),
                tokens_per_second=float(vision.tokens_per_second),
                rope_theta=float((getattr(vision, "rope_parameters", None) or {}).get("rope_theta", 10000.0)),
            ),
            image_token_id=config.image_token_id,
            video_token_id=config.video_token_id,
        )


def _require(name: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise CheckpointError(f"{name}: expected {expected!r}, found {found!r}")

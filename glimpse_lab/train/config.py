# SPDX-License-Identifier: Apache-2.0
"""Shapes of the small model and settings of its two training runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the base and of GlimpsePrune's modules. ``reduce_layer`` is the glimpse layer K (counted from 0)."""

    hidden: int = 128
    layers: int = 10
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 384
    rope_theta: float = 1000.0
    mrope_section: tuple[int, int, int] = (4, 2, 10)
    vision_hidden: int = 128
    vision_layers: int = 4
    vision_heads: int = 4
    vision_mlp: int = 256
    reduce_layer: int = 5
    fuse_size: int = 64
    cond_size: int = 64
    fuse_heads: int = 4

    def hf_config(self, tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
        ids = {t: tokenizer.convert_tokens_to_ids(t) for t in tokenizer.all_special_tokens}
        return Qwen2_5_VLConfig(
            vocab_size=512,
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=4096,
            max_window_layers=self.layers,
            rms_norm_eps=1e-6,
            rope_theta=self.rope_theta,
            rope_scaling={"type": "mrope", "mrope_section": list(self.mrope_section)},
            bos_token_id=ids["<|endoftext|>"],
            eos_token_id=ids["<|im_end|>"],
            pad_token_id=ids["<|endoftext|>"],
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
            tie_word_embeddings=False,
            vision_config=dict(
                depth=self.vision_layers,
                hidden_size=self.vision_hidden,
                intermediate_size=self.vision_mlp,
                num_heads=self.vision_heads,
                out_hidden_size=self.hidden,
                fullatt_block_indexes=list(range(self.vision_layers)),
                patch_size=14,
                spatial_merge_size=2,
                temporal_patch_size=2,
                tokens_per_second=2,
                window_size=112,
                in_channels=3,
            ),
        )


@dataclass(frozen=True)
class Stage:
    """A stretch of training: how long, and how often each picture size is drawn."""

    steps: int
    sizes: dict[tuple[int, int], float]


_SMALL = {(168, 168): 5.0, (168, 224): 1.0, (224, 168): 1.0}
_ALL = {
    (168, 168): 5.0, (168, 224): 2.0, (224, 168): 2.0, (224, 224): 3.0, (168, 336): 1.5, (280, 280): 2.0, (336, 224): 1.0,
    (224, 336): 1.0, (336, 336): 1.5, (448, 224): 1.0, (224, 448): 1.0, (392, 392): 1.0, (448, 448): 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class BaseRun:
    """Settings of base training.

    The stages come first, on one warm-up, constant, linear-decay schedule. Then ``drop_steps`` more, at a rate that falls
    from ``drop_rate`` of the base rate to zero, in which ``drop_share`` of the questions lose, after ``drop_layer``, image
    tokens that their answers do not need: without it the model uses empty background as a place to rest its attention
    and misses it once it is pruned. A batch has about ``tokens`` image + text positions, whatever the picture size.
    """

    seed: int = 1
    stages: tuple[Stage, ...] = (Stage(400, _SMALL), Stage(1450, _ALL))
    decay_steps: int = 850
    drop_steps: int = 110
    drop_rate: float = 0.2
    drop_share: float = 0.6
    drop_layer: int = 5
    tokens: int = 6400
    text_length: int = 160
    more_patches: int = 5800
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    warmup: int = 50
    weight_decay: float = 0.01
    point_weight: float = 0.3
    cell_weight: float = 0.5
    point_layers: tuple[int, int] = (5, 7)
    short_until: int = 600
    save_every: int = 200
    eval_every: int = 200
    eval_batches: int = 4

    @property
    def main_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)


@dataclass(frozen=True)
class ModulesRun:
    """Settings of the glimpse modules' training, base frozen."""

    seed: int = 2
    steps: int = 550
    decay_steps: int = 250
    tokens: int = 3600
    text_length: int = 160
    sizes: dict[tuple[int, int], float] = field(default_factory=lambda: dict(_ALL))
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    warmup: int = 20
    dice_weight: float = 1.0
    bce_weight: float = 0.1
    answer_weight: float = 0.1
    save_every: int = 50
    eval_every: int = 100

# SPDX-License-Identifier: Apache-2.0
"""What a request has to do at least: FLOPs of each phase, bytes of a decode step, bytes of the weights.

A multiply-add is two FLOPs. Counted are matrix products and attention, which are all but everything; hidden halves of
causal attention, and what pruning leaves out, are not counted. The phases are those of `glimpse_runtime.timings`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch

from glimpse_kernels import VipWeights
from glimpse_runtime.models.qwen2_5_vl.config import TextConfig, VisionConfig
from glimpse_runtime.models.qwen2_5_vl.decoder import Decoder
from glimpse_runtime.models.qwen2_5_vl.linear import LinearGroup


@dataclass(frozen=True)
class Flops:
    """Of matrix products with weights, and of attention (two products of activations)."""

    gemm: float = 0.0
    attention: float = 0.0

    @property
    def total(self) -> float:
        return self.gemm + self.attention

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.gemm + other.gemm, self.attention + other.attention)


def vision(config: VisionConfig, grid: tuple[int, int, int]) -> Flops:
    """The vision tower on one picture of `grid` (frames, height, width) patches."""
    frames, height, width = grid
    patches, hidden, unit = frames * height * width, config.hidden_size, config.merge_unit
    block = 4 * hidden * hidden + 3 * hidden * config.intermediate_size  # q, k, v, output; gate, up, down
    merged = unit * hidden
    merger = merged * merged + merged * config.out_hidden_size
    gemm = patches * (config.patch_dim * hidden + config.depth * block) + patches // unit * merger
    full = len(config.full_attention_blocks)
    seen = full * frames * (height * width) ** 2
    seen += (config.depth - full) * frames * sum(n * n for n in windows(config, height, width))
    return Flops(2.0 * gemm, 4.0 * hidden * seen)


def windows(config: VisionConfig, height: int, width: int) -> list[int]:
    """Patches in each attention window of a frame; those at the right and lower edge may be smaller."""
    side = config.window_size // config.patch_size
    return [
        min(side, height - y) * min(side, width - x)
        for y in range(0, height, side)
        for x in range(0, width, side)
    ]


def layers(config: TextConfig, rows: int, count: int) -> Flops:
    """`count` decoder layers, all of each for all rows, causal."""
    per_row = _queries(config) + _keys_values(config) + _behind_attention(config)
    return Flops(2.0 * count * rows * per_row, count * _attention(config, rows * (rows + 1) // 2))


def to_first_token(config: TextConfig, rows: int, first: int = 0) -> Flops:
    """Layers `first`.. on packed rows: the last one computes keys and values for all, the rest for the last row alone."""
    last = rows * _keys_values(config) + _queries(config) + _behind_attention(config)
    head = config.hidden_size * config.vocab_size
    return (
        layers(config, rows, config.num_layers - 1 - first)
        + Flops(2.0 * last, _attention(config, rows))
        + Flops(2.0 * head)
    )


def to_scores(config: TextConfig, rows: int, stage: int, image_rows: int, predictor: VipWeights) -> Flops:
    """Phase "before": layers up to `stage`, of which keys and values for all rows and one row's glance at the picture;
    and the predictor's conditions."""
    glance = Flops(2.0 * (rows * _keys_values(config) + _queries(config)), _attention(config, image_rows) / 2)
    conditions = Flops(2.0 * image_rows * sum(p.weight.numel() for p in predictor.cond_projs))
    return layers(config, rows, stage) + glance + conditions


def prediction(predictor: VipWeights, image_rows: int) -> Flops:
    """Phase "select": the predictor on one picture, which attends to all of it. Selection and copies cost no FLOPs."""
    ends = [p for p in (predictor.in_proj, predictor.out_proj) if p is not None]
    inner = [p for m in predictor.layers for p in (m.q, m.k, m.v, m.o, m.gate, m.up, m.down)]
    seen = sum(m.q.weight.shape[0] + m.v.weight.shape[0] for m in predictor.layers)
    gemm = 2.0 * image_rows * sum(p.weight.numel() for p in (*ends, *inner))
    return Flops(gemm, 2.0 * image_rows * image_rows * seen)


def after_pruning(config: TextConfig, stage: int, kept: Sequence[int]) -> Flops:
    """Phase "after": the rest of layer `stage` for the rows that stay, whose places in the prompt are `kept`, then the
    layers behind it on them alone."""
    gemm = 2.0 * len(kept) * (_queries(config) + _behind_attention(config))
    stage_rest = Flops(gemm, _attention(config, sum(place + 1 for place in kept)))
    return stage_rest + to_first_token(config, len(kept), stage + 1)


def decode_bytes(decoder: Decoder, length: float) -> float:
    """What one step for one sequence has to read: all weights, and keys and values of `length` rows."""
    held = nbytes((decoder.layers, decoder.norm, decoder.lm_head)) + decoder.embed[0].nbytes
    return held + kv_bytes(decoder.config, length, decoder.dtype)


def kv_bytes(config: TextConfig, rows: float, dtype: torch.dtype) -> float:
    """Keys and values of `rows` rows in all layers."""
    return 2.0 * config.num_layers * rows * config.num_kv_heads * config.head_dim * dtype.itemsize


def nbytes(held: Any) -> int:
    """Bytes of all tensors in a structure of dataclasses and containers, memory that is shared counted once."""
    return sum({t.data_ptr(): t.nbytes for t in tensors(held)}.values())


def tensors(held: Any) -> Iterator[torch.Tensor]:
    """All tensors in a structure of dataclasses, containers and product groups."""
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, Mapping):
        yield from tensors(tuple(held.values()))
    elif isinstance(held, (tuple, list)):
        for part in held:
            yield from tensors(part)
    elif isinstance(held, LinearGroup):
        yield from tensors(held.parts)
    elif is_dataclass(held):
        for field in fields(held):
            yield from tensors(getattr(held, field.name))


def _queries(config: TextConfig) -> int:
    return config.hidden_size * config.num_heads * config.head_dim


def _keys_values(config: TextConfig) -> int:
    return 2 * config.hidden_size * config.num_kv_heads * config.head_dim


def _behind_attention(config: TextConfig) -> int:
    """Output projection, gate, up and down."""
    return _queries(config) + 3 * config.hidden_size * config.intermediate_size


def _attention(config: TextConfig, pairs: float) -> float:
    """FLOPs of `pairs` of a query and a key that it sees, all heads."""
    return 4.0 * pairs * config.num_heads * config.head_dim

# SPDX-License-Identifier: Apache-2.0
"""The Qwen2.5-VL decoder on packed rows, one sublayer at a time.

The caller owns order and memory (prefill, decode); this file knows what a layer computes. The residual stream is kept
as the pair (`hidden`, `delta`): the last sublayer's output is added by the next norm, in one pass over memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from glimpse_kernels import mrope_cos_sin, rms_norm
from glimpse_runtime.models.qwen2_5_vl.config import TextConfig
from glimpse_runtime.models.qwen2_5_vl.linear import GatedLinear, Linear, LinearGroup, mlp, mlp_rows


@dataclass(frozen=True)
class DecoderLayer:
    """Weights of one layer; `qkv` holds the query, key and value projections in this order."""

    input_norm: torch.Tensor
    qkv: LinearGroup
    o_proj: Linear
    post_norm: torch.Tensor
    gated: GatedLinear
    down: Linear


@dataclass
class Stream:
    """Rows on their way through the decoder.

    Attributes:
        hidden: `[T, width]` residual stream, updated in place.
        delta: `[T, width]` output of the last sublayer, not yet added to `hidden`; None before the first one.
        cos, sin: `[T, head_dim / 2]` fp32 rotary tables of the rows.
    """

    hidden: torch.Tensor
    delta: torch.Tensor | None
    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True)
class Buffers:
    """Where the sublayers' results go, the same place in every layer; T rows each.

    Fresh memory for each result would have to be mapped page by page, again and again.

    Attributes:
        x: `[T, width]` normed input of a sublayer.
        qkv: `[T, heads * head_dim]` each; on a GPU columns of one tensor, so that one product can write all three.
        attended: `[T, heads, head_dim]`.
        inner: `[T, intermediate]`, or as many rows as the MLP takes at once.
        delta: `[T, width]` output of a sublayer.
    """

    x: torch.Tensor
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    attended: torch.Tensor
    inner: torch.Tensor
    delta: torch.Tensor

    @classmethod
    def allocate(
        cls,
        config: TextConfig,
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
        empty: Callable[[str, tuple[int, ...], torch.dtype], torch.Tensor] | None = None,
    ) -> Buffers:
        """New memory, or what `empty(name, shape, dtype)` gives."""

        def room(name: str, *shape: int) -> torch.Tensor:
            if empty is not None:
                return empty(name, shape, dtype)
            return torch.empty(shape, dtype=dtype, device=device)

        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        sizes = (queries, keys, keys)
        if device.type == "cpu":
            q, k, v = (room(name, rows, size) for name, size in zip("qkv", sizes, strict=True))
        else:
            q, k, v = room("qkv", rows, sum(sizes)).split(sizes, dim=1)
        return cls(
            x=room("x", rows, config.hidden_size),
            qkv=(q, k, v),
            attended=room("attended", rows, config.num_heads, config.head_dim),
            inner=room("inner", mlp_rows(rows, device), config.intermediate_size),
            delta=room("delta", rows, config.hidden_size),
        )


@dataclass(frozen=True)
class Decoder:
    """Token embedding, layers, final norm and output head."""

    config: TextConfig
    embed: torch.Tensor
    layers: tuple[DecoderLayer, ...]
    norm: torch.Tensor
    lm_head: Linear
    inv_freq: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.dtype

    @property
    def device(self) -> torch.device:
        return self.embed.device

    def rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin `[T, head_dim / 2]` of `positions [3, T]`."""
        return mrope_cos_sin(positions, self.inv_freq, self.config.mrope_section)

    def normed(self, stream: Stream, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Complete the residual stream and norm it: `[T, width]`."""
        if stream.delta is None:
            return rms_norm(stream.hidden, weight, self.config.eps, out=out)
        delta, stream.delta = stream.delta, None
        return rms_norm(delta, weight, self.config.eps, residual=stream.hidden, out=out)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """`[T, heads * head_dim]` → `[T, heads, head_dim]`, a view."""
        return x.unflatten(-1, (-1, self.config.head_dim))

    def finish_layer(
        self, layer: DecoderLayer, stream: Stream, attended: torch.Tensor, into: Buffers | None = None
    ) -> None:
        """Output projection and MLP of the rows in `stream`; `attended [T, Hq, D]`."""
        x, inner, delta = (None, None, None) if into is None else (into.x, into.inner, into.delta)
        stream.delta = layer.o_proj(attended.flatten(1), out=delta)
        normed = self.normed(stream, layer.post_norm, x)
        stream.delta = mlp(layer.gated, layer.down, normed, inner, delta)

    def logits(
        self, stream: Stream, into: Buffers | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`[T, vocabulary]` in the model's dtype."""
        return self.lm_head(self.normed(stream, self.norm, None if into is None else into.x), out=out)

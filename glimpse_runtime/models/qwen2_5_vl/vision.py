# SPDX-License-Identifier: Apache-2.0
"""The Qwen2.5-VL vision tower on packed patches (Qwen2.5-VL report, arXiv 2502.13923, section 2.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from glimpse_kernels import attention, rms_norm, rope
from glimpse_runtime.models.qwen2_5_vl.config import VisionConfig
from glimpse_runtime.models.qwen2_5_vl.layout import Grid, VisionLayout, vision_layout
from glimpse_runtime.models.qwen2_5_vl.linear import GatedLinear, Linear, mlp, mlp_rows
from glimpse_runtime.models.qwen2_5_vl.tapping import Tapping
from glimpse_runtime.taps import NO_TAPS, Received, VisionTaps

MOST_PATCHES = 1 << 17
"""Patches that go through the tower together on a GPU, unless a single picture or video has more."""


@dataclass(frozen=True)
class VisionBlock:
    """Weights of one block."""

    norm1: torch.Tensor
    qkv: Linear
    proj: Linear
    norm2: torch.Tensor
    gated: GatedLinear
    down: Linear


@dataclass(frozen=True)
class VisionOutput:
    """What the tower gives, all in raster order. Taps have the names they were asked for by; two names of one thing share it.

    Attributes:
        embeds: `[N, text width]` visual tokens for the decoder.
        hidden: block → `[N, vision width]`, the block's output averaged over each merge group.
        received: tap → `[N]` fp32, the attention that each token receives. Over a picture, or a frame of a video, it sums
            to the number of visual tokens.
        keys: block → `[N, head_dim]` fp32, the block's rotated keys averaged over heads and over each merge group.
    """

    embeds: torch.Tensor
    hidden: dict[int, torch.Tensor]
    received: dict[Received, torch.Tensor]
    keys: dict[int, torch.Tensor]

    def put(self, rows: slice, part: VisionOutput) -> None:
        """Copy the tokens of one pass to where they belong."""
        self.embeds[rows].copy_(part.embeds)
        pairs: tuple[tuple[Mapping[Any, torch.Tensor], Mapping[Any, torch.Tensor]], ...] = (
            (self.hidden, part.hidden),
            (self.received, part.received),
            (self.keys, part.keys),
        )
        for whole, some in pairs:
            for name, tap in some.items():
                whole[name][rows].copy_(tap)


@dataclass(frozen=True)
class _Buffers:
    """Results of the sublayers, the same memory in every block: fresh memory would have to be mapped page by page.

    Attributes:
        x, delta: `[P, width]` normed input and output of a sublayer.
        qkv: `[P, 3 * width]`.
        attended: `[P, heads, head_dim]`.
        inner: of the MLP, see `linear.mlp`.
    """

    x: torch.Tensor
    delta: torch.Tensor
    qkv: torch.Tensor
    attended: torch.Tensor
    inner: torch.Tensor

    @classmethod
    def allocate(cls, config: VisionConfig, hidden: torch.Tensor) -> _Buffers:
        (rows, width), inner = hidden.shape, config.intermediate_size
        if hidden.device.type == "cpu":
            qkv, between = hidden.new_empty(rows, 3 * width), hidden.new_empty(rows, inner)
        else:  # attention is done with the one when the MLP begins with the other
            shapes = (rows, 3 * width), (mlp_rows(rows, hidden.device), 2 * inner)
            room = hidden.new_empty(max(n * size for n, size in shapes))
            qkv, between = (room[: n * size].view(n, size) for n, size in shapes)
        return cls(
            x=torch.empty_like(hidden),
            delta=torch.empty_like(hidden),
            qkv=qkv,
            attended=hidden.new_empty(rows, config.num_heads, config.head_dim),
            inner=between,
        )


def _passes(grids: Sequence[Grid]) -> list[tuple[Grid, ...]]:
    """Neighbouring pictures, or videos, of up to `MOST_PATCHES` together."""
    passes: list[tuple[Grid, ...]] = []
    room = 0
    for grid in grids:
        patches = math.prod(grid)
        if patches > room:
            passes.append(())
            room = MOST_PATCHES
        passes[-1] += (grid,)
        room -= patches
    return passes


@dataclass(frozen=True)
class VisionTower:
    """Vision transformer with window attention, full in `config.full_attention_blocks`."""

    config: VisionConfig
    patch_embed: Linear
    blocks: tuple[VisionBlock, ...]
    merger_norm: torch.Tensor
    merger_in: Linear
    merger_out: Linear

    @property
    def dtype(self) -> torch.dtype:
        return self.merger_norm.dtype

    def __call__(
        self, pixel_values: torch.Tensor, layout: VisionLayout, taps: VisionTaps = NO_TAPS
    ) -> VisionOutput:
        """Encode `pixel_values [P, patch_dim]` (any float dtype, processor order).

        `taps` says what is wanted besides; the rest is not computed. On a GPU many pictures go through in several passes: none of
        them sees another one, and `MOST_PATCHES` keep it busy.

        Raises:
            GlimpseError: a tap names a block that does not exist.
        """
        asked = taps.by_block(len(self.blocks), self.config.full_attention_blocks)
        passes, device = _passes(layout.grids), pixel_values.device
        if device.type == "cpu" or len(passes) == 1:
            return self._encoded(pixel_values, layout, asked)
        unit = self.config.merge_unit
        whole = self._room(layout.patches // unit, taps, device)
        begin = 0
        for grids in passes:
            some = vision_layout(grids, self.config, device)
            end = begin + some.patches
            part = self._encoded(pixel_values[begin:end], some, asked)
            whole.put(slice(begin // unit, end // unit), part)
            begin = end
        return whole

    def _room(self, tokens: int, taps: VisionTaps, device: torch.device) -> VisionOutput:
        def room(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        config, exact = self.config, torch.float32
        return VisionOutput(
            embeds=room(tokens, config.out_hidden_size, dtype=self.dtype),
            hidden={block: room(tokens, config.hidden_size, dtype=self.dtype) for block in taps.hidden},
            received={tap: room(tokens, dtype=exact) for tap in taps.received},
            keys={block: room(tokens, config.head_dim, dtype=exact) for block in taps.keys},
        )

    def _encoded(
        self, pixel_values: torch.Tensor, layout: VisionLayout, asked: Mapping[int, VisionTaps]
    ) -> VisionOutput:
        config, tapping = self.config, Tapping(asked, layout)
        hidden = self.patch_embed(pixel_values.to(self.dtype))
        hidden = hidden.index_select(0, layout.patch_order)
        into = _Buffers.allocate(config, hidden)
        delta: torch.Tensor | None = None
        for number, block in enumerate(self.blocks):
            x = self._normed(hidden, delta, block.norm1, into)
            tapping.see_stream(number - 1, hidden)  # the norm has just completed it
            delta = block.proj(self._attend(number, x, layout, into, tapping), out=into.delta)
            x = self._normed(hidden, delta, block.norm2, into)
            delta = mlp(block.gated, block.down, x, into.inner, into.delta)
        x = self._normed(hidden, delta, self.merger_norm, into)
        tapping.see_stream(len(self.blocks) - 1, hidden)
        merged = self.merger_out(
            self.merger_in(x.view(-1, x.shape[-1] * config.merge_unit), activation="gelu")
        )
        return VisionOutput(
            merged.index_select(0, layout.token_rank), tapping.hidden, tapping.received, tapping.keys
        )

    def _normed(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, into: _Buffers
    ) -> torch.Tensor:
        """Complete the residual stream and norm it."""
        if delta is None:
            return rms_norm(hidden, weight, self.config.eps, out=into.x)
        return rms_norm(delta, weight, self.config.eps, residual=hidden, out=into.x)

    def _attend(
        self, number: int, x: torch.Tensor, layout: VisionLayout, into: _Buffers, tapping: Tapping
    ) -> torch.Tensor:
        """The attention of a block on its normed input `x [P, width]`, which is gone afterwards."""
        config = self.config
        full = number in config.full_attention_blocks
        cu = layout.cu_frames if full else layout.cu_windows
        longest = layout.longest_frame if full else layout.longest_window
        qkv = self.blocks[number].qkv(x, out=into.qkv)
        q, k, v = qkv.view(-1, 3, config.num_heads, config.head_dim).unbind(1)
        rope(q, k, *layout.rotary)
        tapping.see_keys(number, k)
        attended = into.attended
        if tapping.reads_attention(number):
            _, lse = attention(
                q, k, v, cu, cu, causal=False, max_seqlen_q=longest, out=attended, return_lse=True
            )
            tapping.see_attention(number, q, k, v, lse, cu, longest, spare=x.view(attended.shape))
        else:
            attention(q, k, v, cu, cu, causal=False, max_seqlen_q=longest, out=attended)
        return attended.view(-1, config.hidden_size)

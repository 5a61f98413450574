# SPDX-License-Identifier: Apache-2.0
"""The Qwen2.5-VL vision tower on packed patches (Qwen2.5-VL report, arXiv 2502.13923, section 2.1)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from glimpse_kernels import attention, rms_norm, rope
from glimpse_runtime.models.qwen2_5_vl.config import VisionConfig
from glimpse_runtime.models.qwen2_5_vl.layout import Grid, VisionLayout, vision_layout
from glimpse_runtime.models.qwen2_5_vl.linear import GatedLinear, Linear, mlp, mlp_rows

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
    """What the tower gives.

    Attributes:
        embeds: `[N, text width]` visual tokens for the decoder, raster order.
        taps: block number → `[N, vision width]`, the block's output averaged over each merge group, raster order.
    """

    embeds: torch.Tensor
    taps: dict[int, torch.Tensor]


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
        self, pixel_values: torch.Tensor, layout: VisionLayout, taps: Iterable[int] = ()
    ) -> VisionOutput:
        """Encode `pixel_values [P, patch_dim]` (any float dtype, processor order).

        `taps` names the blocks whose pooled output is wanted. On a GPU many pictures go through in several passes: none of them
        sees another one, and `MOST_PATCHES` keep it busy.
        """
        wanted, passes = frozenset(taps), _passes(layout.grids)
        if pixel_values.device.type == "cpu" or len(passes) == 1:
            return self._encoded(pixel_values, layout, wanted)
        width, unit, device = self.config.hidden_size, self.config.merge_unit, pixel_values.device
        tokens = layout.patches // unit
        whole = VisionOutput(
            torch.empty(tokens, self.config.out_hidden_size, dtype=self.dtype, device=device),
            {block: torch.empty(tokens, width, dtype=self.dtype, device=device) for block in wanted},
        )
        begin = 0
        for grids in passes:
            some = vision_layout(grids, self.config, device)
            end = begin + some.patches
            part = self._encoded(pixel_values[begin:end], some, wanted)
            rows = slice(begin // unit, end // unit)
            whole.embeds[rows].copy_(part.embeds)
            for block, tap in part.taps.items():
                whole.taps[block][rows].copy_(tap)
            begin = end
        return whole

    def _encoded(
        self, pixel_values: torch.Tensor, layout: VisionLayout, wanted: frozenset[int]
    ) -> VisionOutput:
        found: dict[int, torch.Tensor] = {}
        config = self.config
        hidden = self.patch_embed(pixel_values.to(self.dtype))
        hidden = hidden.index_select(0, layout.patch_order)
        into = _Buffers.allocate(config, hidden)
        delta: torch.Tensor | None = None
        for number, block in enumerate(self.blocks):
            x = self._normed(hidden, delta, block.norm1, into)
            if number - 1 in wanted:  # the norm has just completed the stream of the block before
                found[number - 1] = self._pool(hidden, layout)
            full = number in config.full_attention_blocks
            delta = block.proj(self._attend(block, x, layout, full, into), out=into.delta)
            x = self._normed(hidden, delta, block.norm2, into)
            delta = mlp(block.gated, block.down, x, into.inner, into.delta)
        x = self._normed(hidden, delta, self.merger_norm, into)
        if len(self.blocks) - 1 in wanted:
            found[len(self.blocks) - 1] = self._pool(hidden, layout)
        merged = self.merger_out(
            self.merger_in(x.view(-1, x.shape[-1] * config.merge_unit), activation="gelu")
        )
        return VisionOutput(merged.index_select(0, layout.token_rank), found)

    def _normed(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, into: _Buffers
    ) -> torch.Tensor:
        """Complete the residual stream and norm it."""
        if delta is None:
            return rms_norm(hidden, weight, self.config.eps, out=into.x)
        return rms_norm(delta, weight, self.config.eps, residual=hidden, out=into.x)

    def _attend(
        self, block: VisionBlock, x: torch.Tensor, layout: VisionLayout, full: bool, into: _Buffers
    ) -> torch.Tensor:
        config = self.config
        cu = layout.cu_frames if full else layout.cu_windows
        longest = layout.longest_frame if full else layout.longest_window
        qkv = block.qkv(x, out=into.qkv)
        q, k, v = qkv.view(-1, 3, config.num_heads, config.head_dim).unbind(1)
        rope(q, k, *layout.rotary)
        attended = attention(q, k, v, cu, cu, causal=False, max_seqlen_q=longest, out=into.attended)
        return attended.view(-1, config.hidden_size)

    def _pool(self, hidden: torch.Tensor, layout: VisionLayout) -> torch.Tensor:
        pooled = hidden.view(-1, self.config.merge_unit, hidden.shape[-1]).mean(dim=1)
        return pooled.index_select(0, layout.token_rank)

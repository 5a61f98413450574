# SPDX-License-Identifier: Apache-2.0
"""The Qwen2.5-VL vision tower on packed patches (Qwen2.5-VL report, arXiv 2502.13923, section 2.1)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from glimpse_kernels import attention, rms_norm, rope
from glimpse_runtime.models.qwen2_5_vl.config import VisionConfig
from glimpse_runtime.models.qwen2_5_vl.layout import VisionLayout
from glimpse_runtime.models.qwen2_5_vl.linear import GatedLinear, Linear


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
        inner: `[P, intermediate]`.
    """

    x: torch.Tensor
    delta: torch.Tensor
    qkv: torch.Tensor
    attended: torch.Tensor
    inner: torch.Tensor

    @classmethod
    def allocate(cls, config: VisionConfig, hidden: torch.Tensor) -> _Buffers:
        rows, width = hidden.shape
        return cls(
            x=torch.empty_like(hidden),
            delta=torch.empty_like(hidden),
            qkv=hidden.new_empty(rows, 3 * width),
            attended=hidden.new_empty(rows, config.num_heads, config.head_dim),
            inner=hidden.new_empty(rows, config.intermediate_size),
        )


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

        `taps` names the blocks whose pooled output is wanted.
        """
        wanted = frozenset(taps)
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
            delta = block.down(block.gated(x, out=into.inner), out=into.delta)
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
        rope(q, k, layout.cos, layout.sin)
        attended = attention(q, k, v, cu, cu, causal=False, max_seqlen_q=longest, out=into.attended)
        return attended.view(-1, config.hidden_size)

    def _pool(self, hidden: torch.Tensor, layout: VisionLayout) -> torch.Tensor:
        pooled = hidden.view(-1, self.config.merge_unit, hidden.shape[-1]).mean(dim=1)
        return pooled.index_select(0, layout.token_rank)

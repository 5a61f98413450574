# SPDX-License-Identifier: Apache-2.0
"""What pruning methods read in the blocks of the vision tower, in memory that grows with the number of patches alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from glimpse_kernels import attention, received_attention, rope
from glimpse_runtime.models.qwen2_5_vl.layout import VisionLayout
from glimpse_runtime.taps import NO_TAPS, Received, VisionTaps


class Tapping:
    """Fills the taps while patches go through the tower once.

    Attributes:
        hidden, received, keys: as in `VisionOutput`, of the blocks that were passed so far.
    """

    def __init__(self, asked: Mapping[int, VisionTaps], layout: VisionLayout) -> None:
        """`asked`: block, from 0 → what is wanted of it."""
        self.hidden: dict[int, torch.Tensor] = {}
        self.received: dict[Received, torch.Tensor] = {}
        self.keys: dict[int, torch.Tensor] = {}
        self._asked = asked
        self._layout = layout
        self._unit = layout.config.merge_unit
        reads = any(taps.received for taps in asked.values())
        self._places = layout.token_order.to(torch.int32) if reads else None

    def reads_attention(self, block: int) -> bool:
        """Whether `see_attention` has to be called in this block."""
        return bool(self._asked.get(block, NO_TAPS).received)

    def see_stream(self, block: int, hidden: torch.Tensor) -> None:
        """`hidden [P, width]`: the block's output, window order."""
        names = self._asked.get(block, NO_TAPS).hidden
        if names:
            pooled = self._in_raster_order(hidden.view(-1, self._unit, hidden.shape[-1]).mean(dim=1))
            self.hidden.update(dict.fromkeys(names, pooled))

    def see_keys(self, block: int, k: torch.Tensor) -> None:
        """`k [P, heads, head_dim]`: the block's rotated keys, window order."""
        names = self._asked.get(block, NO_TAPS).keys
        if names:
            # fp32: neighbours are told apart by cosines that lie closer together than the steps of bfloat16.
            pooled = k.unflatten(0, (-1, self._unit)).mean(dim=(1, 2), dtype=torch.float32)
            self.keys.update(dict.fromkeys(names, self._in_raster_order(pooled)))

    def see_attention(
        self,
        block: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lse: torch.Tensor,
        cu_seqlens: torch.Tensor,
        longest: int,
        spare: torch.Tensor,
    ) -> None:
        """After the block's attention: `q, k, v [P, heads, head_dim]` and `lse [P, heads]` of it, window order.

        q and k may be rotated once more where they lie; `spare`, of v's shape and dtype, is written to.
        """
        wanted = self._asked[block].received
        for rotations in (1, 2):
            names = [tap for tap in wanted if tap.rotations == rotations]
            if not names:
                continue
            if rotations == 2:
                rope(q, k, *self._layout.rotary)
                _, lse = attention(
                    q, k, v, cu_seqlens, cu_seqlens,
                    causal=False, max_seqlen_q=longest, out=spare, return_lse=True,
                )  # fmt: skip
            found = received_attention(
                q, k, lse, cu_seqlens, cu_seqlens, group=self._unit, order=self._places
            )
            self.received.update(dict.fromkeys(names, found))

    def _in_raster_order(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.index_select(0, self._layout.token_rank)

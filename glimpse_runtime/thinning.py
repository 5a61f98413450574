# SPDX-License-Identifier: Apache-2.0
"""What stages before the decoder see and leave: the tower's output, thinned out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from glimpse_runtime.models.qwen2_5_vl.layout import VisionLayout
from glimpse_runtime.models.qwen2_5_vl.vision import VisionOutput
from glimpse_runtime.packing import PackedBatch
from glimpse_runtime.restriction import Restriction, restricted_layout
from glimpse_runtime.stages.views import VisionView


@dataclass(frozen=True)
class Pictures:
    """What the tower gave for the tokens of a batch, and where these lie.

    Attributes:
        vision: rows in the order of `layout`, which the batch calls the tower's.
        layout: raster order of whole pictures, or prompt order of what a stage left of them.
    """

    vision: VisionOutput
    layout: VisionLayout

    def view(
        self, batch: PackedBatch, text: Callable[[torch.Tensor], torch.Tensor], *, probes: bool
    ) -> VisionView:
        """In prompt order, for a stage; see `VisionView`."""
        seen, order = self.vision, batch.visual_order
        return VisionView(
            batch,
            seen.embeds.index_select(0, order),
            {block: tap.index_select(0, order) for block, tap in seen.hidden.items()},
            {tap: scores.index_select(0, order) for tap, scores in seen.received.items()},
            {block: keys.index_select(0, order) for block, keys in seen.keys.items()},
            text,
            probes=probes,
        )

    def thinned(
        self, batch: PackedBatch, small: Restriction, features: torch.Tensor | None = None
    ) -> Pictures:
        """What is left of them.

        Args:
            batch: all tokens.
            small: those that stay.
            features: `[N, text width]` of all tokens in prompt order, in place of the tower's.
        """
        at, seen = batch.visual_order.index_select(0, small.tokens), self.vision
        vision = VisionOutput(
            seen.embeds.index_select(0, at) if features is None else features.index_select(0, small.tokens),
            {block: tap.index_select(0, at) for block, tap in seen.hidden.items()},
            {tap: scores.index_select(0, at) for tap, scores in seen.received.items()},
            {block: keys.index_select(0, at) for block, keys in seen.keys.items()},
        )
        return Pictures(vision, restricted_layout(self.layout, at, small.batch))

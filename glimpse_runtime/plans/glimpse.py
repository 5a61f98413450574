# SPDX-License-Identifier: Apache-2.0
"""GlimpsePrune (arXiv 2508.01548): a learned token glances at the picture, a small predictor decides what stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from glimpse_kernels import VipWeights, vip, vip_conditions, vip_rotary
from glimpse_runtime.models.qwen2_5_vl.layout import VisionLayout
from glimpse_runtime.modules import GlimpseModules
from glimpse_runtime.plan import PrunePlan, Stage
from glimpse_runtime.stages.budget import Budget
from glimpse_runtime.stages.places import Layer
from glimpse_runtime.stages.scorers import GlanceScorer, Probe
from glimpse_runtime.taps import VisionTaps


def glimpse(modules: GlimpseModules) -> PrunePlan:
    """The method as its checkpoint describes it."""
    settings = modules.settings
    return PrunePlan(
        name="glimpse",
        stages=(
            Stage(
                at=Layer(settings.reduce_layer),
                score=GlimpseScorer(modules),
                select=Budget(
                    threshold=settings.reduce_threshold,
                    max_remain_ratio=settings.max_remain_ratio,
                    min_remain_num=settings.min_remain_num,
                    anchor_positions=settings.anchor_positions,
                ),
                evict_earlier=True,
            ),
        ),
    )


@dataclass(frozen=True)
class _Prepared:
    """The predictor's inputs that depend on the pictures alone, in the order in which it sees the tokens."""

    conditions: list[torch.Tensor]
    order: torch.Tensor | None
    rank: torch.Tensor | None
    cu_seqlens: torch.Tensor
    cos: torch.Tensor | None
    sin: torch.Tensor | None


@dataclass(frozen=True)
class GlimpseScorer(GlanceScorer):
    """The glimpse token's logits in `selected_layers`, judged by the visual importance predictor (VIP)."""

    modules: GlimpseModules

    @property
    def taps(self) -> VisionTaps:
        return VisionTaps(
            hidden=self.modules.settings.selected_visual_layers if self.weights.kind == "v1" else ()
        )

    @property
    def query_layers(self) -> tuple[int, ...]:
        return self.modules.settings.selected_layers

    @property
    def normalized(self) -> bool:
        return not self.modules.settings.use_attention_logits

    @property
    def probe(self) -> Probe:
        return self.modules.probe

    @property
    def weights(self) -> VipWeights:
        return self.modules.vip

    def prepare(self, taps: Mapping[int, torch.Tensor], layout: VisionLayout) -> _Prepared:
        order = rank = None
        cu, rows, cols = layout.cu_token_frames, layout.rows, layout.cols
        inputs = [taps[block].to(self.weights.dtype) for block in self.taps.hidden]
        if not self.modules.settings.attn_fuse_global:
            order, rank, cu = layout.token_order, layout.token_rank, layout.cu_token_windows
            rows, cols = rows[order], cols[order]
            inputs = [tap.index_select(0, order) for tap in inputs]
        cos = sin = None
        if self.weights.kind != "dummy":
            cos, sin = vip_rotary(rows, cols, self.weights.qk_dim, self.weights.theta)
        return _Prepared(vip_conditions(inputs, self.weights), order, rank, cu, cos, sin)

    def score(self, logits: Sequence[torch.Tensor], prepared: Any) -> torch.Tensor:
        seen = torch.cat(list(logits), dim=1)
        p: _Prepared = prepared
        if p.order is not None:
            seen = seen.index_select(0, p.order)
        scores = vip(seen, p.conditions, self.weights, p.cu_seqlens, p.cos, p.sin)
        return scores if p.rank is None else scores.index_select(0, p.rank)

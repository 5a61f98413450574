# SPDX-License-Identifier: Apache-2.0
"""Views of visual tokens that no model made: what a stage looks at, put together by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from glimpse_runtime.models.qwen2_5_vl.config import TextConfig
from glimpse_runtime.models.qwen2_5_vl.decoder import Decoder, DecoderLayer, Stream
from glimpse_runtime.models.qwen2_5_vl.linear import GatedLinear, Linear, LinearGroup
from glimpse_runtime.packing import PackedBatch, Picture
from glimpse_runtime.plan import Stage
from glimpse_runtime.stages.selection import Chosen
from glimpse_runtime.stages.views import RowView, StageView, VisionView
from glimpse_runtime.taps import Received

Segment = int | tuple[int, int]
CPU = torch.device("cpu")


def batch_of(
    rows: Sequence[Sequence[Segment]], positions: torch.Tensor | None = None, device: torch.device = CPU
) -> PackedBatch:
    """Prompts of segments: a number of text tokens, whose ids count on from 0 over the batch, or a picture's (height, width).

    positions: `[3, T]` or `[T]`; None: rows counted in each sequence.
    """
    ids: list[int] = []
    counted: list[int] = []
    visual: list[int] = []
    pictures: list[Picture] = []
    lengths = []
    for row, segments in enumerate(rows):
        begin, index = len(ids), 0
        for segment in segments:
            if isinstance(segment, tuple):
                height, width = segment
                pictures.append(Picture(row, index, "image", 0, height, width, len(visual)))
                visual += range(len(ids), len(ids) + height * width)
                ids += [-1] * (height * width)
                index += 1
            else:
                said = sum(i >= 0 for i in ids)
                ids += range(said, said + segment)
        lengths.append(len(ids) - begin)
        counted += range(lengths[-1])
    place = np.array(counted) if positions is None else positions.numpy()
    return PackedBatch.build(
        ids=np.array(ids),
        positions=np.broadcast_to(place, (3, len(ids))).copy(),
        next_positions=np.broadcast_to(np.array(lengths), (3, len(rows))).copy(),
        visual_rows=np.array(visual, dtype=np.int64),
        visual_order=np.arange(len(visual)),
        lengths=lengths,
        prompt_lengths=lengths,
        probe_length=0,
        pictures=pictures,
        device=device,
    )


def vision_view(
    batch: PackedBatch,
    features: torch.Tensor,
    *,
    received: Mapping[Received, torch.Tensor] | None = None,
    keys: Mapping[int, torch.Tensor] | None = None,
    text: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> VisionView:
    """Tokens as they come from the tower, with the taps that a stage asks for."""

    def no_text(ids: torch.Tensor) -> torch.Tensor:
        raise AssertionError("nobody should ask for the text")

    return VisionView(batch, features, {}, received or {}, keys or {}, text or no_text)


def row_view(
    batch: PackedBatch,
    hidden: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    *,
    head_dim: int,
    base: float = 10000.0,
    eps: float = 1e-6,
    prepared: Any = None,
) -> RowView:
    """Rows before a layer with these weights: `norm_weight`, `q_weight`, `k_weight`, and `q_bias`, `k_bias` if it has them."""
    q, k = (Linear(weights[f"{x}_weight"], weights.get(f"{x}_bias")) for x in "qk")
    width = hidden.shape[1]
    config = TextConfig(
        num_layers=1, hidden_size=width, num_heads=weights["q_weight"].shape[0] // head_dim,
        num_kv_heads=weights["k_weight"].shape[0] // head_dim, head_dim=head_dim, intermediate_size=1, vocab_size=1, eps=eps,
        rope_theta=base, mrope_section=(head_dim // 2, 0, 0), max_positions=len(hidden), tie_word_embeddings=True,
    )  # fmt: skip
    nothing, norm = Linear(hidden[:0]), weights["norm_weight"]
    layer = DecoderLayer(norm, LinearGroup([q, k, k]), nothing, norm, GatedLinear(nothing, nothing), nothing)
    inv_freq = base ** -(torch.arange(0, head_dim, 2).float() / head_dim).to(hidden.device)
    decoder = Decoder(config, hidden[:0], (layer,), norm, nothing, inv_freq)
    stream = Stream(hidden.clone(), None, *decoder.rotary(batch.positions))
    return RowView(batch, decoder, 0, stream, decoder.normed(stream, norm), prepared=prepared)


def run_stage(stage: Stage, view: StageView) -> tuple[torch.Tensor | None, Chosen]:
    """The scores of a stage, if it has any, and what it chooses."""
    scores = None if stage.score is None else stage.score.score(view).float()  # type: ignore[union-attr, arg-type]
    return scores, stage.select.choose(view, scores)

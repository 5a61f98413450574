# SPDX-License-Identifier: Apache-2.0
"""A prompt batch on its way through the model, pruned inside the plan's layer.

Order and memory only: every number comes from `glimpse_kernels` or a GEMM. Before the stage, keys and values of all
rows go to a workspace. Inside the stage's layer K everybody's keys and values are computed, but queries, output
projection and MLP only for the rows that stay; one `compact` then moves the kept keys and values of layers 0..K into
the pool. After it, layers see the kept rows alone and write to the pool directly.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from glimpse_kernels import Selection, attention, compact, glimpse_scores, rope
from glimpse_runtime.cache import KvPool, Workspace
from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.models.qwen2_5_vl.decoder import Buffers, Decoder, DecoderLayer, Stream
from glimpse_runtime.models.qwen2_5_vl.layout import VisionLayout
from glimpse_runtime.models.qwen2_5_vl.vision import VisionOutput
from glimpse_runtime.packing import PackedBatch, cumulative
from glimpse_runtime.plan import PrunePlan
from glimpse_runtime.selection import row_bounds, select
from glimpse_runtime.streams import SideStream
from glimpse_runtime.timings import Timings


class Prefill:
    """The state of one prompt batch: `start` takes it to its scores, `choose` to its last logits.

    Args:
        decoder, batch, plan: what is computed, on what, and how it is pruned (None: not at all).
        extra_rows: room kept in the pool for each sequence's generated tokens.
        scores: `[N]` fp32 in prompt order, if they come with the call.

    Attributes:
        scores: `[N]` fp32 visual scores in prompt order, once layer K was reached.
        seen: what the probe saw in each of the scorer's layers, `[N, heads]` fp32, the tower's order.
        selection: what stays, once selected.
        pool: keys and values of what stays.
        last_logits: `[B, vocabulary]` after the last prompt token.
        kept_positions: `[3, rows]` rotary positions of the prompt rows in the pool, packed.
        kept_lengths: `[B]` int32 how many of them each sequence has.
    """

    def __init__(
        self,
        decoder: Decoder,
        batch: PackedBatch,
        plan: PrunePlan | None,
        extra_rows: int,
        scores: torch.Tensor | None = None,
    ) -> None:
        self.decoder = decoder
        self.batch = batch
        self.plan = plan
        self.extra_rows = extra_rows
        self.timings = Timings()
        self.scores = scores
        self.seen: list[torch.Tensor] = []
        self.selection: Selection | None = None
        self.pool: KvPool | None = None
        self.last_logits: torch.Tensor | None = None
        self.kept_positions: torch.Tensor | None = None
        self.kept_lengths: torch.Tensor | None = None
        self._cos, self._sin = decoder.rotary(batch.positions)
        self._stream: Stream  # rows between two layers
        self._x: torch.Tensor  # normed input of the stage's layer
        self._into: Buffers  # of the layers on all rows
        self._workspace: Workspace
        self._stage_layer = -1

    def start(self, vision: VisionOutput | None, layout: VisionLayout | None) -> None:
        """Embed the prompt and, with a plan, run to the scores inside layer K; without one, to the last logits."""
        began = time.perf_counter()
        hidden = F.embedding(self.batch.ids, self.decoder.embed)
        if vision is not None:
            embeds = vision.embeds.index_select(0, self.batch.visual_order)
            hidden.index_copy_(0, self.batch.visual_rows, embeds.to(hidden.dtype))
        if self.batch.probed:  # their layer 0 vector is added like those of the later layers
            hidden.index_fill_(0, self.batch.probe_rows.flatten(), 0.0)
        self._stream = Stream(hidden, None, self._cos, self._sin)
        if self.plan is None or not self.batch.pictures:
            self.pool = self._allocate(self.batch.prompt_lengths)
            self.kept_positions = self.batch.positions
            self.timings.before += time.perf_counter() - began
            self._tail(0, self.batch.cu_seqlens, self.batch.num_rows)
            return
        scorer = self.plan.stages[0].score
        # It depends on the pictures alone: it can run beside the layers before the stage.
        beside = SideStream(self.batch.device)
        prepared = beside.run(
            lambda: scorer.prepare(vision.taps, layout) if scorer and vision and layout else None
        )
        self._stage_layer = min(self.plan.stages[0].at.index, self.decoder.config.num_layers - 1)
        self._workspace = Workspace.allocate(
            self.decoder.config,
            self._stage_layer + 1,
            self.batch.num_rows,
            self.decoder.dtype,
            self.batch.device,
        )
        self._into = self._buffers(self.batch.num_rows)
        for number in range(self._stage_layer):
            self._full_layer(number)
        self._x = self._enter(self._stage_layer)
        keys, values = self._workspace.k[self._stage_layer], self._workspace.v[self._stage_layer]
        self._write_keys(self._stage_layer, self._x, keys, values)
        self._glance(self._stage_layer, None)
        self.timings.before += time.perf_counter() - began
        began = time.perf_counter()
        if scorer is not None:
            scores = scorer.score(self.seen, prepared.join())
            self.scores = scores.float().index_select(0, self.batch.visual_order)
        self.timings.select += time.perf_counter() - began

    def choose(self, scores: torch.Tensor | None = None) -> None:
        """Select by the plan's budget (from `scores [N]` if given), finish layer K and run the layers behind it."""
        assert self.plan is not None
        began = time.perf_counter()
        judged = self.scores if scores is None else scores
        if judged is None:
            raise GlimpseError(
                f"plan {self.plan.name!r}: it scores nothing, so keep masks must come with the call"
            )
        budget = self.plan.stages[0].select
        self.selection = select(judged, self.batch, budget)
        self._reduce(self.selection, row_bounds(self.batch, budget), began)

    # -- layers on all rows ------------------------------------------------------------------------------------

    def _layer(self, number: int) -> DecoderLayer:
        return self.decoder.layers[number]

    def _enter(self, number: int) -> torch.Tensor:
        """The normed input of a layer, with the probe's vector of this layer added to its rows."""
        vectors = self._probe_vectors()
        if vectors is not None and number in vectors:
            added = vectors[number].repeat(len(self.batch.probed), 1)
            self._stream.hidden.index_add_(0, self.batch.probe_rows.flatten(), added)
        return self.decoder.normed(self._stream, self._layer(number).input_norm, self._into.x)

    def _probe_vectors(self) -> Mapping[int, torch.Tensor] | None:
        if self.plan is None or not self.batch.probed:
            return None
        scorer = self.plan.stages[0].score
        return scorer.probe.vectors if scorer else None

    def _full_layer(self, number: int) -> None:
        """One layer for all rows, keys and values to the workspace."""
        decoder, layer, stream, into = self.decoder, self._layer(number), self._stream, self._into
        layer.qkv(self._enter(number), outs=into.qkv)
        q, k, v = (decoder.heads(part) for part in into.qkv)
        keys, values = self._workspace.k[number], self._workspace.v[number]
        rope(q, k, stream.cos, stream.sin, v=v, k_out=keys, v_out=values)
        if self.batch.probed:
            self._glance(number, q)
        cu = self.batch.cu_seqlens
        longest = max(self.batch.lengths)
        attention(q, keys, values, cu, cu, causal=True, max_seqlen_q=longest, out=into.attended)
        decoder.finish_layer(layer, stream, into.attended, into)

    # -- the stage ---------------------------------------------------------------------------------------------

    def _write_keys(
        self,
        number: int,
        x: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor | None = None,
    ) -> None:
        """Keys and values of the stream's rows `x` in a layer whose queries are not wanted for all of them."""
        k, v = (self.decoder.heads(part) for part in self._layer(number).qkv.tail(1)(x))
        nobody = k[:, :0]
        rope(nobody, k, self._stream.cos, self._stream.sin, v=v, k_out=keys, v_out=values, slots=slots)

    def _glance(self, number: int, q: torch.Tensor | None) -> None:
        """What the last probe row of each sequence sees in this layer, if the plan asks; `q` of all rows if known."""
        scorer = self.plan.stages[0].score if self.plan else None
        if scorer is None or number not in scorer.query_layers:
            return
        rows = self.batch.probe_rows[:, -1]
        if q is None:
            asked = self.decoder.heads(self._layer(number).qkv.parts[0](self._x.index_select(0, rows)))
            rope(asked, None, self._cos.index_select(0, rows), self._sin.index_select(0, rows))
        else:
            asked = q.index_select(0, rows)
        keys, values = self._workspace.k[number], self._workspace.v[number]
        lse = self._row_lse(asked, keys, values) if scorer.normalized else None
        seen = glimpse_scores(asked, keys, self.batch.tower_rows, self.batch.tower_probe, lse=lse)
        self.seen.append(seen)

    def _row_lse(self, asked: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        lengths = torch.zeros(self.batch.batch_size, dtype=torch.int32)
        lengths[list(self.batch.probed)] = 1
        cu_q = cumulative(lengths).to(self.batch.device)
        _, lse = attention(
            asked, keys, values, cu_q, self.batch.cu_seqlens, causal=True, max_seqlen_q=1, return_lse=True
        )
        return lse

    def _reduce(self, selection: Selection, bounds: list[int], began: float) -> None:
        """Drop what was not selected: gather rows and cache, finish layer K for the rest, go on."""
        decoder, batch, number = self.decoder, self.batch, self._stage_layer
        rows = self._kept_rows(selection)
        self.pool = self._allocate(bounds)
        index = selection.index[:rows]
        stream = self._stream
        every_position = batch.positions.T.contiguous()
        kept = Stream(_like(stream.hidden, rows), None, _like(stream.cos, rows), _like(stream.sin, rows))
        x, positions = _like(self._x, rows), _like(every_position, rows)
        compact(
            index,
            self.pool.prefill_slots(selection.cu_seqlens, rows),
            self._workspace.k,
            self._workspace.v,
            self.pool.k_slots[: number + 1],
            self.pool.v_slots[: number + 1],
            rows=[
                (stream.hidden, kept.hidden),
                (self._x, x),
                (stream.cos, kept.cos),
                (stream.sin, kept.sin),
                (every_position, positions),
            ],
        )
        self.kept_positions = positions.T
        self.timings.select += time.perf_counter() - began
        began = time.perf_counter()
        cu = selection.cu_seqlens
        self._stream = kept
        keys, values = self._workspace.k[number], self._workspace.v[number]
        if number == decoder.config.num_layers - 1:
            self._stream, x, index = self._last_rows(cu, kept, x, index)
            cu = self._one_each()
        layer = self._layer(number)
        q = decoder.heads(layer.qkv.parts[0](x))
        rope(q, None, self._stream.cos, self._stream.sin)
        sequence = torch.bucketize(index, batch.cu_seqlens[1:], right=True)
        seen_from = index - batch.cu_seqlens[sequence]
        attended = attention(
            q, keys, values, cu, batch.cu_seqlens, causal=True, q_positions=seen_from.to(torch.int32)
        )
        decoder.finish_layer(layer, self._stream, attended)
        del self._workspace, self._x, self._into
        self.timings.after += time.perf_counter() - began
        self._tail(number + 1, selection.cu_seqlens, rows)

    def _kept_rows(self, selection: Selection) -> int:
        """Rows of the tail's buffers: the one number of the pruning path that the host needs, for GEMM shapes."""
        return int(selection.cu_seqlens[-1])

    # -- layers on what stays ----------------------------------------------------------------------------------

    def _tail(self, first: int, cu: torch.Tensor, rows: int) -> None:
        """Layers `first`.. on packed rows `cu`, keys and values to the pool; the last one for last rows only."""
        began = time.perf_counter()
        decoder, pool = self.decoder, self.pool
        assert pool is not None
        lengths = cu[1:] - cu[:-1]
        pool.lengths = self.kept_lengths = lengths
        slots = pool.prefill_slots(cu, rows)
        cu_q, cu_k = _with_gaps(cu), pool.prefill_segments(lengths)
        last = decoder.config.num_layers - 1
        longest = max(self.batch.lengths)
        into = self._buffers(rows)
        for number in range(first, last + 1):
            layer = self._layer(number)
            x = decoder.normed(self._stream, layer.input_norm, into.x)
            keys, values = pool.k_slots[number], pool.v_slots[number]
            if number < last:
                layer.qkv(x, outs=into.qkv)
                q, k, v = (decoder.heads(part) for part in into.qkv)
                rope(q, k, self._stream.cos, self._stream.sin, v=v, k_out=keys, v_out=values, slots=slots)
                attention(q, keys, values, cu_q, cu_k, causal=True, max_seqlen_q=longest, out=into.attended)
                decoder.finish_layer(layer, self._stream, into.attended, into)
            else:
                self._write_keys(number, x, keys, values, slots)
                self._stream, x, _ = self._last_rows(cu, self._stream, x, None)
                q = decoder.heads(layer.qkv.parts[0](x))
                rope(q, None, self._stream.cos, self._stream.sin)
                cu_q = _with_gaps(self._one_each())
                attended = attention(q, keys, values, cu_q, cu_k, causal=True, max_seqlen_q=longest)
                decoder.finish_layer(layer, self._stream, attended)
        self.last_logits = decoder.logits(self._stream)
        del self._stream
        self.timings.after += time.perf_counter() - began

    def _last_rows(
        self, cu: torch.Tensor, stream: Stream, x: torch.Tensor, index: torch.Tensor | None
    ) -> tuple[Stream, torch.Tensor, Any]:
        """The last row of every sequence, out of packed rows `cu`."""
        rows = (cu[1:] - 1).long()
        picked = Stream(stream.hidden[rows], None, stream.cos[rows], stream.sin[rows])
        return picked, x[rows], None if index is None else index[rows]

    def _one_each(self) -> torch.Tensor:
        return torch.arange(self.batch.batch_size + 1, dtype=torch.int32, device=self.batch.device)

    def _buffers(self, rows: int) -> Buffers:
        return Buffers.allocate(self.decoder.config, rows, self.decoder.dtype, self.batch.device)

    def _allocate(self, rows: Any) -> KvPool:
        decoder = self.decoder
        capacities = [bound + self.extra_rows for bound in rows]
        return KvPool.allocate(decoder.config, capacities, decoder.dtype, self.batch.device)


def _like(source: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.empty((rows, *source.shape[1:]), dtype=source.dtype, device=source.device)


def _with_gaps(cu: torch.Tensor) -> torch.Tensor:
    """Query offsets to go with `KvPool.prefill_segments`: an empty segment behind every sequence."""
    return torch.cat([cu[:1], cu[1:].repeat_interleave(2)])

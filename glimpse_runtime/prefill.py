# SPDX-License-Identifier: Apache-2.0
"""A prompt batch on its way through the model, pruned inside the plan's layer.

Order and memory only: every number comes from `glimpse_kernels` or a GEMM. Before the stage, keys and values of all
rows go to a workspace. Inside the stage's layer K everybody's keys and values are computed, but queries, output
projection and MLP only for the rows that stay; one `compact` then moves the kept keys and values of layers 0..K into
the pool. After it, layers see the kept rows alone and write to the pool directly (`tail`).

A GPU is never waited for, but for one thing: without a cap nobody knows beforehand how many rows stay, and products have to
be asked for with their sizes. That number is on its way to the host while the rows are gathered.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from glimpse_kernels import Selection, attention, compact, glimpse_scores, rope
from glimpse_runtime.cache import KvLease
from glimpse_runtime.engine import Engine
from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.models.qwen2_5_vl.decoder import Buffers, Decoder, Stream
from glimpse_runtime.models.qwen2_5_vl.layout import VisionLayout
from glimpse_runtime.models.qwen2_5_vl.vision import VisionOutput
from glimpse_runtime.packing import PackedBatch
from glimpse_runtime.plan import PrunePlan
from glimpse_runtime.selection import Budget, row_bounds, select
from glimpse_runtime.streams import SideStream
from glimpse_runtime.tail import Place, finish, last_rows, one_each, pick, write_keys
from glimpse_runtime.timings import Timings
from glimpse_runtime.uploads import Arriving


class Prefill:
    """The state of one prompt batch: `start` takes it to its scores, `choose` to its last logits.

    Args:
        decoder, batch, plan: what is computed, on what, and how it is pruned (None: not at all).
        extra_rows: room kept in the pool for each sequence's generated tokens.
        scores: `[N]` fp32 in prompt order, if they come with the call.
        engine: has the room for keys and values.

    Attributes:
        scores: `[N]` fp32 visual scores in prompt order, once layer K was reached.
        seen: what the probe saw in each of the scorer's layers, `[N, heads]` fp32, the tower's order.
        selection: what stays, once selected.
        pool: keys and values of what stays.
        last_logits: `[B, vocabulary]` after the last prompt token.
        kept_positions: `[3, rows]` rotary positions of the prompt rows in the pool, packed; there may be columns behind the
            last one, without a meaning.
        kept_lengths: `[B]` int32 how many of them each sequence has.
        stage_layer: K, once it was reached; -1 where nothing is pruned.
    """

    def __init__(
        self,
        decoder: Decoder,
        batch: PackedBatch,
        plan: PrunePlan | None,
        extra_rows: int,
        scores: torch.Tensor | None = None,
        engine: Engine | None = None,
    ) -> None:
        self.decoder = decoder
        self.engine = Engine(decoder) if engine is None else engine
        self.batch = batch
        self.plan = plan
        self.extra_rows = extra_rows
        self.timings = Timings()
        self.scores = scores
        self.seen: list[torch.Tensor] = []
        self.selection: Selection | None = None
        self.pool: KvLease | None = None
        self.last_logits: torch.Tensor | None = None
        self.kept_positions: torch.Tensor | None = None
        self.kept_lengths: torch.Tensor | None = None
        self._stream: Stream  # rows between two layers
        self._x: torch.Tensor  # normed input of the stage's layer
        self._scratch = self.engine.workspace.borrow()
        self._into: Buffers  # of the layers on all rows
        self._keys: torch.Tensor  # of all rows up to the stage's layer: [layers, T, kv heads, head_dim]
        self._values: torch.Tensor
        self.stage_layer = -1

    def start(self, vision: VisionOutput | None, layout: VisionLayout | None) -> None:
        """Embed the prompt and, with a plan, run to the scores inside layer K; without one, to the last logits."""
        with self._timed("before"):
            self._stream = Stream(self._embedded(vision), None, *self.decoder.rotary(self.batch.positions))
        if self.plan is None or not self.batch.pictures:
            self.kept_positions = self.batch.positions
            self._tail(0, self.batch.cu_seqlens, self.batch.prompt_lengths)
            return
        scorer = self.plan.stages[0].score
        # It depends on the pictures alone: it can run beside the layers before the stage.
        beside = SideStream(self.batch.device)
        prepared = beside.run(
            lambda: scorer.prepare(vision.taps, layout) if scorer and vision and layout else None
        )
        with self._timed("before"):
            self._layers_on_all_rows()
        with self._timed("select"):
            if scorer is not None:
                scores = scorer.score(self.seen, prepared.join())
                self.scores = scores.float().index_select(0, self.batch.visual_order)

    def choose(self, scores: torch.Tensor | None = None) -> None:
        """Select by the plan's budget (from `scores [N]` if given), finish layer K and run the layers behind it."""
        assert self.plan is not None
        judged = self.scores if scores is None else scores
        if judged is None:
            raise GlimpseError(
                f"plan {self.plan.name!r}: it scores nothing, so keep masks must come with the call"
            )
        with self._timed("select"):
            budget = self.plan.stages[0].select
            self.selection = select(judged, self.batch, budget)
            lengths, index = self._gather(self.selection, budget)
        with self._timed("after"):
            self._finish_stage(self.selection.cu_seqlens, index, max(lengths))
        self._tail(self.stage_layer + 1, self.selection.cu_seqlens, lengths, index)

    # -- layers on all rows ------------------------------------------------------------------------------------

    def _embedded(self, vision: VisionOutput | None) -> torch.Tensor:
        batch, embed = self.batch, self.decoder.embed
        hidden = self._scratch.empty("hidden", (batch.num_rows, embed.shape[1]), embed.dtype)
        torch.index_select(embed, 0, batch.ids, out=hidden)
        if vision is not None:
            embeds = vision.embeds.index_select(0, batch.visual_order)
            hidden.index_copy_(0, batch.visual_rows, embeds.to(hidden.dtype))
        if batch.probed:  # their layer 0 vector is added like those of the later layers
            hidden.index_fill_(0, batch.probe_rows.flatten(), 0.0)
        return hidden

    def _layers_on_all_rows(self) -> None:
        """The layers before the stage, and of the stage's layer keys, values and what the probe sees."""
        assert self.plan is not None
        decoder, config, rows = self.decoder, self.decoder.config, self.batch.num_rows
        last = self.stage_layer = min(self.plan.stages[0].at.index, config.num_layers - 1)
        shape = (last + 1, rows, config.num_kv_heads, config.head_dim)
        # Not of the scratch, which is kept: their room is needed behind the stage.
        self._keys, self._values = (
            torch.empty(shape, dtype=decoder.dtype, device=decoder.device) for _ in range(2)
        )
        self._into = Buffers.allocate(config, rows, decoder.dtype, decoder.device, self._scratch.empty)
        for number in range(last):
            self._full_layer(number)
        self._x = self._enter(last)
        into, keys, values = self._into, self._keys[last], self._values[last]
        write_keys(decoder, decoder.layers[last], self._stream, self._x, into, keys, values)
        self._glance(last, None)

    def _enter(self, number: int) -> torch.Tensor:
        """The normed input of a layer, with the probe's vector of this layer added to its rows."""
        vectors = self._probe_vectors()
        if vectors is not None and number in vectors:
            added = vectors[number].repeat(len(self.batch.probed), 1)
            self._stream.hidden.index_add_(0, self.batch.probe_rows.flatten(), added)
        return self.decoder.normed(self._stream, self.decoder.layers[number].input_norm, self._into.x)

    def _probe_vectors(self) -> Mapping[int, torch.Tensor] | None:
        if self.plan is None or not self.batch.probed:
            return None
        scorer = self.plan.stages[0].score
        return scorer.probe.vectors if scorer else None

    def _full_layer(self, number: int) -> None:
        """One layer for all rows, keys and values to the workspace."""
        decoder, layer, stream, into = self.decoder, self.decoder.layers[number], self._stream, self._into
        layer.qkv(self._enter(number), outs=into.qkv)
        q, k, v = (decoder.heads(part) for part in into.qkv)
        keys, values = self._keys[number], self._values[number]
        rope(q, k, stream.cos, stream.sin, v=v, k_out=keys, v_out=values)
        if self.batch.probed:
            self._glance(number, q)
        cu = self.batch.cu_seqlens
        longest = max(self.batch.lengths)
        attention(q, keys, values, cu, cu, causal=True, max_seqlen_q=longest, out=into.attended)
        decoder.finish_layer(layer, stream, into.attended, into)

    # -- the stage ---------------------------------------------------------------------------------------------

    def _glance(self, number: int, q: torch.Tensor | None) -> None:
        """What the last probe row of each sequence sees in this layer, if the plan asks; `q` of all rows if known."""
        scorer = self.plan.stages[0].score if self.plan else None
        if scorer is None or number not in scorer.query_layers:
            return
        batch, stream, rows = self.batch, self._stream, self.batch.probe_rows[:, -1]
        if q is None:
            asking = self.decoder.layers[number].qkv.parts[0]
            asked = self.decoder.heads(asking(self._x.index_select(0, rows)))
            rope(asked, None, stream.cos.index_select(0, rows), stream.sin.index_select(0, rows))
        else:
            asked = q.index_select(0, rows)
        keys, values, cu, lse = self._keys[number], self._values[number], batch.cu_seqlens, None
        if scorer.normalized:
            _, lse = attention(
                asked, keys, values, batch.cu_probed, cu, causal=True, max_seqlen_q=1, return_lse=True
            )
        self.seen.append(glimpse_scores(asked, keys, batch.tower_rows, batch.tower_probe, lse=lse))

    def _gather(self, selection: Selection, budget: Budget) -> tuple[Sequence[int], torch.Tensor]:
        """Drop the rows that were not selected from the stream, and from the normed input of layer K.

        Returns:
            how many rows each sequence has now, or with a cap at most; and where they were, `[sum of them]` int32.
        """
        batch, cu, lengths = self.batch, selection.cu_seqlens, row_bounds(self.batch, budget)
        counts = None
        if batch.device.type == "cpu":  # there is nothing to wait for
            lengths = _lengths(Arriving(cu))
        elif not budget.capped:
            counts = Arriving(cu)
        index, stream = selection.index[: sum(lengths)], self._stream
        sources = [stream.hidden, self._x, stream.cos, stream.sin, batch.positions.T.contiguous()]
        kept = [torch.empty((len(index), *s.shape[1:]), dtype=s.dtype, device=s.device) for s in sources]
        compact(index, None, None, None, None, None, rows=list(zip(sources, kept, strict=True)))
        if counts is not None:
            lengths = _lengths(counts)
        hidden, self._x, cos, sin, positions = (rows[: sum(lengths)] for rows in kept)
        self._stream, self.kept_positions = Stream(hidden, None, cos, sin), positions.T
        del self._into
        return lengths, index[: sum(lengths)]

    def _finish_stage(self, cu: torch.Tensor, index: torch.Tensor, longest: int) -> None:
        """The rest of layer K for the rows `index` that stay, packed as `cu` says: they see the keys of all rows."""
        decoder, number, all_rows = self.decoder, self.stage_layer, self.batch.cu_seqlens
        x, keys, values = self._x, self._keys[number], self._values[number]
        del self._x
        if number == decoder.config.num_layers - 1:
            ends = last_rows(cu)
            self._stream, x, index = (
                pick(self._stream, ends),
                x.index_select(0, ends),
                index.index_select(0, ends),
            )
            cu, longest = one_each(cu), 1
        layer = decoder.layers[number]
        q = decoder.heads(layer.qkv.parts[0](x))
        rope(q, None, self._stream.cos, self._stream.sin)
        # A row behind the last one came from nowhere (-1): it sees nothing.
        begin = all_rows.index_select(0, torch.bucketize(index, all_rows[1:], right=True))
        attended = attention(
            q, keys, values, cu, all_rows, causal=True, q_positions=index - begin, max_seqlen_q=longest
        )
        decoder.finish_layer(layer, self._stream, attended)

    # -- what stays --------------------------------------------------------------------------------------------

    def _tail(
        self, first: int, cu: torch.Tensor, lengths: Sequence[int], index: torch.Tensor | None = None
    ) -> None:
        """Layers `first`.. on the stream's rows, packed as `cu` says, keys and values to the pool; there they join those of the
        layers before, which are gathered by `index`."""
        with self._timed("after"):
            self.pool = pool = self.engine.lease([length + self.extra_rows for length in lengths])
            pool.lengths = self.kept_lengths = cu[1:] - cu[:-1]
            if index is not None:
                slots = Place(pool.k_slots, pool.v_slots, pool.starts).slots(cu, len(index))
                to = pool.k_slots[:first], pool.v_slots[:first]
                compact(index, slots, self._keys, self._values, *to)
                del self._keys, self._values
            stream = self._stream
            del self._stream
            self.last_logits = finish(self.engine, pool, first, stream, cu, max(lengths), self._scratch)
            self.engine.workspace.give_back(self._scratch)
            del self._scratch

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        setattr(self.timings, phase, getattr(self.timings, phase) + time.perf_counter() - began)


def _lengths(ends: Arriving) -> list[int]:
    """Rows of each sequence from their `cu_seqlens`."""
    bounds = ends.wait()
    return [stop - start for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]

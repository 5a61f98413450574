# SPDX-License-Identifier: Apache-2.0
"""A prompt batch on its way through the model, pruned by the stages of a plan.

Order and memory only: every number comes from `glimpse_kernels` or a GEMM. Layers between two stages see the same rows.
Where a stage lies inside a layer K, everybody's keys and values are computed there, but queries, output projection and
MLP only for the rows that stay. Keys and values go to the pool; if a later stage evicts dropped rows from the layers before it
too, they wait in a workspace, and one `compact` then moves those of the rows that stay. Behind the last stage layers see few
rows and write to the pool directly (`tail`).

A GPU is never waited for where the host knows how many rows stay. Where scores decide that, products have to be asked for with
their sizes: behind the last stage a cap is size enough, without one, and before another stage, that number is waited for, on its
way to the host while the rows are gathered.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from glimpse_runtime.all_rows import AllRows
from glimpse_runtime.cache import KvLease
from glimpse_runtime.engine import Engine
from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.models.qwen2_5_vl.decoder import Decoder
from glimpse_runtime.models.qwen2_5_vl.layout import VisionLayout
from glimpse_runtime.models.qwen2_5_vl.vision import VisionOutput
from glimpse_runtime.packing import PackedBatch
from glimpse_runtime.plan import PrunePlan, Stage
from glimpse_runtime.restriction import Restriction, counted, past, renumbered, restricted
from glimpse_runtime.rooms import Room, Rooms
from glimpse_runtime.stages.mergers import checked_merged
from glimpse_runtime.stages.outcome import StageOutcome, of_whole_pictures
from glimpse_runtime.stages.places import Layer, Vision
from glimpse_runtime.stages.scorers import GlanceScorer, RowScorer, VisionScorer, checked_scores
from glimpse_runtime.stages.selection import Chosen, bounds_of, check_left, checked_choice
from glimpse_runtime.stages.views import RowView, StageView, prompt_ends
from glimpse_runtime.streams import Pending, SideStream
from glimpse_runtime.tail import finish
from glimpse_runtime.thinning import Pictures
from glimpse_runtime.timings import Timings
from glimpse_runtime.uploads import Arriving, lengths_of


class Prefill:
    """The state of one prompt batch: `start` takes it to the scores of the first stage in the decoder, `choose` to its last logits.

    Args:
        decoder, batch, plan: what is computed, on what, and how it is pruned (None: not at all).
        extra_rows: room kept in the pool for each sequence's generated tokens.
        scores: `[N]` fp32 in prompt order, if they come with the call.
        engine: has the room for keys and values.

    Attributes:
        scores: `[N]` fp32 scores of the stage that was reached last, in prompt order, of the tokens that were there.
        told: the same of all visual tokens of the prompts, NaN where one was gone before.
        seen: what the probe saw in each of the scorer's layers, `[N, heads]` fp32, of the tokens that were there, prompt order.
        outcomes: what the stages kept so far.
        last_logits: `[B, vocabulary]` after the last prompt token.
        kept_positions: `[3, rows]` rotary positions of the prompt rows that are left behind the last stage, packed; there may be
            columns behind the last one, without a meaning.
        kept_rows: `[B]` int32 how many of them each sequence has.
        tail_layer: the first layer behind the last stage; 0 where the decoder sees all rows that there are.
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
        self.plan = None if plan is None else plan.resolved(decoder.config.num_layers)
        self.extra_rows = extra_rows
        self.timings = Timings()
        self.scores = self.told = scores
        self.seen: list[torch.Tensor] = []
        self.outcomes: tuple[StageOutcome, ...] = ()
        self.last_logits: torch.Tensor | None = None
        self.kept_positions: torch.Tensor | None = None
        self.kept_rows: torch.Tensor | None = None
        self.tail_layer = 0
        self._stages: deque[Stage] = deque(self.plan.stages if self.plan and batch.pictures else ())
        self._now = batch  # what is there
        self._next_positions = batch.next_positions
        self._first = 0  # layer that was not begun yet
        self._given = scores is not None
        self._scratch = self.engine.workspace.borrow()
        self._pictures: Pictures | None = None  # for as long as a stage wants to see them
        self._prepared: Pending[Any] | None = None  # what a glance made of them
        self._of_prompt: dict[int, Any] = {}  # by the identity of a scorer: what it made of the prompt
        self._rows: AllRows
        self._rooms = Rooms(self.engine, extra_rows)
        self._room: Room  # of the layers up to the next stage
        self._view: RowView  # of the stage that waits for its selection

    def start(self, vision: VisionOutput | None, layout: VisionLayout | None) -> None:
        """Embed the prompt and run to the scores of the first stage in the decoder; without one, to the last logits."""
        if self._stages and vision is not None and layout is not None:
            with self._timed("select"):
                self._pictures = Pictures(vision, layout)
                self._before_decoder()
                vision = self._pictures.vision
        with self._timed("before"):
            glance = next((stage.glance for stage in self._stages if stage.glance), None)
            embeds = None if vision is None else vision.embeds
            self._rows = AllRows(self.decoder, self._scratch, self._now, embeds, glance)
        if glance is None:
            self._pictures = None
        if not self._evicting:
            self._rooms.lease(self._now, self._stages)
        if self._stages:
            self._to_next_stage()
        else:
            self.kept_positions = self._now.positions
            self._tail(self._now.cu_seqlens, self._now.prompt_lengths)

    def give(self, masks: torch.Tensor) -> None:
        """Let `choose` go by `masks`, scores `[N]` above and below 0.

        Raises:
            GlimpseError: no stage waits for a selection, or not one that masks can be given to; nothing has changed then.
        """
        if self.last_logits is not None:
            raise GlimpseError("keep masks: expected a stage that waits in the decoder, found none")
        assert self.plan is not None
        plan = self.plan.with_given_masks()
        self.plan = plan.with_budget(max_remain_ratio=None, min_remain_num=0, anchor_positions=())
        self.scores = self.told = masks
        self._given, self._stages = True, deque(self.plan.stages)
        self._rooms.widen(self._now)

    def choose(self) -> None:
        """Select, and go on to the last logits. A selection that is refused may be made anew; other errors are the end."""
        while True:
            if not self._stages:
                raise GlimpseError("select(): this prefill failed before and cannot go on: make a new one")
            stage = self._stages[0]
            with self._timed("select"):
                chosen = self._chosen(stage, self._view)
            self._stages.popleft()
            self._select(stage, chosen)
            if self.last_logits is not None:
                return
            self._to_next_stage()

    # -- stages ------------------------------------------------------------------------------------------------

    def _before_decoder(self) -> None:
        """The stages on the tower's output, and what later ones want to know of it."""
        assert self._pictures is not None
        while self._stages and isinstance(self._stages[0].at, Vision):
            stage = self._stages.popleft()
            view = self._pictures.view(self._now, self._embeddings, probes=self._probes_stay)
            if isinstance(stage.score, VisionScorer):
                self._judge(checked_scores(stage.score.score(view), view.batch.num_visual, stage.score))
            chosen = self._chosen(stage, view)
            features = None
            if stage.merge is not None:
                features = checked_merged(stage.merge.merged(view, chosen), view.features, stage.merge)
            small = self._restricted(stage, chosen)
            self._pictures = self._pictures.thinned(self._now, small, features)
            self._now = small.batch
            if stage.positions == "renumber":
                positions = renumbered(self._now.cu_seqlens, self._now.num_rows)
                self._now = replace(self._now, positions=positions)
                self._next_positions = past(prompt_ends(self._now) - self._now.cu_seqlens[:-1])
        later = {id(stage.score): stage.score for stage in self._stages if isinstance(stage.score, RowScorer)}
        if any(type(scorer).prepare is not RowScorer.prepare for scorer in later.values()):
            view = self._pictures.view(self._now, self._embeddings, probes=self._probes_stay)
            self._of_prompt = {key: scorer.prepare(view) for key, scorer in later.items()}

    def _judge(self, scores: torch.Tensor) -> None:
        """`scores` are those of the stage at hand."""
        self.scores, self.told = scores, of_whole_pictures(scores, self._now, math.nan)

    def _embeddings(self, ids: torch.Tensor) -> torch.Tensor:
        return self.decoder.embed.index_select(0, ids)

    def _to_next_stage(self) -> None:
        """The layers before the next stage, and of its own layer what the scores need."""
        stage, batch, rows = self._stages[0], self._now, self._rows
        assert not isinstance(stage.at, Vision)
        number, inside, glance = int(stage.at.index), isinstance(stage.at, Layer), stage.glance
        if glance is not None and self._pictures is not None:
            taps, layout = self._pictures.vision.hidden, self._pictures.layout
            # It depends on the pictures alone: it can run beside the layers before the stage.
            self._prepared = SideStream(batch.device).run(lambda: glance.prepare(taps, layout))
            self._pictures = None
        with self._timed("before"):
            self._open(range(self._first, number + inside))
            rows.begin()
            for layer in range(self._first, number):
                rows.layer(layer, self._room)
            self._first = number + inside
            if inside:
                rows.keys_of(number, self._room)
            else:
                rows.before(number)
        with self._timed("select"):
            self._view = RowView(
                batch,
                self.decoder,
                number,
                rows.stream,
                rows.x,
                self._room.row_keys(number) if inside else None,
                probes=any(later.glance for later in list(self._stages)[1:]),
                prepared=self._of_prompt.get(id(stage.score)),
            )
            if isinstance(stage.score, RowScorer):
                self._judge(checked_scores(stage.score.score(self._view), batch.num_visual, stage.score))
            elif isinstance(stage.score, GlanceScorer):
                assert self._prepared is not None
                found = stage.score.score(rows.seen, self._prepared.join())
                self._prepared = None
                scores = checked_scores(found, batch.num_visual, stage.score)
                self._judge(scores.index_select(0, batch.visual_order))
                self.seen = [seen.index_select(0, batch.visual_order) for seen in rows.seen]

    def _select(self, stage: Stage, chosen: Chosen) -> None:
        """Drop what is not chosen, and finish its layer; behind the last stage, all layers."""
        inside, final, rows = isinstance(stage.at, Layer), not self._stages, self._rows
        behind = self._first == self.decoder.config.num_layers  # no layer is left
        with self._timed("select"):
            del self._view
            cu = chosen.selection.cu_seqlens
            lengths, index = self._gather(stage, chosen, inside, final)
            self._rooms.drop(index)
        with self._timed("after"):
            if inside:
                number, longest = self._first - 1, max(lengths)
                rows.finish_layer(number, self._room, cu, index, longest, ends_only=final and behind)
            if stage.evict_earlier and not self._evicting:
                left = replace(self._now, prompt_lengths=tuple(lengths)) if final else self._now
                self._rooms.lease(left, self._stages)
                self._rooms.move(cu, len(index), self._next_positions)
                if self._first:  # not before the first layer
                    del self._room
            if stage.positions == "renumber" and not behind:
                self.kept_positions = renumbered(cu, len(index))
                rows.stream.cos, rows.stream.sin = self.decoder.rotary(self.kept_positions)
                ends = cu[1:] if final else prompt_ends(self._now)
                self._next_positions = past(ends - cu[:-1])
                if not final:
                    self._now = rows.batch = replace(self._now, positions=self.kept_positions)
        if final:
            self.tail_layer = self._first
            self._tail(cu, lengths)

    def _gather(
        self, stage: Stage, chosen: Chosen, inside: bool, final: bool
    ) -> tuple[Sequence[int], torch.Tensor]:
        """Drop the rows that were not selected.

        Returns:
            how many rows each sequence has now, or behind the last stage at most; and where they were, `[sum of them]` int32.
        """
        batch, select, cu, counts = self._now, stage.select, chosen.selection.cu_seqlens, None
        small = None if final else self._restricted(stage, chosen)
        if small is not None:
            lengths: Sequence[int] = small.batch.lengths
        elif batch.device.type == "cpu":  # there is nothing to wait for
            check_left(select, batch, counted(batch, chosen.selection.keep))
            lengths = lengths_of(Arriving(cu))
        else:
            lengths = select.row_bounds(batch)
            counts = None if select.capped else Arriving(cu)
        index = chosen.selection.index[: sum(lengths)]
        lengths, self.kept_positions = self._rows.gather(index, lengths, counts, inside=inside)
        if small is not None:
            if self._pictures is not None:
                self._pictures = self._pictures.thinned(batch, small)
            self._now = self._rows.batch = replace(small.batch, positions=self.kept_positions)
        return lengths, index[: sum(lengths)]

    def _chosen(self, stage: Stage, view: StageView) -> Chosen:
        """What the stage keeps."""
        judged = self.scores if stage.score is not None or self._given else None
        if stage.select.scored and judged is None:
            assert self.plan is not None
            raise GlimpseError(
                f"plan {self.plan.name!r}: it scores nothing, so keep masks must come with the call"
            )
        chosen = checked_choice(stage.select.choose(view, judged), view.batch, stage.select)
        self.outcomes += (StageOutcome.of(stage, view.batch, chosen.selection, judged),)
        return chosen

    def _restricted(self, stage: Stage, chosen: Chosen) -> Restriction:
        """The batch behind the stage. How many tokens stay of each picture is waited for where scores decide it."""
        batch = self._now
        if stage.select.exact and not batch.ending and batch.device.type != "cpu":
            left = bounds_of(stage.select, batch)
        else:
            left = counted(batch, chosen.selection.keep)
            check_left(stage.select, batch, left)
        return restricted(batch, chosen.selection, left, probes=self._probes_stay)

    @property
    def _probes_stay(self) -> bool:
        """Whether a stage behind the one at hand still needs the probe rows."""
        return any(stage.glance for stage in self._stages)

    # -- keys and values ---------------------------------------------------------------------------------------

    @property
    def _evicting(self) -> bool:
        """Whether a stage to come drops rows from the layers before it too."""
        return any(stage.evict_earlier for stage in self._stages)

    def _open(self, layers: range) -> None:
        """Room for layers that are about to run."""
        if layers and self._evicting:
            self._room = self._rooms.wait(layers, self._now)
        elif layers:
            self._room = self._rooms.enter(layers, self._now, self._next_positions)

    @property
    def leases(self) -> tuple[KvLease, ...]:
        """Keys and values in the pool, one for the layers between two stages, in their order; each one's `lengths` are its prompt
        rows."""
        return self._rooms.leases

    @property
    def next_positions(self) -> tuple[torch.Tensor, ...]:
        """Of each of them, `[3, B]` rotary positions of the first generated token."""
        return self._rooms.next_positions

    def _tail(self, cu: torch.Tensor, lengths: Sequence[int]) -> None:
        """The layers that are left, on the stream's rows, packed as `cu` says."""
        self.kept_rows = cu[1:] - cu[:-1]
        with self._timed("after"):
            if self._first < self.decoder.config.num_layers:
                self._rooms.occupy(self._first, cu, self._next_positions)
            stream = self._rows.stream
            del self._rows
            self.last_logits = finish(
                self.engine, self.leases[-1], self._first, stream, cu, max(lengths), self._scratch,
                pruned=bool(self.outcomes),
            )  # fmt: skip
            self.engine.workspace.give_back(self._scratch)
            del self._scratch

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        setattr(self.timings, phase, getattr(self.timings, phase) + time.perf_counter() - began)

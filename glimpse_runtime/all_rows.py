# SPDX-License-Identifier: Apache-2.0
"""The layers on all rows that are there, from one stage of a plan to the next, and how rows leave.

Where a stage lies inside a layer K, everybody's keys and values are computed there, but queries, output projection and MLP only
for the rows that stay.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from glimpse_kernels import attention, compact, glimpse_scores, rope
from glimpse_runtime.models.qwen2_5_vl.decoder import Buffers, Decoder, Stream
from glimpse_runtime.packing import PackedBatch
from glimpse_runtime.rooms import Room
from glimpse_runtime.stages.scorers import GlanceScorer
from glimpse_runtime.tail import last_rows, one_each, pick, write_keys
from glimpse_runtime.uploads import Arriving, lengths_of
from glimpse_runtime.workspace import Scratch


class AllRows:
    """Rows on their way through the decoder.

    Args:
        decoder: whose layers they go through.
        scratch: memory for what the layers leave behind.
        glance: what looks at them from probe rows, if the plan has that.

    Attributes:
        batch: the rows.
        stream: their state between two layers.
        seen: what the probe saw in each of the glance's layers, `[N, heads]` fp32, the tower's order.
    """

    def __init__(
        self,
        decoder: Decoder,
        scratch: Scratch,
        batch: PackedBatch,
        embeds: torch.Tensor | None,
        glance: GlanceScorer | None,
    ) -> None:
        self._decoder, self._scratch, self._glance = decoder, scratch, glance
        self.batch = batch
        self.stream = Stream(self._embedded(embeds), None, *decoder.rotary(batch.positions))
        self.seen: list[torch.Tensor] = []
        self.x: torch.Tensor  # normed input of a stage's layer
        self._into: Buffers

    def _embedded(self, embeds: torch.Tensor | None) -> torch.Tensor:
        """`embeds [N, width]`: of the visual tokens, in the order of the tower's output."""
        batch, table = self.batch, self._decoder.embed
        hidden = self._scratch.empty("hidden", (batch.num_rows, table.shape[1]), table.dtype)
        torch.index_select(table, 0, batch.ids, out=hidden)
        if embeds is not None:
            own = embeds.index_select(0, batch.visual_order)
            hidden.index_copy_(0, batch.visual_rows, own.to(hidden.dtype))
        if batch.probed:  # their layer 0 vector is added like those of the later layers
            hidden.index_fill_(0, batch.probe_rows.flatten(), 0.0)
        return hidden

    # -- layers ------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Memory for the results of sublayers, before the first layer that sees the rows."""
        decoder = self._decoder
        self._into = Buffers.allocate(
            decoder.config, self.batch.num_rows, decoder.dtype, decoder.device, self._scratch.empty
        )

    def layer(self, number: int, room: Room) -> None:
        """One layer, keys and values to `room`."""
        decoder, layer, stream, into = self._decoder, self._decoder.layers[number], self.stream, self._into
        layer.qkv(self._enter(number), outs=into.qkv)
        q, k, v = (decoder.heads(part) for part in into.qkv)
        keys, values, longest = room.keys(number), room.values(number), max(self.batch.lengths)
        rope(q, k, stream.cos, stream.sin, v=v, k_out=keys, v_out=values, slots=room.slots)
        if self.batch.probed:
            self._look(number, room, q)
        attention(
            q, keys, values, room.cu_rows, room.cu_places, causal=True, max_seqlen_q=longest, out=into.attended
        )  # fmt: skip
        decoder.finish_layer(layer, stream, into.attended, into)

    def keys_of(self, number: int, room: Room) -> None:
        """Of a layer that a stage lies in, what all rows leave there."""
        self.x = self._enter(number)
        layer, keys, values = self._decoder.layers[number], room.keys(number), room.values(number)
        write_keys(self._decoder, layer, self.stream, self.x, self._into, keys, values, room.slots)
        if self.batch.probed:
            self._look(number, room, None)
        del self._into  # scores and the rows that stay need the room

    def before(self, number: int) -> None:
        """The normed input of a layer that a stage lies before. (The layer's own probe vectors are added when it runs.)"""
        self.x = self._decoder.normed(self.stream, self._decoder.layers[number].input_norm, self._into.x)
        del self._into

    def _enter(self, number: int) -> torch.Tensor:
        """The normed input of a layer, with the probe's vector of this layer added to its rows."""
        if self.batch.probed and self._glance is not None and number in self._glance.probe.vectors:
            added = self._glance.probe.vectors[number].repeat(len(self.batch.probed), 1)
            self.stream.hidden.index_add_(0, self.batch.probe_rows.flatten(), added)
        return self._decoder.normed(self.stream, self._decoder.layers[number].input_norm, self._into.x)

    def _look(self, number: int, room: Room, q: torch.Tensor | None) -> None:
        """What the last probe row of each sequence sees in this layer, if the plan asks; `q` of all rows if known."""
        if self._glance is None or number not in self._glance.query_layers:
            return
        batch, stream, rows = self.batch, self.stream, self.batch.probe_rows[:, -1]
        if q is None:
            asking = self._decoder.layers[number].qkv.parts[0]
            asked = self._decoder.heads(asking(self.x.index_select(0, rows)))
            rope(asked, None, stream.cos.index_select(0, rows), stream.sin.index_select(0, rows))
        else:
            asked = q.index_select(0, rows)
        # Their stage evicts the probe rows: until then all rows are in a workspace, at their own numbers.
        keys, values, cu, lse = room.keys(number), room.values(number), batch.cu_seqlens, None
        if self._glance.normalized:
            _, lse = attention(
                asked, keys, values, batch.cu_probed, cu, causal=True, max_seqlen_q=1, return_lse=True
            )
        self.seen.append(glimpse_scores(asked, keys, batch.tower_rows, batch.tower_probe, lse=lse))

    # -- leaving -----------------------------------------------------------------------------------------------

    def gather(
        self, index: torch.Tensor, lengths: Sequence[int], counts: Arriving | None, *, inside: bool
    ) -> tuple[Sequence[int], torch.Tensor]:
        """Keep the rows `index [sum of lengths]` int32 of the stream and of their positions, and with `inside` of the normed input.

        Args:
            counts: how many each sequence keeps, if that is not known yet: it is waited for behind the copies.

        Returns:
            the lengths, as `counts` has them; and the positions `[3, rows]` of the rows that are left.
        """
        stream, positions = self.stream, self.batch.positions.T.contiguous()
        sources = [stream.hidden, stream.cos, stream.sin, positions, *([self.x] if inside else [])]
        # Between layers these pieces hold nothing.
        places = ("delta", None, None, None, "attended")[: len(sources)]
        kept = [self._room_for(name, len(index), s) for name, s in zip(places, sources, strict=True)]
        self._scratch.swap("hidden", "delta")
        compact(index, None, None, None, None, None, rows=list(zip(sources, kept, strict=True)))
        if counts is not None:
            lengths = lengths_of(counts)
        hidden, cos, sin, positions, *rest = (rows[: sum(lengths)] for rows in kept)
        self.stream = Stream(hidden, None, cos, sin)
        del self.x
        if rest:
            (self.x,) = rest
        return lengths, positions.T

    def _room_for(self, name: str | None, rows: int, like: torch.Tensor) -> torch.Tensor:
        """So many rows like those of a tensor: in a piece of this name, or in memory of their own."""
        shape = (rows, *like.shape[1:])
        if name is None:
            return torch.empty(shape, dtype=like.dtype, device=like.device)
        return self._scratch.empty(name, shape, like.dtype)

    def finish_layer(
        self,
        number: int,
        room: Room,
        cu_seqlens: torch.Tensor,
        index: torch.Tensor,
        longest: int,
        *,
        ends_only: bool,
    ) -> None:
        """The rest of a stage's layer for the rows `index` that stay, packed as `cu_seqlens` says: they see the keys of all rows in
        `room`.

        Args:
            longest: the most rows that a sequence keeps.
            ends_only: nothing but the last row of each sequence is wanted.
        """
        decoder, all_rows, x = self._decoder, room.batch.cu_seqlens, self.x
        del self.x
        cu = cu_seqlens
        if ends_only:
            ends = last_rows(cu)
            self.stream, x = pick(self.stream, ends), x.index_select(0, ends)
            index, cu, longest = index.index_select(0, ends), one_each(cu), 1
        layer = decoder.layers[number]
        into = Buffers.allocate(decoder.config, len(x), decoder.dtype, decoder.device, self._scratch.empty)
        q = decoder.heads(layer.qkv.parts[0](x, out=into.qkv[0]))
        del x  # what was gathered may lie where attention writes
        rope(q, None, self.stream.cos, self.stream.sin)
        # A row behind the last one came from nowhere (-1): it sees nothing.
        begin = all_rows.index_select(0, torch.bucketize(index, all_rows[1:], right=True))
        cu = cu if room.slots is None else torch.stack([cu[:-1], cu[1:]], dim=1).flatten()
        attended = attention(
            q, room.keys(number), room.values(number), cu, room.cu_places, causal=True,
            q_positions=index - begin, max_seqlen_q=longest, out=into.attended,
        )  # fmt: skip
        decoder.finish_layer(layer, self.stream, attended, into)

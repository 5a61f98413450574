# SPDX-License-Identifier: Apache-2.0
"""The static memory of decoding steps, and what a step does with it.

A lane is a sequence's place in a step. A step always does the same on the same addresses; positions, slots and lengths lie in
memory, and a lane that nobody decodes in has length 0 and slot -1. So it can be recorded on a CPU and captured on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch

from glimpse_kernels import decode_attention, rope
from glimpse_runtime.cache import KvLease, KvPool, slots_at
from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.models.qwen2_5_vl.decoder import Buffers, Decoder, Stream

CHUNK = 64  # steps that are scheduled at once


class Lanes:
    """Memory of a step.

    Where pruning drops rows at several layers, the layers between two drops are a *segment*: the sequences have the same rows
    in all of them, and other ones elsewhere. Each has tables, slots, lengths and, since rows may be numbered anew behind a
    drop, rotary positions of its own. S segments; without pruning at several layers: one.

    Args:
        segments: layers and block table of each, in the order of the layers.

    Attributes:
        count: lanes.
        segments: their layers.
        tables: `[lanes, width]` int32 blocks of each lane, one a segment; widths may differ.
        hidden: `[lanes, hidden]` embedded tokens when a step begins.
        now: `[words]` int32, what differs between steps; `cos`, `sin`, `slots` and `lengths` are views of it.
        cos, sin: `[S, lanes, head_dim / 2]` fp32 of the step in force.
        slots: `[S, lanes]` int32 where its keys and values go, -1 for nowhere.
        lengths: `[S, lanes]` int32 keys that it sees, its own among them; 0 for none.
        logits: `[lanes, vocabulary]` of the last step.

    Raises:
        GlimpseError: the segments are not all layers, one after the other.
    """

    def __init__(self, decoder: Decoder, segments: Sequence[tuple[range, torch.Tensor]]) -> None:
        config, device = decoder.config, decoder.device
        self.decoder, self.count = decoder, segments[0][1].shape[0]
        self.segments = tuple(layers for layers, _ in segments)
        self.tables = [table for _, table in segments]
        if list(chain(*self.segments)) != list(range(config.num_layers)):
            raise GlimpseError(
                f"keys and values: expected layers 0 to {config.num_layers - 1} in order, found {self.segments}"
            )
        rows = len(segments) * self.count
        angles = config.head_dim // 2 * rows
        self.sizes = [angles, angles, rows, rows]
        self.now = torch.zeros(sum(self.sizes), dtype=torch.int32, device=device)
        each = (part.view(len(segments), self.count, -1) for part in self.now.split(self.sizes))
        cos, sin, slots, lengths = each
        self.cos, self.sin = cos.view(torch.float32), sin.view(torch.float32)
        self.slots, self.lengths = slots.squeeze(-1), lengths.squeeze(-1)
        self.into = Buffers.allocate(config, self.count, decoder.dtype, device)
        self.hidden = torch.empty_like(self.into.x)
        self.logits = self.into.x.new_empty(self.count, config.vocab_size)

    def scheduled(self, positions: torch.Tensor, rows: torch.Tensor, steps: int) -> torch.Tensor:
        """`[steps, words]`: what `now` has to hold in each of the coming steps.

        Args:
            positions: `[3, S, lanes]` of the first one.
            rows: `[S, lanes]` int32 keys of each lane before it.
        """
        step = torch.arange(steps, dtype=torch.int32, device=self.now.device)[:, None, None]
        cos, sin = self.decoder.rotary((positions[:, None] + step).flatten(1))
        at = rows + step
        slots = [slots_at(table, own) for table, own in zip(self.tables, at.unbind(1), strict=True)]
        parts = (cos.view(torch.int32), sin.view(torch.int32), *slots, at + 1)
        return torch.cat([part.reshape(steps, -1) for part in parts], dim=1)

    def rest(self, planned: torch.Tensor, resting: torch.Tensor) -> None:
        """No slot and length 0 for the lanes where `resting [lanes]` is true, in `planned [steps, words]`."""
        *_, slots, lengths = planned.split(self.sizes, dim=1)
        slots.unflatten(1, self.slots.shape).masked_fill_(resting, -1)
        lengths.unflatten(1, self.slots.shape).masked_fill_(resting, 0)

    def layers(self, pools: Sequence[KvPool]) -> None:
        """From embedded tokens to logits, on static memory only: nothing here may depend on a number of this step.

        Args:
            pools: with the keys and values of each segment.
        """
        decoder, into = self.decoder, self.into
        stream = Stream(self.hidden, None, self.cos[0], self.sin[0])
        q, k, v = (decoder.heads(part) for part in into.qkv)
        for at, (numbers, table, pool) in enumerate(zip(self.segments, self.tables, pools, strict=True)):
            stream.cos, stream.sin = self.cos[at], self.sin[at]
            slots, lengths = self.slots[at], self.lengths[at]
            for number in numbers:
                layer, (keys, values) = decoder.layers[number], pool.layer(number)
                layer.qkv(decoder.normed(stream, layer.input_norm, into.x), outs=into.qkv)
                k_out, v_out = keys.flatten(0, 1), values.flatten(0, 1)
                rope(q, k, stream.cos, stream.sin, v=v, k_out=k_out, v_out=v_out, slots=slots)
                decode_attention(q, keys, values, table, lengths, out=into.attended)
                decoder.finish_layer(layer, stream, into.attended, into)
        decoder.logits(stream, into, self.logits)


class DeviceLanes(Lanes):
    """Lanes whose steps take everything from the device, tokens included.

    Attributes:
        tokens: `[lanes]` int64 that the next step appends.
        active: `[lanes]` bool, false where nothing is decoded (any more).
    """

    def __init__(self, decoder: Decoder, count: int, segments: Sequence[range]) -> None:
        device = decoder.device
        nothing = torch.zeros(count, 0, dtype=torch.int32, device=device)
        super().__init__(decoder, [(layers, nothing) for layers in segments])
        self._tables: dict[tuple[int, int], torch.Tensor] = {}
        self.tokens = torch.zeros(count, dtype=torch.int64, device=device)
        self.active = torch.zeros(count, dtype=torch.bool, device=device)
        shape = (len(segments), count)
        self._positions = torch.zeros(
            3, *shape, dtype=torch.int64, device=device
        )  # of the chunk's first step
        self._rows = torch.zeros(shape, dtype=torch.int32, device=device)  # before it
        self._chunk = torch.zeros(CHUNK, self.now.shape[0], dtype=torch.int32, device=device)
        self._at = torch.zeros(1, dtype=torch.int64, device=device)  # the chunk's row of the next step

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the tables in force."""
        return tuple(table.shape[1] for table in self.tables)

    def widen(self, widths: Sequence[int]) -> None:
        """Bring the tables of these widths into force; each has memory of its own, everything else is shared."""
        for key in enumerate(widths):
            if key not in self._tables:
                table = torch.zeros(self.count, key[1], dtype=torch.int32, device=self.now.device)
                self._tables[key] = table
        self.tables = [self._tables[key] for key in enumerate(widths)]

    def admit(self, leases: Sequence[KvLease], next_positions: Sequence[torch.Tensor]) -> None:
        """Take over a batch behind its prefill: its sequences have the first lanes, the others rest.

        Args:
            leases: one a segment; their tables are no wider than those in force.
            next_positions: `[3, B]` rotary position of each sequence's first generated token, one a segment.
        """
        batch = len(leases[0].capacities)
        self._rows.zero_()
        for at, (lease, positions) in enumerate(zip(leases, next_positions, strict=True)):
            self.tables[at][:batch, : lease.block_table.shape[1]].copy_(lease.block_table)
            self._positions[:, at, :batch].copy_(positions)
            self._rows[at, :batch].copy_(lease.lengths)
        self.active.zero_()
        self.active[:batch].fill_(True)

    def plan(self) -> None:
        """Schedule the next `CHUNK` steps. Those that a pool has no rows for may not be taken."""
        self._chunk.copy_(self.scheduled(self._positions, self._rows, CHUNK))
        self._positions.add_(CHUNK)
        self._rows.add_(CHUNK)
        self._at.zero_()

    def step(self, pools: Sequence[KvPool]) -> None:
        """Append `tokens` and leave the logits after them in `logits`: work that may be captured."""
        torch.index_select(self._chunk, 0, self._at, out=self.now.view(1, -1))
        self._at.add_(1)
        self.rest(self.now[None], ~self.active)
        torch.index_select(self.decoder.embed, 0, self.tokens, out=self.hidden)
        self.layers(pools)

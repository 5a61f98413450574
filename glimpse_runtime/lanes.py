# SPDX-License-Identifier: Apache-2.0
"""The static memory of decoding steps, and what a step does with it.

A lane is a sequence's place in a step. A step always does the same on the same addresses; positions, slots and lengths lie in
memory, and a lane that nobody decodes in has length 0 and slot -1. So it can be recorded on a CPU and captured on a GPU.
"""

from __future__ import annotations

import torch

from glimpse_kernels import decode_attention, rope
from glimpse_runtime.cache import KvLease, KvPool, slots_at
from glimpse_runtime.models.qwen2_5_vl.decoder import Buffers, Decoder, Stream

CHUNK = 64  # steps that are scheduled at once


class Lanes:
    """Memory of a step.

    Attributes:
        count: lanes.
        table: `[lanes, width]` int32 blocks of each lane.
        hidden: `[lanes, hidden]` embedded tokens when a step begins.
        now: `[words]` int32, what differs between steps; `cos`, `sin`, `slots` and `lengths` are views of it.
        cos, sin: `[lanes, head_dim / 2]` fp32 of the step in force.
        slots: `[lanes]` int32 where its keys and values go, -1 for nowhere.
        lengths: `[lanes]` int32 keys that it sees, its own among them; 0 for none.
        logits: `[lanes, vocabulary]` of the last step.
    """

    def __init__(self, decoder: Decoder, table: torch.Tensor) -> None:
        config, device = decoder.config, decoder.device
        self.decoder, self.table, self.count = decoder, table, table.shape[0]
        angles = config.head_dim // 2 * self.count
        self.sizes = [angles, angles, self.count, self.count]
        self.now = torch.zeros(sum(self.sizes), dtype=torch.int32, device=device)
        cos, sin, self.slots, self.lengths = self.now.split(self.sizes)
        self.cos, self.sin = (t.view(torch.float32).view(self.count, -1) for t in (cos, sin))
        self.into = Buffers.allocate(config, self.count, decoder.dtype, device)
        self.hidden = torch.empty_like(self.into.x)
        self.logits = self.into.x.new_empty(self.count, config.vocab_size)

    def scheduled(self, positions: torch.Tensor, rows: torch.Tensor, steps: int) -> torch.Tensor:
        """`[steps, words]`: what `now` has to hold in each of the coming steps.

        Args:
            positions: `[3, lanes]` of the first one.
            rows: `[lanes]` int32 keys of each lane before it.
        """
        step = torch.arange(steps, dtype=torch.int32, device=self.now.device)[:, None]
        cos, sin = self.decoder.rotary((positions[:, None] + step).flatten(1))
        at = rows + step
        parts = (cos.view(torch.int32), sin.view(torch.int32), slots_at(self.table, at), at + 1)
        return torch.cat([part.reshape(steps, -1) for part in parts], dim=1)

    def layers(self, pool: KvPool) -> None:
        """From embedded tokens to logits, on static memory only: nothing here may depend on a number of this step."""
        decoder, into = self.decoder, self.into
        stream = Stream(self.hidden, None, self.cos, self.sin)
        q, k, v = (decoder.heads(part) for part in into.qkv)
        for number, layer in enumerate(decoder.layers):
            layer.qkv(decoder.normed(stream, layer.input_norm, into.x), outs=into.qkv)
            keys, values = pool.k_slots[number], pool.v_slots[number]
            rope(q, k, self.cos, self.sin, v=v, k_out=keys, v_out=values, slots=self.slots)
            decode_attention(q, pool.k[number], pool.v[number], self.table, self.lengths, out=into.attended)
            decoder.finish_layer(layer, stream, into.attended, into)
        decoder.logits(stream, into, self.logits)


class DeviceLanes(Lanes):
    """Lanes whose steps take everything from the device, tokens included.

    Attributes:
        tokens: `[lanes]` int64 that the next step appends.
        active: `[lanes]` bool, false where nothing is decoded (any more).
    """

    def __init__(self, decoder: Decoder, count: int) -> None:
        device = decoder.device
        super().__init__(decoder, torch.zeros(count, 0, dtype=torch.int32, device=device))
        self._tables: dict[int, torch.Tensor] = {}
        self.tokens = torch.zeros(count, dtype=torch.int64, device=device)
        self.active = torch.zeros(count, dtype=torch.bool, device=device)
        self._positions = torch.zeros(3, count, dtype=torch.int64, device=device)  # of the chunk's first step
        self._rows = torch.zeros(count, dtype=torch.int32, device=device)  # before it
        self._chunk = torch.zeros(CHUNK, self.now.shape[0], dtype=torch.int32, device=device)
        self._at = torch.zeros(1, dtype=torch.int64, device=device)  # the chunk's row of the next step

    @property
    def width(self) -> int:
        """Of the table in force."""
        return self.table.shape[1]

    def widen(self, width: int) -> None:
        """Bring the table of this width into force; each has memory of its own, everything else is shared."""
        if width not in self._tables:
            self._tables[width] = torch.zeros(self.count, width, dtype=torch.int32, device=self.now.device)
        self.table = self._tables[width]

    def admit(self, lease: KvLease, next_positions: torch.Tensor) -> None:
        """Take over a batch behind its prefill: its sequences have the first lanes, the others rest.

        Args:
            lease: its table is no wider than the one in force.
            next_positions: `[3, B]` rotary position of each sequence's first generated token.
        """
        batch, width = lease.block_table.shape
        self.table[:batch, :width].copy_(lease.block_table)
        self._positions[:, :batch].copy_(next_positions)
        self._rows.zero_()
        self._rows[:batch].copy_(lease.lengths)
        self.active.zero_()
        self.active[:batch].fill_(True)

    def plan(self) -> None:
        """Schedule the next `CHUNK` steps. Those that a pool has no rows for may not be taken."""
        self._chunk.copy_(self.scheduled(self._positions, self._rows, CHUNK))
        self._positions.add_(CHUNK)
        self._rows.add_(CHUNK)
        self._at.zero_()

    def step(self, pool: KvPool) -> None:
        """Append `tokens` and leave the logits after them in `logits`: work that may be captured."""
        torch.index_select(self._chunk, 0, self._at, out=self.now.view(1, -1))
        self._at.add_(1)
        resting = ~self.active
        self.slots.masked_fill_(resting, -1)
        self.lengths.masked_fill_(resting, 0)
        torch.index_select(self.decoder.embed, 0, self.tokens, out=self.hidden)
        self.layers(pool)

# SPDX-License-Identifier: Apache-2.0
"""One token a sequence at a time, over the pool that prefill filled.

A step has two halves. `_Schedule` writes what differs between steps (positions, slots, lengths) into static memory, and
the layers then run on static memory alone: always the same ops on the same addresses. Where compiled kernels serve all
of them, the first step records that half and later steps replay it without Python in between.
"""

from __future__ import annotations

import logging

import torch

from glimpse_kernels import Recording, decode_attention, rope
from glimpse_kernels import recording as recordings
from glimpse_runtime.cache import KvPool
from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.models.qwen2_5_vl.decoder import Buffers, Decoder, Stream

logger = logging.getLogger(__name__)

CHUNK = 64  # steps that are scheduled at once

# What a step asks of the kernels, by their C names: a layer, and what follows the last one.
_LAYER = ("rms_norm", "linear", "rope", "decode_attention", "linear", "rms_norm", "linear", "linear")
_HEAD = ("rms_norm", "linear")
_OPS = ("rms_norm", "linear", "linear_group", "gated_linear", "rope", "decode_attention")


class _Schedule:
    """Rotary tables, slots and lengths of the coming steps, a chunk at a time; one copy brings a step's into force.

    Attributes:
        cos, sin: `[B, head_dim / 2]` fp32 of the step in force.
        slots: `[B]` int32 where its keys and values go, -1 for retired rows.
        lengths: `[B]` int32 keys that it sees, its own among them; 0 for retired rows.
    """

    def __init__(self, decoder: Decoder, pool: KvPool, next_positions: torch.Tensor, room: int) -> None:
        self._decoder, self._pool = decoder, pool
        self._positions = next_positions.clone()  # of the first step in the chunk
        self._lengths = pool.lengths.clone()  # before it
        self._steps = room  # not scheduled yet
        self._active = torch.ones_like(pool.lengths, dtype=torch.bool)
        self._one = torch.ones_like(pool.lengths)
        batch, angles = pool.lengths.shape[0], decoder.config.head_dim // 2 * pool.lengths.shape[0]
        # All in one row of 32-bit words.
        self._sizes = [angles, angles, batch, batch]
        self._now = torch.zeros(sum(self._sizes), dtype=torch.int32, device=pool.lengths.device)
        cos, sin, self.slots, self.lengths = self._now.split(self._sizes)
        self.cos, self.sin = (t.view(torch.float32).view(batch, -1) for t in (cos, sin))
        self._chunk = self._now[:0].view(0, self._now.shape[0])
        self._rows: list[torch.Tensor] = []
        self._next = 0

    def advance(self) -> None:
        """Bring the next step into force.

        Raises:
            GlimpseError: the pool has no row left for it.
        """
        if self._next == len(self._rows):
            self._plan()
        self._now.copy_(self._rows[self._next])
        self._next += 1
        self._pool.lengths.add_(self._one)

    def retire(self, finished: torch.Tensor) -> None:
        """The rows where `finished [B]` is true stop."""
        self._active &= ~finished
        self._one.masked_fill_(finished, 0)
        self._mask()

    def _plan(self) -> None:
        count = min(CHUNK, self._steps)
        if count <= 0:
            raise GlimpseError(
                "the key/value pool is full: prefill was asked for fewer new tokens than are decoded"
            )
        self._steps -= count
        step = torch.arange(count, dtype=torch.int32, device=self._now.device)[:, None]
        cos, sin = self._decoder.rotary((self._positions[:, None] + step).flatten(1))
        rows = self._lengths + step
        parts = (cos.view(torch.int32), sin.view(torch.int32), self._pool.slots_at(rows), rows + 1)
        self._chunk = torch.cat([part.reshape(count, -1) for part in parts], dim=1)
        self._rows, self._next = list(self._chunk.unbind()), 0
        self._positions += count
        self._lengths += count
        self._mask()

    def _mask(self) -> None:
        _, _, slots, lengths = self._chunk.split(self._sizes, dim=1)
        slots.masked_fill_(~self._active, -1)
        lengths.masked_fill_(~self._active, 0)


class DecodeLoop:
    """The decoding state of a batch.

    Positions, lengths and the active mask live on the device; a step reads nothing back.

    Args:
        pool: what prefill left; grows by one row a step and sequence.
        next_positions: `[3, B]` rotary position of each sequence's first generated token, that of the *original*
            prompt: pruning moves no token.
        room: rows that prefill left free for each sequence.
        record: False runs every step op by op.

    Attributes:
        recording: the layers of a step, from the first step on; None where they run op by op.
    """

    def __init__(
        self,
        decoder: Decoder,
        pool: KvPool,
        next_positions: torch.Tensor,
        room: int,
        *,
        record: bool = True,
    ) -> None:
        self.decoder = decoder
        self.pool = pool
        pool.lengths = pool.lengths.clone()  # prefill's own stay as they are
        self._schedule = _Schedule(decoder, pool, next_positions, room)
        batch = pool.lengths.shape[0]
        self._into = Buffers.allocate(decoder.config, batch, decoder.dtype, decoder.device)
        self._hidden = torch.empty_like(self._into.x)
        self._logits = self._into.x.new_empty(batch, decoder.config.vocab_size)
        self.recording: Recording | None = None
        self._may_record = record and recordings.available(decoder.device, decoder.dtype, _OPS)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append `tokens [B]` and return the logits `[B, vocabulary]` after them, in memory of their own.

        Rows that were retired compute nothing that is kept: no slot, length 0.

        Raises:
            GlimpseError: the pool is full.
        """
        return self.advance(tokens).clone()

    def advance(self, tokens: torch.Tensor) -> torch.Tensor:
        """`step` whose result is overwritten by the next one."""
        self._schedule.advance()
        torch.index_select(self.decoder.embed, 0, tokens, out=self._hidden)
        if self.recording is not None:
            self.recording.replay()
        elif self._may_record:
            self._record()
        else:
            self._layers()
        return self._logits

    def retire(self, finished: torch.Tensor) -> None:
        """Stop computing the rows where `finished [B]` is true."""
        self._schedule.retire(finished)

    def _layers(self) -> None:
        """From embedded tokens to logits, on static memory only: nothing here may depend on a number of this step."""
        decoder, pool, into, now = self.decoder, self.pool, self._into, self._schedule
        stream = Stream(self._hidden, None, now.cos, now.sin)
        q, k, v = (decoder.heads(part) for part in into.qkv)
        for number, layer in enumerate(decoder.layers):
            layer.qkv(decoder.normed(stream, layer.input_norm, into.x), outs=into.qkv)
            keys, values = pool.k_slots[number], pool.v_slots[number]
            rope(q, k, now.cos, now.sin, v=v, k_out=keys, v_out=values, slots=now.slots)
            decode_attention(
                q, pool.k[number], pool.v[number], pool.block_table, now.lengths, out=into.attended
            )
            decoder.finish_layer(layer, stream, into.attended, into)
        decoder.logits(stream, into, self._logits)

    def _record(self) -> None:
        self._may_record = False
        with Recording() as recording:
            self._layers()
        wanted = _LAYER * len(self.decoder.layers) + _HEAD
        if recording.ops == wanted:
            self.recording = recording
        else:  # a product went to torch, say, which no recording sees
            logger.debug("decode steps are not replayed: %d ops, %d recorded", len(wanted), len(recording))

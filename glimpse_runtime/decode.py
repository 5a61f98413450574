# SPDX-License-Identifier: Apache-2.0
"""One token a sequence at a time, over the pool that prefill filled.

A step has two halves. `_Schedule` writes what differs between steps (positions, slots, lengths) into static memory, and
the layers then run on static memory alone: always the same ops on the same addresses. Where compiled kernels serve all
of them, the first step records that half and later steps replay it without Python in between. On a GPU whole steps are
captured (`device_decode`).
"""

from __future__ import annotations

import logging

import torch

from glimpse_kernels import Recording
from glimpse_kernels import recording as recordings
from glimpse_runtime.cache import KvLease
from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.lanes import CHUNK, Lanes
from glimpse_runtime.models.qwen2_5_vl.decoder import Decoder

logger = logging.getLogger(__name__)

# What a step asks of the kernels, by their C names: a layer, and what follows the last one.
_LAYER = ("rms_norm", "linear", "rope", "decode_attention", "linear", "rms_norm", "linear", "linear")
_HEAD = ("rms_norm", "linear")
_OPS = ("rms_norm", "linear", "linear_group", "gated_linear", "rope", "decode_attention")


def pool_is_full() -> GlimpseError:
    """What a step raises that prefill left no row for."""
    return GlimpseError("the key/value pool is full: prefill was asked for fewer new tokens than are decoded")


class _Schedule:
    """What differs between the coming steps, a chunk at a time; one copy brings a step's into force (`Lanes.now`)."""

    def __init__(self, lanes: Lanes, lease: KvLease, next_positions: torch.Tensor, room: int) -> None:
        self._lanes, self._lease = lanes, lease
        self._positions = next_positions.clone()  # of the first step in the chunk
        self._lengths = lease.lengths.clone()  # before it
        self._steps = room  # not scheduled yet
        self._active = torch.ones_like(lease.lengths, dtype=torch.bool)
        self._one = torch.ones_like(lease.lengths)
        self._chunk = lanes.now[:0].view(0, lanes.now.shape[0])
        self._rows: list[torch.Tensor] = []
        self._next = 0

    def advance(self) -> None:
        """Bring the next step into force.

        Raises:
            GlimpseError: the pool has no row left for it.
        """
        if self._next == len(self._rows):
            self._plan()
        self._lanes.now.copy_(self._rows[self._next])
        self._next += 1
        self._lease.lengths.add_(self._one)

    def retire(self, finished: torch.Tensor) -> None:
        """The rows where `finished [B]` is true stop."""
        self._active &= ~finished
        self._one.masked_fill_(finished, 0)
        self._mask()

    def _plan(self) -> None:
        count = min(CHUNK, self._steps)
        if count <= 0:
            raise pool_is_full()
        self._steps -= count
        self._chunk = self._lanes.scheduled(self._positions, self._lengths, count)
        self._rows, self._next = list(self._chunk.unbind()), 0
        self._positions += count
        self._lengths += count
        self._mask()

    def _mask(self) -> None:
        _, _, slots, lengths = self._chunk.split(self._lanes.sizes, dim=1)
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
        pool: KvLease,
        next_positions: torch.Tensor,
        room: int,
        *,
        record: bool = True,
    ) -> None:
        self.decoder = decoder
        self.pool = pool
        pool.lengths = pool.lengths.clone()  # prefill's own stay as they are
        self._lanes = Lanes(decoder, pool.block_table)
        self._schedule = _Schedule(self._lanes, pool, next_positions, room)
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
        torch.index_select(self.decoder.embed, 0, tokens, out=self._lanes.hidden)
        if self.recording is not None:
            self.recording.replay()
        elif self._may_record:
            self._record()
        else:
            self._lanes.layers(self.pool.pool)
        return self._lanes.logits

    def retire(self, finished: torch.Tensor) -> None:
        """Stop computing the rows where `finished [B]` is true."""
        self._schedule.retire(finished)

    def close(self) -> None:
        """The loop is at its end; its memory goes with it."""

    def _record(self) -> None:
        self._may_record = False
        with Recording() as recording:
            self._lanes.layers(self.pool.pool)
        wanted = _LAYER * len(self.decoder.layers) + _HEAD
        if recording.ops == wanted:
            self.recording = recording
        else:  # a product went to torch, say, which no recording sees
            logger.debug("decode steps are not replayed: %d ops, %d recorded", len(wanted), len(recording))

# SPDX-License-Identifier: Apache-2.0
"""One token a sequence at a time, over the pool that prefill filled.

A step has two halves. `_Schedule` writes what differs between steps (positions, slots, lengths) into static memory, and
the layers then run on static memory alone: always the same ops on the same addresses. Where compiled kernels serve all
of them, the first step records that half and later steps replay it without Python in between. On a GPU whole steps are
captured (`device_decode`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

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

    def __init__(self, lanes: Lanes, positions: torch.Tensor, lengths: torch.Tensor, room: int) -> None:
        self._lanes = lanes
        self._positions = positions  # of the first step in the chunk
        self._rows = lengths.clone()  # before it
        self.lengths = lengths  # before the next step; those of retired rows stay
        self._steps = room  # not scheduled yet
        self._active = torch.ones_like(lengths[0], dtype=torch.bool)
        self._one = torch.ones_like(lengths[0])
        self._chunk = lanes.now[:0].view(0, lanes.now.shape[0])
        self._words: list[torch.Tensor] = []
        self._next = 0

    def advance(self) -> None:
        """Bring the next step into force.

        Raises:
            GlimpseError: the pool has no row left for it.
        """
        if self._next == len(self._words):
            self._plan()
        self._lanes.now.copy_(self._words[self._next])
        self._next += 1
        self.lengths.add_(self._one)

    def retire(self, finished: torch.Tensor) -> None:
        """The rows where `finished [B]` is true stop."""
        self._active &= ~finished
        self._one.masked_fill_(finished, 0)
        self._lanes.rest(self._chunk, ~self._active)

    def _plan(self) -> None:
        count = min(CHUNK, self._steps)
        if count <= 0:
            raise pool_is_full()
        self._steps -= count
        self._chunk = self._lanes.scheduled(self._positions, self._rows, count)
        self._words, self._next = list(self._chunk.unbind()), 0
        self._positions += count
        self._rows += count
        self._lanes.rest(self._chunk, ~self._active)


class DecodeLoop:
    """The decoding state of a batch.

    Positions, lengths and the active mask live on the device; a step reads nothing back.

    Args:
        leases: what prefill left, in the order of their layers, all of which they hold together. Each grows by one row a
            step and sequence.
        next_positions: `[3, B]` rotary position of each sequence's first generated token in the layers of each lease: that
            of the *original* prompt where pruning moved no token.
        room: rows that prefill left free for each sequence.
        record: False runs every step op by op.

    Attributes:
        recording: the layers of a step, from the first step on; None where they run op by op.

    Raises:
        GlimpseError: the leases are not those of all layers in order.
    """

    def __init__(
        self,
        decoder: Decoder,
        leases: Sequence[KvLease],
        next_positions: Sequence[torch.Tensor],
        room: int,
        *,
        record: bool = True,
    ) -> None:
        self.decoder = decoder
        self.leases = tuple(leases)
        self._pools = [lease.pool for lease in leases]
        self._lanes = Lanes(decoder, [(lease.layers, lease.block_table) for lease in leases])
        lengths = torch.stack([lease.lengths for lease in leases])
        self._schedule = _Schedule(self._lanes, torch.stack(list(next_positions), 1), lengths, room)
        self.recording: Recording | None = None
        self._may_record = record and recordings.available(decoder.device, decoder.dtype, _OPS)

    @property
    def lengths(self) -> torch.Tensor:
        """`[S, B]` int32 rows of each sequence in each of the leases, those of decoding among them."""
        return self._schedule.lengths

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
            self._lanes.layers(self._pools)
        return self._lanes.logits

    def retire(self, finished: torch.Tensor) -> None:
        """Stop computing the rows where `finished [B]` is true."""
        self._schedule.retire(finished)

    def close(self) -> None:
        """The loop is at its end; its memory goes with it."""

    def _record(self) -> None:
        self._may_record = False
        with Recording() as recording:
            self._lanes.layers(self._pools)
        wanted = _LAYER * len(self.decoder.layers) + _HEAD
        if recording.ops == wanted:
            self.recording = recording
        else:  # a product went to torch, say, which no recording sees
            logger.debug("decode steps are not replayed: %d ops, %d recorded", len(wanted), len(recording))

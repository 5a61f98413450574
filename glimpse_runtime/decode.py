# SPDX-License-Identifier: Apache-2.0
"""One token a sequence at a time, over the pool that prefill filled."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from glimpse_kernels import decode_attention, rope
from glimpse_runtime.cache import KvPool
from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.models.qwen2_5_vl.decoder import Decoder, Stream


class DecodeLoop:
    """The decoding state of a batch.

    Positions, lengths and the active mask live on the device; a step reads nothing back.

    Args:
        pool: what prefill left; grows by one row a step and sequence.
        next_positions: `[3, B]` rotary position of each sequence's first generated token, that of the *original*
            prompt: pruning moves no token.
        room: rows that prefill left free for each sequence.
    """

    def __init__(self, decoder: Decoder, pool: KvPool, next_positions: torch.Tensor, room: int) -> None:
        self.decoder = decoder
        self.pool = pool
        self.positions = next_positions.clone()
        self.active = torch.ones_like(pool.lengths, dtype=torch.bool)
        self._room = room

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append `tokens [B]` and return the logits `[B, vocabulary]` after them.

        Rows that were retired compute nothing that is kept: no slot, length 0.
        """
        if self._room <= 0:
            raise GlimpseError(
                "the key/value pool is full: prefill was asked for fewer new tokens than are decoded"
            )
        self._room -= 1
        decoder, pool = self.decoder, self.pool
        cos, sin = decoder.rotary(self.positions)
        stream = Stream(F.embedding(tokens, decoder.embed), None, cos, sin)
        slots = pool.next_slots(self.active)
        lengths = torch.where(self.active, pool.lengths + 1, 0).to(torch.int32)
        for number, layer in enumerate(decoder.layers):
            x = decoder.normed(stream, layer.input_norm)
            q, k, v = (decoder.heads(part) for part in layer.qkv(x))
            rope(q, k, cos, sin, v=v, k_out=pool.k_slots[number], v_out=pool.v_slots[number], slots=slots)
            attended = decode_attention(q, pool.k[number], pool.v[number], pool.block_table, lengths)
            decoder.finish_layer(layer, stream, attended)
        pool.lengths = torch.where(self.active, lengths, pool.lengths)
        self.positions = self.positions + 1
        return decoder.logits(stream)

    def retire(self, finished: torch.Tensor) -> None:
        """Stop computing the rows where `finished [B]` is true."""
        self.active = self.active & ~finished

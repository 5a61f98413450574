# SPDX-License-Identifier: Apache-2.0
"""Memory that prefill works in, kept on a GPU for the next prompt; and that of the captured layers behind a stage."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from glimpse_runtime.models.qwen2_5_vl.decoder import Decoder

KEPT_BYTES = 1 << 30
"""What a GPU keeps for the next prompt. Longer ones have memory of their own, which they give back piece by piece."""


class Scratch:
    """Named pieces of memory, each as large as it was ever asked for.

    Args:
        device: where they are.
        limit: bytes that are kept; beyond it a piece is new every time.
    """

    def __init__(self, device: torch.device, limit: int) -> None:
        self._device, self._limit = device, limit
        self._kept: dict[str, torch.Tensor] = {}

    @property
    def kept(self) -> int:
        """Bytes that wait for the next call."""
        return sum(piece.numel() for piece in self._kept.values())

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Room for a tensor; what the piece of this name held before is lost."""
        size = math.prod(shape) * dtype.itemsize
        piece = self._kept.get(name)
        if piece is None or piece.numel() < size:
            if self.kept - (0 if piece is None else piece.numel()) + size > self._limit:
                return torch.empty(shape, dtype=dtype, device=self._device)
            piece = None
            self._kept.pop(name, None)  # before the larger one is made
            # It outlives this call: no tensor of inference mode, which can be written to in that mode alone.
            with torch.inference_mode(False), torch.no_grad():
                self._kept[name] = piece = torch.empty(size, dtype=torch.uint8, device=self._device)
        return piece[:size].view(dtype).view(shape)

    def swap(self, one: str, other: str) -> None:
        """Each of the two pieces takes the other's name; what they hold stays."""
        held = self._kept.pop(one, None), self._kept.pop(other, None)
        self._kept.update(
            {name: piece for name, piece in zip((other, one), held, strict=True) if piece is not None}
        )


@dataclass(frozen=True)
class TailMemory:
    """What captured layers read and write: the same place at every replay. R rows, B sequences.

    Attributes:
        hidden, delta: `[R, width]`, the residual stream (`decoder.Stream`).
        cos, sin: `[R, head_dim / 2]` fp32.
        cu_seqlens: `[B + 1]` int32 packed rows of the sequences; rows behind the last one belong to nobody.
        starts: `[B]` int32 first slot of each sequence.
        logits: `[B, vocabulary]`.
    """

    hidden: torch.Tensor
    delta: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    cu_seqlens: torch.Tensor
    starts: torch.Tensor
    logits: torch.Tensor


class PrefillMemory:
    """What prefill keeps on a device from one call to the next."""

    def __init__(self, decoder: Decoder, limit: int = KEPT_BYTES) -> None:
        self._decoder = decoder
        # A CPU gives memory back to the system: a call there has what it needs, and no more.
        self._limit = limit if decoder.device.type == "cuda" else 0
        self._idle: Scratch | None = None
        self._rows: tuple[torch.Tensor, ...] | None = None
        self._batches: dict[int, tuple[torch.Tensor, ...]] = {}

    @property
    def kept(self) -> int:
        """Bytes that wait for the next call."""
        return 0 if self._idle is None else self._idle.kept

    def borrow(self) -> Scratch:
        """For one prompt batch. Who fails before `give_back` drops it: the next one starts with nothing."""
        found, self._idle = self._idle, None
        return Scratch(self._decoder.device, self._limit) if found is None else found

    def give_back(self, scratch: Scratch) -> None:
        """The next call may have it: behind all that reads it on the current stream."""
        if scratch.kept and scratch.kept >= self.kept:
            self._idle = scratch

    def tail(self, rows: int, batch: int, largest: int) -> TailMemory:
        """For captured layers on `rows` rows of `batch` sequences; `largest` is the most rows that are ever asked for."""
        decoder = self._decoder
        width, angles = decoder.config.hidden_size, decoder.config.head_dim // 2

        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=decoder.device)

        with torch.inference_mode(False), torch.no_grad():
            if self._rows is None:
                hidden, delta = (zeros(largest, width, dtype=decoder.dtype) for _ in range(2))
                cos, sin = (zeros(largest, angles, dtype=torch.float32) for _ in range(2))
                self._rows = (hidden, delta, cos, sin)
            if batch not in self._batches:
                self._batches[batch] = (
                    zeros(batch + 1, dtype=torch.int32),
                    zeros(batch, dtype=torch.int32),
                    zeros(batch, decoder.config.vocab_size, dtype=decoder.dtype),
                )
        return TailMemory(*(part[:rows] for part in self._rows), *self._batches[batch])

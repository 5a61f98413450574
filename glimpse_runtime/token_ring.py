# SPDX-License-Identifier: Apache-2.0
"""How the host reads what the device chose, without either waiting for the other."""

from __future__ import annotations

from typing import Any

import torch


class TokenRing:
    """Brings the tokens of each step to the host, each row with an event of its own.

    The device writes step n to row n % size of `ring`, and may go on: the row is not written again before the host has read it,
    if it reads no later than size - 1 steps behind.

    Args:
        ring: `[size, lanes]` int64 on the device.
        streams: `torch.cuda`, or something that stands in for it.
    """

    def __init__(self, ring: torch.Tensor, streams: Any = torch.cuda) -> None:
        self._device, self._streams = ring.device, streams
        self._size = ring.shape[0]
        held = torch.empty(ring.shape, dtype=ring.dtype, device="cpu", pin_memory=True)
        self._sources, self._held = list(ring.unbind()), list(held.unbind())
        self._events = [streams.Event() for _ in range(self._size)]
        self._sent = self._read = 0

    def begin(self) -> None:
        """A new call: its first step is number 0. What is still on its way from the last one is nobody's."""
        self._sent = self._read = 0

    def send(self) -> None:
        """Queue the copy of the step that the device was just asked for."""
        if self._sent - self._read >= self._size:
            raise RuntimeError(f"the host is {self._size} steps behind: it would lose tokens")
        slot = self._sent % self._size
        self._held[slot].copy_(self._sources[slot], non_blocking=True)
        self._events[slot].record(self._streams.current_stream(self._device))
        self._sent += 1

    def receive(self) -> torch.Tensor:
        """`[lanes]` int64 of the next step in order, in memory of the caller's own. Waits for that step alone."""
        if self._read == self._sent:
            raise RuntimeError("no step is on its way")
        slot = self._read % self._size
        self._events[slot].synchronize()
        self._read += 1
        return self._held[slot].clone()

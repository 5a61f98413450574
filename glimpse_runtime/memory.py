# SPDX-License-Identifier: Apache-2.0
"""How much memory a device has left, and how much of it some work needed."""

from __future__ import annotations

from typing import Protocol

import torch


class DeviceMemory(Protocol):
    """What is asked about a device's memory; bytes everywhere."""

    def free(self) -> int:
        """What could be allocated now."""

    def used(self) -> int:
        """What tensors hold now."""

    def start(self) -> None:
        """Forget the peak so far."""

    def peak(self) -> int:
        """The most that tensors held since `start`."""


class CudaMemory:
    """Of a GPU, by torch's allocator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free(self) -> int:
        # The allocator keeps what tensors gave back; that can be had again as well.
        kept = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return int(torch.cuda.mem_get_info(self._device)[0]) + kept

    def used(self) -> int:
        return int(torch.cuda.memory_allocated(self._device))

    def start(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        return int(torch.cuda.max_memory_allocated(self._device))


class Unlimited:
    """Of a device that is not counted: as if there were no end of it."""

    def free(self) -> int:
        return 1 << 62

    def used(self) -> int:
        return 0

    def start(self) -> None: ...

    def peak(self) -> int:
        return 0


def memory_of(device: torch.device) -> DeviceMemory:
    """Who knows about a device's memory."""
    return CudaMemory(device) if device.type == "cuda" and torch.cuda.is_available() else Unlimited()


def readable(size: int) -> str:
    """Bytes for people: `1.5 GiB`."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"

# SPDX-License-Identifier: Apache-2.0
"""What the host and a GPU tell each other without one waiting for the other.

A copy from ordinary memory makes torch wait until it is through; one from page-locked memory is queued like a kernel. Each
copy costs the host microseconds whatever its size, so small things that are known at one moment go up together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

ALIGNMENT = 16
"""Bytes: where a part of a common buffer may begin, for kernels that read several numbers at a time."""


def upload(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`host` on `device`, behind what the current stream was given so far. A tensor that is there already is given back.

    On a GPU the host neither waits nor has to keep the tensor: what it held at the call is what arrives.
    """
    if device.type != "cuda" or host.device.type != "cpu":
        return host.to(device)
    return upload_together([host], device)[0]


def upload_together(parts: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Tensors of the host, of any dtypes and shapes, on `device`: by one copy, into one buffer of which these are views.

    On a CPU they are what was given.
    """
    if device.type != "cuda":
        return [part.to(device) for part in parts]
    starts, size = [], 0
    for part in parts:
        starts.append(size)
        size += -(-part.numel() * part.element_size() // ALIGNMENT) * ALIGNMENT
    staged = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
    for part, start in zip(parts, starts, strict=True):
        _run(staged, part, start).copy_(part)
    # The allocator of page-locked memory gives the buffer to nobody else before the copy is through.
    sent = staged.to(device, non_blocking=True)
    return [_run(sent, part, start) for part, start in zip(parts, starts, strict=True)]


def _run(buffer: torch.Tensor, part: torch.Tensor, start: int) -> torch.Tensor:
    """The bytes of `buffer` from `start` on, as a tensor like `part`."""
    held = buffer[start : start + part.numel() * part.element_size()]
    return held.view(part.dtype).view(part.shape)


class Arriving:
    """Numbers on their way from a GPU to the host, behind what the current stream was given so far.

    Args:
        source: `[n]` int32 on a device; read now, so it may change afterwards.
        streams: `torch.cuda`, or something that stands in for it.
    """

    def __init__(self, source: torch.Tensor, streams: Any = torch.cuda) -> None:
        self._held, self._done = source, None
        if source.device.type == "cuda":
            self._held = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=True)
            self._held.copy_(source, non_blocking=True)
            self._done = streams.Event()
            self._done.record(streams.current_stream(source.device))

    def wait(self) -> list[int]:
        """The numbers. The host waits for this copy, not for what was queued behind it."""
        if self._done is not None:
            self._done.synchronize()
            self._done = None
        return [int(number) for number in self._held.tolist()]


def lengths_of(ends: Arriving) -> list[int]:
    """Lengths of the pieces that `cu_seqlens` on its way to the host bounds; the host waits for it."""
    bounds = ends.wait()
    return [stop - start for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]

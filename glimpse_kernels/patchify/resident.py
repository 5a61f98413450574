# SPDX-License-Identifier: Apache-2.0
"""Tables that the host works out and a GPU reads: copied there once, without a wait, and kept."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any

import torch
from torch import Tensor

_Place = tuple[torch.device, int]


class Resident:
    """What `make` gives for some arguments, on the devices that asked for it.

    make: from hashable arguments to a tensor of the host.
    most: how many copies are kept.

    On a GPU a copy belongs to the stream it was queued on: there whatever reads it comes after it, and nobody has to wait. A
    CUDA graph that is being captured takes the copy of any stream, and what it took is kept for good, as it goes on reading it.
    """

    def __init__(self, make: Callable[..., Tensor], most: int = 64) -> None:
        self._make = make
        self._most = most
        self._held: dict[tuple[_Place, Any], Tensor] = {}
        self._captured: dict[tuple[torch.device, Any], Tensor] = {}
        self._lock = Lock()

    def on(self, device: torch.device, *key: Any) -> Tensor:
        """`make(*key)` on `device`, not to be written to.

        RuntimeError where a CUDA graph is being captured and the table was never on the device before.
        """
        if device.type != "cuda":
            return self._make(*key).to(device)
        place = (device, int(torch.cuda.current_stream(device).cuda_stream))
        with self._lock:
            if torch.cuda.is_current_stream_capturing():
                return self._for_graph(device, key)
            found = self._held.pop((place, key), None)
            if found is None:
                found = _sent(self._make(*key), device)
                if len(self._held) >= self._most:
                    del self._held[next(iter(self._held))]
            self._held[place, key] = found  # the last to be thrown out
            return found

    def _for_graph(self, device: torch.device, key: Any) -> Tensor:
        here = (t for ((where, _), of), t in self._held.items() if where == device and of == key)
        found = self._captured.get((device, key))
        if found is None:
            found = next(here, None)
        if found is None:
            raise RuntimeError(
                f"patchify: expected to be called with these sizes once before a CUDA graph is captured: a table for {key} "
                f"is not on {device} yet, and a graph cannot copy it there"
            )
        self._captured[device, key] = found
        return found


def _sent(host: Tensor, device: torch.device) -> Tensor:
    """From page-locked memory, which torch lends to nobody else before the copy is through."""
    staged = torch.empty(host.shape, dtype=host.dtype, device="cpu", pin_memory=True)
    return staged.copy_(host).to(device, non_blocking=True)

# SPDX-License-Identifier: Apache-2.0
"""Device work that is run once, captured, and replayed from then on without Python in between.

What a graph holds is frozen: kernels, addresses, sizes, and every Python number. What differs between two replays (lengths,
positions, slots, tokens) therefore lies in memory that the work reads, and nothing in the work may be computed from a length
on the host. `tests/graph_tape.py` stands in for CUDA's graphs where there is no GPU: it freezes the same things.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

import torch


class Graph(Protocol):
    """Captured work.

    Attributes:
        cost: bytes of the device that it took to capture it.
    """

    cost: int

    def replay(self) -> None:
        """Do it again, on the current stream."""

    def reset(self) -> None:
        """Give its memory back; it is not replayed any more."""


class Capture(Protocol):
    """A way to capture work on a device."""

    def __call__(self, work: Callable[[], None]) -> Graph:
        """Do `work` once, and capture it."""


@dataclass(eq=False)
class _CudaGraph:
    graph: torch.cuda.CUDAGraph
    cost: int
    live: weakref.WeakSet[_CudaGraph]

    def __post_init__(self) -> None:
        self.live.add(self)

    def replay(self) -> None:
        self.graph.replay()

    def reset(self) -> None:
        self.live.discard(self)
        self.graph.reset()


class CudaCapture:
    """Graphs of `torch.cuda` that share one pool of memory: what they allocate is used by one after the other.

    Graphs of one pool must not run at the same time, and what one leaves in memory it allocated is gone when another runs:
    results belong into tensors that were there before.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._live: weakref.WeakSet[_CudaGraph] = weakref.WeakSet()

    def __call__(self, work: Callable[[], None]) -> Graph:
        work()  # kernels are compiled and loaded when they first run, which a capture cannot hold
        torch.cuda.empty_cache()  # entering a capture does so too: it must not look like a gain
        before = self._free()
        if not self._live:  # torch takes no pool back that all of its graphs have left
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return _CudaGraph(graph, max(0, before - self._free()), self._live)

    def _free(self) -> int:
        return int(torch.cuda.mem_get_info(self._device)[0])


class Graphs:
    """Captured work by key.

    Args:
        capture: how work is captured; None: it is not, and `run` does it every time.
        budget: bytes that the graphs may hold together; the one that was not used for longest goes first. The newest one
            stays whatever it costs. None: no bound.
    """

    def __init__(self, capture: Capture | None, budget: int | None = None) -> None:
        self.capture = capture
        self.budget = budget
        self._held: OrderedDict[Hashable, Graph] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    def __len__(self) -> int:
        return len(self._held)

    @property
    def cost(self) -> int:
        """Bytes that the graphs hold."""
        return sum(graph.cost for graph in self._held.values())

    def run(self, key: Hashable, work: Callable[[], None], beside: Hashable = None) -> None:
        """Do `work`: by replaying it if the key is known, else by running and capturing it.

        Whoever asks again with a key asks for the same work on the same memory. `beside` is the key of work that takes
        turns with this one: it stays too, whatever the two cost.
        """
        graph = self._held.get(key)
        if graph is not None:
            self._held.move_to_end(key)
            graph.replay()
        elif self.capture is None:
            work()
        else:
            self._held[key] = self.capture(work)
            self._keep_to_budget((key, beside))

    def drop(self, wanted: Callable[[Hashable], bool] = lambda key: True) -> None:
        """Forget the graphs whose key is `wanted`: the memory that they use is about to go."""
        for key in [key for key in self._held if wanted(key)]:
            self._held.pop(key).reset()

    def _keep_to_budget(self, needed: tuple[Hashable, ...]) -> None:
        for key in list(self._held):
            if self.budget is None or self.cost <= self.budget:
                return
            if key not in needed:
                self._held.pop(key).reset()


def capture_on(device: torch.device) -> Capture | None:
    """How work is captured on a device; None where it cannot be (on a CPU `glimpse_kernels.Recording` serves decoding)."""
    return CudaCapture(device) if device.type == "cuda" else None


def bucket(size: int, least: int = 1) -> int:
    """The power of two that holds `size`, at least `least`: so many, and no more, are captured."""
    return max(least, 1 << max(0, size - 1).bit_length())

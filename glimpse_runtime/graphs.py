# SPDX-License-Identifier: Apache-2.0
"""Device work that is run once, captured, and replayed from then on without Python in between.

What a graph holds is frozen: kernels, addresses, sizes, and every Python number. What differs between two replays (lengths,
positions, slots, tokens) therefore lies in memory that the work reads, and nothing in the work may be computed from a length
on the host. `tests/graph_tape.py` stands in for CUDA's graphs where there is no GPU: it freezes the same things.
"""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from glimpse_kernels import dispatch

logger = logging.getLogger(__name__)

_READING = ("attention", "decode_attention", "rope")
"""Ops whose definitions read lengths or slots on the host, which no capture survives."""

_one_at_a_time = threading.RLock()
"""Held by whoever captures or replays. Beginning a capture waits for the device, which breaks another thread's capture; and while
one is under way, torch refuses random numbers of the same device to all others."""


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
        with _one_at_a_time:
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
        # torch hands 32 streams of a priority out again and again. It keeps the room that a product works in by stream and, with
        # any graph of that stream, lets go of it: not to be shared with work that is not captured, which has the other priority.
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._pool = torch.cuda.graph_pool_handle()
        self._live: weakref.WeakSet[_CudaGraph] = weakref.WeakSet()

    def __call__(self, work: Callable[[], None]) -> Graph:
        with _one_at_a_time:
            work()  # kernels are compiled and loaded when they first run, which a capture cannot hold
            with _undisturbed(self._device):
                return self._captured(work)

    def _captured(self, work: Callable[[], None]) -> Graph:
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


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Around a capture: what would break it or outlive it.

    A garbage collection could come across another graph, and CUDA destroys none while the same thread captures. With its first
    graph, torch makes tensors for the state of the random numbers and writes to them from then on: made in inference mode,
    they could not be written to outside of it. And after a failure torch leaves the stream of the capture the current one.
    """
    stream, collecting = torch.cuda.current_stream(device), gc.isenabled()
    gc.disable()
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    except BaseException:
        torch.cuda.set_stream(stream)
        raise
    finally:
        if collecting:
            gc.enable()


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


def capture_on(device: torch.device, dtype: torch.dtype) -> Capture | None:
    """How work on this dtype is captured on a device. None where it cannot be: on a CPU (there `glimpse_kernels.Recording` serves
    decoding), and where a definition serves that reads from the device."""
    if device.type != "cuda":
        return None
    plain = [op for op in _READING if dispatch.choose(op, device, dtype) == "naive"]
    if plain:
        logger.warning("nothing is captured on %s: PyTorch definitions serve %s", device, ", ".join(plain))
        return None
    return CudaCapture(device)


def wait_for(device: torch.device) -> None:
    """The host waits for all that a device was given; not in the middle of another thread's capture, which that would break."""
    with _one_at_a_time:
        torch.cuda.synchronize(device)


def bucket(size: int, least: int = 1) -> int:
    """The power of two that holds `size`, at least `least`: so many, and no more, are captured."""
    return max(least, 1 << max(0, size - 1).bit_length())

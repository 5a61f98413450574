# SPDX-License-Identifier: Apache-2.0
"""Work that runs beside the model, on a second stream of the GPU, and is joined where its result is needed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class Pending(Generic[T]):
    """A result whose computation may still be queued; not to be touched before `join`.

    Until then it also holds on to the work, and by it to the tensors that the work reads: their memory is the caller's stream's,
    which would hand it out again while the other stream is still reading. One that is dropped (an exception came in
    between) is joined as it goes, before what it held.
    """

    def __init__(
        self,
        result: T,
        work: Callable[[], T] | None = None,
        wait: Callable[[], None] | None = None,
    ) -> None:
        self._result = result
        self._work = work
        self._wait = None if wait is None else weakref.finalize(self, wait)
        if self._wait is not None:
            self._wait.atexit = False

    def join(self) -> T:
        """The result; the current stream waits for it, the host does not. May be called again."""
        if self._wait is not None:
            self._wait()  # once is enough
            self._work = None
        return self._result


class SideStream:
    """Queues work on a stream of its own: on a GPU at once and beside what the caller queues next; elsewhere it is a plain call.

    Fork and join are events, so both may be captured in a CUDA graph. What the work allocates belongs to the side stream;
    it may be dropped after the join as soon as its last use is queued, since the next fork waits for that use.

    Args:
        device: where the work's tensors are.
        streams: `torch.cuda`, or something that stands in for it.
    """

    def __init__(self, device: torch.device, streams: Any = torch.cuda) -> None:
        self._device = device
        self._streams = streams

    def run(self, work: Callable[[], T]) -> Pending[T]:
        """Queue `work` behind everything that the current stream has been given so far."""
        if self._device.type != "cuda":
            return Pending(work())
        main = self._current()
        side = _beside(self._streams, main.device_index, main.cuda_stream)
        forked, done = self._streams.Event(), self._streams.Event()
        forked.record(main)
        side.wait_event(forked)
        try:
            with self._streams.stream(side):
                result = work()
        except BaseException:
            # What was queued before it failed still reads memory that is given back now.
            done.record(side)
            main.wait_event(done)
            raise
        done.record(side)
        return Pending(result, work, lambda: self._current().wait_event(done))

    def _current(self) -> Any:
        return self._streams.current_stream(self._device)


@lru_cache(maxsize=16)
def _beside(streams: Any, device_index: int, main: int) -> Any:
    """The one side stream of a stream: memory that it has used is kept for it, so there should be few."""
    return streams.Stream(device=device_index)

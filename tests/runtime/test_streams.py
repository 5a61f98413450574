# SPDX-License-Identifier: Apache-2.0
"""Work beside the model: what is queued where and in which order, on streams that only write down what they are asked."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from glimpse_runtime import prefill
from glimpse_runtime.all_rows import AllRows
from glimpse_runtime.model import GlimpseModel
from glimpse_runtime.streams import Pending, SideStream

CUDA = torch.device("cuda", 0)


class FakeStreams:
    """Stands in for `torch.cuda`. `log`: what was queued, with the stream that it was queued on."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.made = 0
        self.main = FakeStream(self, "main")
        self.current = self.main

    def current_stream(self, device: Any = None) -> FakeStream:
        return self.current

    def Stream(self, device: Any = None) -> FakeStream:  # noqa: N802 (the name it has in torch.cuda)
        self.made += 1
        return FakeStream(self, f"side{self.made}")

    def Event(self) -> FakeEvent:  # noqa: N802
        return FakeEvent(self)

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def do(self, what: str) -> None:
        self.log.append(f"{self.current.name}: {what}")


class FakeStream:
    def __init__(self, streams: FakeStreams, name: str) -> None:
        self.streams, self.name = streams, name
        self.device_index, self.cuda_stream = 0, id(self)

    def wait_event(self, event: FakeEvent) -> None:
        self.streams.log.append(f"{self.name}: wait for {event.place}")


class FakeEvent:
    def __init__(self, streams: FakeStreams) -> None:
        self.streams, self.place = streams, "nothing"

    def record(self, stream: FakeStream) -> None:
        self.place = f"{stream.name} after {self.streams.log[-1]!r}" if self.streams.log else stream.name


def test_the_side_waits_for_its_inputs_and_the_join_for_the_side() -> None:
    streams = FakeStreams()
    streams.do("taps")
    pending = SideStream(CUDA, streams).run(lambda: streams.do("prepare") or 7)
    streams.do("layers")
    assert pending.join() == 7
    streams.do("score")
    assert streams.log == [
        "main: taps",
        "side1: wait for main after 'main: taps'",
        "side1: prepare",
        "main: layers",
        "main: wait for side1 after 'side1: prepare'",
        "main: score",
    ]
    assert pending.join() == 7 and streams.log[-1] == "main: score"  # once is enough


def test_one_side_stream_for_each_main_stream() -> None:
    streams = FakeStreams()
    for _ in range(3):
        SideStream(CUDA, streams).run(lambda: None).join()
    assert streams.made == 1
    with streams.stream(FakeStream(streams, "other")):
        SideStream(CUDA, streams).run(lambda: None).join()
    assert streams.made == 2


def test_inputs_live_until_the_join() -> None:
    streams, tap = FakeStreams(), torch.ones(3)
    alive = weakref.ref(tap)

    def queued(tap: torch.Tensor) -> Pending[torch.Tensor]:
        return SideStream(CUDA, streams).run(lambda: tap + 1)

    pending = queued(tap)
    del tap
    gc.collect()
    assert alive() is not None
    assert pending.join().tolist() == [2, 2, 2]
    gc.collect()
    assert alive() is None


def test_work_that_fails_leaves_the_current_stream_as_it_was() -> None:
    streams = FakeStreams()
    with pytest.raises(ZeroDivisionError):
        SideStream(CUDA, streams).run(lambda: 1 // 0)
    assert streams.current is streams.main


def test_the_current_stream_waits_for_what_failed_work_had_queued() -> None:
    streams = FakeStreams()

    def work() -> None:
        streams.do("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        SideStream(CUDA, streams).run(work)
    assert streams.log[-2:] == ["side1: half", "main: wait for side1 after 'side1: half'"]


def test_what_is_dropped_is_joined_before_its_inputs_go() -> None:
    """An exception between fork and join: memory that the work still reads must not be handed out before the wait is queued."""
    streams, tap = FakeStreams(), torch.ones(3)
    weakref.finalize(tap, streams.do, "tap is gone")

    def queued(tap: torch.Tensor) -> Pending[torch.Tensor]:
        return SideStream(CUDA, streams).run(lambda: streams.do("prepare") or tap + 1)

    pending = queued(tap)
    del tap
    streams.do("layers")
    del pending
    gc.collect()
    side, wait, gone = streams.log[1], *streams.log[-2:]
    assert side == "side1: prepare" and wait == "main: wait for side1 after 'side1: prepare'"
    assert gone == "main: tap is gone"


def test_elsewhere_it_is_a_plain_call() -> None:
    streams = FakeStreams()
    pending = SideStream(torch.device("cpu"), streams).run(lambda: streams.do("prepare") or 7)
    assert streams.log == ["main: prepare"]
    assert pending.join() == 7 and streams.log == ["main: prepare"]


def test_prefill_forks_before_its_layers_and_joins_before_the_score(
    model: GlimpseModel, golden_inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams, scorer = FakeStreams(), model.plan.stages[0].score
    kind = type(scorer)
    prepare, score, enter = kind.prepare, kind.score, AllRows._enter

    def logged(name: str, do: Any) -> Any:
        def run(*args: Any) -> Any:
            streams.do(name)
            return do(*args)

        return run

    monkeypatch.setattr(kind, "prepare", logged("prepare", prepare))
    monkeypatch.setattr(kind, "score", logged("score", score))
    monkeypatch.setattr(AllRows, "_enter", logged("layer", enter))
    monkeypatch.setattr(prefill, "SideStream", lambda device: SideStream(CUDA, streams))
    plain = golden_inputs("square_8x8")
    model.generate(**plain, max_new_tokens=1)
    where = [entry.partition(" after")[0] for entry in streams.log]
    assert where[:2] == ["side1: wait for main", "side1: prepare"]
    assert where[-2:] == ["main: wait for side1", "main: score"]
    assert set(where[2:-2]) == {"main: layer"}

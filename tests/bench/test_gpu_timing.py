# SPDX-License-Identifier: Apache-2.0
"""The clock of the GPU benchmark, held against one that moves by what is queued."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from bench import gpu_timing


class FakeCuda:
    """Stands in for `torch.cuda`: a clock that moves with the work that was queued; keeps the signatures of the real one."""

    def __init__(self) -> None:
        self.now = 0.0
        self.capturing: list[Callable[[], None]] | None = None
        self.mode = 0

    def work(self, seconds: float) -> None:
        def do() -> None:
            self.now += seconds

        if self.capturing is None:
            do()
        else:
            self.capturing.append(do)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()

    class Event:
        def record(self, stream: object = None) -> None:
            self.at = fake.now

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.at - self.at)

    class Graph:
        def __init__(self) -> None:
            self.steps: list[Callable[[], None]] = []

        def replay(self) -> None:
            for step in self.steps:
                step()

    class Capture:
        def __init__(self, graph: Graph) -> None:
            self.graph = graph

        def __enter__(self) -> None:
            fake.capturing = self.graph.steps

        def __exit__(self, *problem: object) -> None:
            fake.capturing = None

    real = {name: getattr(torch.cuda, name) for name in ("Event", "CUDAGraph", "graph", "Stream")}

    def event(*args: Any, **kwargs: Any) -> Event:
        mock.create_autospec(real["Event"].__new__)(real["Event"], *args, **kwargs)
        return Event()

    def graph(*args: Any, **kwargs: Any) -> Capture:
        mock.create_autospec(real["graph"].__init__)(None, *args, **kwargs)
        return Capture(args[0])

    stream = mock.MagicMock(spec=real["Stream"])
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: fake.mode)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(fake, "mode", mode))
    monkeypatch.setattr(gpu_timing.CudaWatch, "__init__", init(fake, stream))
    monkeypatch.setattr(gpu_timing.CudaWatch, "_sweep", lambda self: fake.work(80e-6))
    return fake


def init(fake: FakeCuda, stream: object) -> Callable[[gpu_timing.CudaWatch], None]:
    def make(self: gpu_timing.CudaWatch) -> None:
        self._stream, self._sweeps = stream, {}  # type: ignore[assignment]

    return make


def test_times_are_those_of_the_call_alone(cuda: FakeCuda) -> None:
    def waits() -> None:
        if cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        cuda.work(50e-6)

    contenders = {"ours": lambda: cuda.work(20e-6), "slow": lambda: cuda.work(30e-3), "waits": waits}
    found = gpu_timing.CudaWatch().interleaved(contenders, rounds=6, seconds=9.0)
    assert {name: t.how for name, t in found.items()} == {"ours": "graph", "slow": "graph", "waits": "events"}
    assert found["ours"].median == pytest.approx(20e-6) and found["slow"].median == pytest.approx(30e-3)
    assert found["waits"].median == pytest.approx(50e-6) and "synchronizing" in found["waits"].note
    assert len(found["ours"].seconds) == 6 and cuda.mode == 0

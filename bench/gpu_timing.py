# SPDX-License-Identifier: Apache-2.0
"""Times on a GPU: CUDA graphs replayed between events, the L2 cache swept before every call, contenders in alternation.

A sample is one replay of a graph of `n` times (sweep, call), less the time of the same graph of sweeps alone, over `n`: so
neither Python's nor the graph's own launch is in it, and the sweep keeps the device busy while the next launch is
prepared. The sweep only reads, so it leaves no lines behind that would have to be written back during the call.
What cannot be captured (it waits for the device) is timed between events, launches and all, and says so.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

Function = Callable[[], object]

FEWEST_ROUNDS = 5
MOST_CALLS = 10  # in one graph
SAMPLE_SECONDS = 2e-3  # a graph holds as many calls as take about this long
SWEEP_BYTES = 256 << 20  # several times any L2
WAKING_SWEEPS = 400  # some 30 ms: an idle GPU lowers its clocks, and the checks before leave it idle


@dataclass
class Timed:
    """Seconds of each sample of a contender; how they were taken ("graph", "events", "host"), and why not by a graph."""

    seconds: list[float] = field(default_factory=list)
    how: str = ""
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else math.nan

    def quantile(self, share: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else math.nan

    def record(self) -> dict[str, object]:
        found: dict[str, object] = {"s": self.median, "p20": self.quantile(0.2), "p80": self.quantile(0.8)}
        found |= {"samples": len(self.seconds), "how": self.how}
        return found | ({"note": self.note} if self.note else {})


class Watch(Protocol):
    def interleaved(
        self, contenders: Mapping[str, Function], *, rounds: int, seconds: float
    ) -> dict[str, Timed]: ...

    def eager(self, function: Function) -> float: ...


def words(problem: BaseException) -> str:
    """An exception in one line."""
    first = (str(problem).strip().splitlines() or [""])[0]
    return f"{type(problem).__name__}: {first}"[:300]


class CudaWatch:
    """For the current CUDA device."""

    def __init__(self) -> None:
        self._swept = torch.zeros(SWEEP_BYTES // 4, dtype=torch.float32, device="cuda")
        self._sum = torch.zeros((), dtype=torch.float32, device="cuda")
        self._stream = torch.cuda.Stream()
        self._sweeps: dict[int, torch.cuda.CUDAGraph] = {}

    def _sweep(self) -> None:
        torch.sum(self._swept, dim=0, out=self._sum)

    def _graph(self, function: Function, calls: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            for _ in range(calls):
                self._sweep()
                function()
        return graph

    def _on_side_stream(self, function: Function, calls: int) -> float:
        """Seconds a call, launches included, after `calls` more: compiles, fills caches and workspaces, raises clocks."""
        self._stream.wait_stream(torch.cuda.current_stream())
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(self._stream):
            for _ in range(calls):
                function()
            begin.record(self._stream)
            for _ in range(calls):
                function()
            end.record(self._stream)
        torch.cuda.current_stream().wait_stream(self._stream)
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e-3 / calls

    def _prepare(self, function: Function, timed: Timed) -> tuple[torch.cuda.CUDAGraph | None, int]:
        lasted = self._on_side_stream(function, 3)
        try:
            forbid_waiting(function)
        except RuntimeError as problem:
            timed.how, timed.note = "events", f"waits for the device: {words(problem)}"
            return None, 1
        calls = min(MOST_CALLS, max(1, math.ceil(SAMPLE_SECONDS / max(lasted, 1e-6))))
        try:
            if calls not in self._sweeps:
                self._sweep()
                torch.cuda.synchronize()
                self._sweeps[calls] = self._graph(lambda: None, calls)
            graph = self._graph(function, calls)
            graph.replay()
            torch.cuda.synchronize()
        except RuntimeError as problem:
            torch.cuda.synchronize()  # raises if the device is lost: then nothing more can be measured in this process
            timed.how, timed.note = "events", f"not captured: {words(problem)}"
            return None, 1
        timed.how = "graph"
        return graph, calls

    def _sample(self, enqueue: Function, sweep: bool) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if sweep:
            self._sweep()
        begin.record()
        enqueue()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    def interleaved(
        self, contenders: Mapping[str, Function], *, rounds: int, seconds: float
    ) -> dict[str, Timed]:
        """Seconds per call by name; who goes first changes every round. Stops after `rounds`, or after `seconds` and at
        least `FEWEST_ROUNDS`."""
        timed = {name: Timed() for name in contenders}
        prepared = {name: self._prepare(function, timed[name]) for name, function in contenders.items()}
        raw: dict[str, list[float]] = {name: [] for name in contenders}
        counts = sorted({calls for graph, calls in prepared.values() if graph is not None})
        bare: dict[int, list[float]] = {calls: [] for calls in counts}
        for _ in range(WAKING_SWEEPS):
            self._sweep()
        names, started = list(contenders), time.perf_counter()
        for number in range(rounds):
            if number >= FEWEST_ROUNDS and time.perf_counter() - started > seconds:
                break
            for calls in counts:
                bare[calls].append(self._sample(self._sweeps[calls].replay, sweep=True))
            first = number % len(names)
            for name in names[first:] + names[:first]:
                graph, _ = prepared[name]
                enqueue = contenders[name] if graph is None else graph.replay
                raw[name].append(self._sample(enqueue, sweep=True))
        for name, samples in raw.items():
            graph, calls = prepared[name]
            spent = 0.0 if graph is None else statistics.median(bare[calls])
            timed[name].seconds = [max(sample - spent, 1e-9) / calls for sample in samples]
        return timed

    def eager(self, function: Function, seconds: float = 0.03) -> float:
        """Seconds a call when Python launches one after the other, caches warm: the larger of launching and running."""
        function()
        torch.cuda.synchronize()
        began, calls = time.perf_counter(), 0
        while calls < 3 or (time.perf_counter() - began < seconds and calls < 500):
            function()
            calls += 1
        torch.cuda.synchronize()
        return (time.perf_counter() - began) / calls


def forbid_waiting(function: Function) -> None:
    """Call it where reads of device values by the host are errors (RuntimeError)."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    torch.cuda.synchronize()


class HostWatch:
    """The same on a CPU, for rehearsals: its figures say nothing."""

    def interleaved(
        self, contenders: Mapping[str, Function], *, rounds: int, seconds: float
    ) -> dict[str, Timed]:
        timed = {name: Timed(how="host") for name in contenders}
        for _ in range(min(rounds, 2)):
            for name, function in contenders.items():
                timed[name].seconds.append(self.eager(function))
        return timed

    def eager(self, function: Function, seconds: float = 0.0) -> float:
        began = time.perf_counter()
        function()
        return max(time.perf_counter() - began, 1e-9)

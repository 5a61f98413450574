# SPDX-License-Identifier: Apache-2.0
"""Clocks, interleaved timing, and facts about the machine."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

SAMPLE_SECONDS = 4e-4  # a sample repeats a short call until it lasts about this long
FEWEST_SAMPLES = 5
DEFAULT_CACHE_BYTES = 32 << 20

Clock = Callable[[], float]


def clock(cpu_time: bool) -> Clock:
    """Wall clock, or the CPU time of the calling thread: right only with one thread, but blind to other processes."""
    return time.thread_time if cpu_time else time.perf_counter


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    *,
    now: Clock,
    repeats: int,
    seconds: float,
    before: Callable[[], None] | None = None,
) -> dict[str, list[float]]:
    """Time functions in alternation, so that all meet the same disturbances; who goes first changes every round.

    before: called ahead of every single call, untimed (`CacheFlush`); without it a sample repeats short calls.
    Stops after `repeats` rounds, or when `seconds` have passed and there are `FEWEST_SAMPLES` of them.

    Returns seconds per call by name, one entry a round.
    """
    names = list(contenders)
    calls = {name: 1 if before else _calls_per_sample(f, now) for name, f in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    for number in range(repeats):
        if number >= FEWEST_SAMPLES and time.perf_counter() - started > seconds:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            function, count = contenders[name], calls[name]
            if before:
                before()
            began = now()
            for _ in range(count):
                function()
            samples[name].append((now() - began) / count)
    return samples


def _calls_per_sample(function: Callable[[], object], now: Clock) -> int:
    """Warms up, too."""
    lasted = math.inf
    for _ in range(3):
        began = now()
        function()
        lasted = min(lasted, now() - began)
        if lasted > SAMPLE_SECONDS:
            return 1
    return max(1, math.ceil(SAMPLE_SECONDS / max(lasted, 1e-7)))


class CacheFlush:
    """Writes more memory than the last-level cache holds, so that the next call finds its operands in memory."""

    def __init__(self) -> None:
        self._buffer = torch.zeros(2 * cache_bytes() // 4)

    def __call__(self) -> None:
        self._buffer.add_(1.0)


def cache_bytes() -> int:
    """Size of the last-level cache as Linux tells it; `DEFAULT_CACHE_BYTES` elsewhere."""
    sizes = [DEFAULT_CACHE_BYTES]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) << 10)
    return max(sizes)


def machine() -> dict[str, object]:
    """What a reader needs to place the figures."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "last_level_cache_mib": cache_bytes() >> 20,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def load_average() -> float:
    """Processes that wanted to run in the last minute; nan where the system does not tell."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return math.nan

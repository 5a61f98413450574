# SPDX-License-Identifier: Apache-2.0
"""Moments of a request: CUDA events where there is a GPU, the host's clock elsewhere, set at the seams of the runtime.

The seams are looked up when they are used; one that is not there any more is told, and its phase is then part of the next one.
"""

from __future__ import annotations

import functools
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

PHASES = ("preprocess", "vision", "before", "select", "after")
"""The first token's way: picture to patches, vision tower, layers up to K, predictor with selection and copies, all the rest."""


class Marks:
    """Named moments in the order of the device's work; names are those of the phase that ends there."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._moments: list[tuple[str, Any]] = []

    def __call__(self, phase: str) -> None:
        if not self._gpu:
            self._moments.append((phase, time.perf_counter()))
        elif not torch.cuda.is_current_stream_capturing():
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
            self._moments.append((phase, moment))

    def seconds(self) -> dict[str, float]:
        """Of each phase, those of one name added up. The first mark only starts the clock. Waits for the device."""
        if self._gpu:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for (_, begin), (phase, end) in zip(self._moments, self._moments[1:], strict=False):
            lasted = begin.elapsed_time(end) * 1e-3 if self._gpu else end - begin
            found[phase] = found.get(phase, 0.0) + lasted
        return found


@contextmanager
def runtime_seams(mark: Marks) -> Iterator[list[str]]:
    """Inside the block requests to the runtime set marks; the names of seams that were not found."""
    missing: list[str] = []
    with ExitStack() as stack:

        def patch(where: Any, name: str, changed: Callable[..., Any]) -> None:
            stack.enter_context(mock.patch.object(where, name, changed))

        towers = _find("glimpse_runtime.models.qwen2_5_vl.vision", "VisionTower")
        if towers is None:
            missing.append("vision")
        else:
            patch(towers, "__call__", _then(towers.__call__, mark, "vision"))
        scorer = _find("glimpse_runtime.plans.glimpse", "GlimpseScorer")
        if scorer is None or not hasattr(scorer, "score"):
            missing.append("before")
        else:
            patch(scorer, "score", _first(scorer.score, mark, "before"))
        import glimpse_kernels

        users = [
            module
            for name, module in list(sys.modules.items())
            if name.startswith("glimpse_runtime.")
            and getattr(module, "compact", None) is glimpse_kernels.compact
        ]
        copied = _copies(glimpse_kernels.compact, mark)
        for module in users:
            patch(module, "compact", copied)
        if not users:
            missing.append("select")
        yield missing


def _copies(compact: Callable[..., Any], mark: Marks) -> Callable[..., Any]:
    """Each copy belongs to "select", also one of keys and values that comes behind the rest of layer K."""
    calls = 0

    @functools.wraps(compact)
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if calls:
            mark("after")
        calls += 1
        found = compact(*args, **kwargs)
        mark("select")
        return found

    return run


def _find(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def _then(call: Callable[..., Any], mark: Marks, phase: str) -> Callable[..., Any]:
    @functools.wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        found = call(*args, **kwargs)
        mark(phase)
        return found

    return run


def _first(call: Callable[..., Any], mark: Marks, phase: str) -> Callable[..., Any]:
    @functools.wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        mark(phase)
        return call(*args, **kwargs)

    return run


class Beat:
    """A streamer that notes when tokens arrive at the host; for `generate` of transformers and of the runtime."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.times: list[float] = []
        self._now, self._prompt_came = now, False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_came:
            self.times.append(self._now())
        self._prompt_came = True

    def end(self) -> None: ...

    def step(self, skip: int) -> float:
        """Seconds from one token to the next, the first `skip` tokens left out: graphs are captured then, and the host may read
        behind the device."""
        late = self.times[min(skip, max(0, len(self.times) - 2)) :]
        if len(late) < 2:
            raise RuntimeError(f"expected at least two tokens to time a step, found {len(self.times)}")
        return (late[-1] - late[0]) / (len(late) - 1)

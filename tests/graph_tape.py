# SPDX-License-Identifier: Apache-2.0
"""A stand-in for CUDA graphs: what torch and the kernels were asked to do, asked again with the very same arguments.

As in a graph, addresses, shapes and every Python number are those of the capture; only what lies in memory may have changed. Work
that computes a size, an index or a scalar on the host from something that differs between replays gives the capture's answer again,
and a test that compares with the work itself fails.

Kernels are taped as whole calls (where `dispatch` hands them out), everything else operation by operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glimpse_kernels import dispatch
from tests.stand_in import DeviceTensor


def _memory(x: Tensor) -> Tensor:
    return x.held if isinstance(x, DeviceTensor) else x


@dataclass
class Step:
    """One call: the function, what it was given, what it gave."""

    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    found: Any

    def again(self) -> None:
        found = self.call(*self.args, **self.kwargs)
        for old, new in zip(tree_leaves(self.found), tree_leaves(found), strict=True):
            if isinstance(old, Tensor):
                to, source = _memory(old), _memory(new)
                assert to.shape == source.shape and to.stride() == source.stride(), (
                    "a graph's sizes are frozen"
                )
                # A view, or what an operation did in place, is there already.
                if to.data_ptr() != source.data_ptr():
                    to.copy_(source)


class _Torch(TorchDispatchMode):
    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        self._tape.note(func, args, kwargs or {}, found)
        return found


@dataclass
class Tape:
    """Captured work; `replays` counts."""

    cost: int = 0
    steps: list[Step] = field(default_factory=list)
    replays: int = 0
    _paused: bool = False

    def note(
        self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], found: Any
    ) -> None:
        if not self._paused:
            self.steps.append(Step(call, args, kwargs, found))

    @contextmanager
    def recording(self) -> Iterator[None]:
        select = dispatch.select

        def taped(*names: Any, **options: Any) -> Callable[..., Any]:
            serve = select(*names, **options)

            def run(*args: Any, **kwargs: Any) -> Any:
                outer, self._paused = self._paused, True
                try:
                    found = serve(*args, **kwargs)
                finally:
                    self._paused = outer
                self.note(serve, args, kwargs, found)
                return found

            return run

        with mock.patch.object(dispatch, "select", taped), _Torch(self):
            yield

    def replay(self) -> None:
        self.replays += 1
        for step in self.steps:
            step.again()

    def reset(self) -> None:
        self.steps.clear()


class TapeCapture:
    """Stands where `glimpse_runtime.graphs.CudaCapture` stands."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []

    def __call__(self, work: Callable[[], None]) -> Tape:
        tape = Tape()
        with tape.recording():
            work()
        self.tapes.append(tape)
        return tape

# SPDX-License-Identifier: Apache-2.0
"""Checks on every launch that Triton's interpreter runs: where it touches memory, and whether its programs race.

The interpreter runs one program after the other, each lane by lane, on raw addresses: what would be out of bounds or a race on a
GPU goes unseen. Inside `checking()` every launch is held to these rules:

- Every lane that is not masked off lies inside a tensor that was passed to the kernel: on an element of it, not in the gap between
  the rows of a view.
- No program stores where another one stores, and none reads what another one writes, before or after. A program that did an atomic
  operation before may (that is how the last one to finish collects the others' results).
- A program that reads what it stored itself has passed a `tl.debug_barrier()` in between, as has one that stores again from
  other lanes: its threads are not ordered otherwise.
- An address is a multiple of the size of what is accessed.
- Lanes of one store that share an address store the same value.
- Every side of the grid is at least 1 and no larger than CUDA allows.

Not checked: gaps and races in memory of more than `MOST_SLOTS` elements (only that accesses lie between its first and its last byte);
reads before writes beyond the first `MOST_KEPT` lanes of a launch; reads and a later store of the same program.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import gcd
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from triton.runtime import interpreter
from triton.runtime.jit import TensorWrapper
from triton.tools.tensor_descriptor import TensorDescriptor

MOST_SLOTS = 2**24
MOST_KEPT = 2**23
MOST_PROGRAMS = (2**31 - 1, 65535, 65535)
EPOCHS = 20
"""Bits of a writer's mark that count barriers; the rest is the program."""
ATOMIC = -1
"""Mark of memory that an atomic operation wrote."""

Array = np.ndarray[Any, Any]


class MemoryFault(AssertionError):
    """A launch broke one of the rules above."""


@dataclass
class Tensor:
    """An argument of a launch: its name and the bytes from its first to its last element."""

    name: str
    tensor: torch.Tensor

    @property
    def start(self) -> int:
        return self.tensor.data_ptr()

    @property
    def end(self) -> int:
        t = self.tensor
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        return self.start + (last + 1) * t.element_size()

    @property
    def dense(self) -> bool:
        return self.end - self.start == self.tensor.numel() * self.tensor.element_size()


@dataclass
class Window:
    """Memory that one tensor covers, or several that overlap. A slot is the largest piece that all accesses are made of.

    inside: whether a slot belongs to a tensor, where some do not. writer: mark of the last store to a slot, 0 for none.
    lane: position in that store.
    """

    start: int
    end: int
    tensors: list[Tensor]
    slot: int = 1
    inside: Array | None = None
    writer: Array | None = None
    lane: Array | None = None

    def prepare(self) -> None:
        self.slot = gcd(
            self.start, *(t.tensor.element_size() for t in self.tensors), *(t.start for t in self.tensors)
        )
        if not self.small or any(t.dense and t.end - t.start == self.end - self.start for t in self.tensors):
            return
        self.inside = np.zeros(self.slots, dtype=bool)
        for t in self.tensors:
            per = t.tensor.element_size() // self.slot
            shape, strides = (*t.tensor.shape, per), (*(per * s for s in t.tensor.stride()), 1)
            as_strided(self.inside[(t.start - self.start) // self.slot :], shape, strides)[...] = True
        if self.inside.all():
            self.inside = None

    @property
    def slots(self) -> int:
        return (self.end - self.start) // self.slot

    @property
    def small(self) -> bool:
        return self.slots <= MOST_SLOTS

    def split(self, size: int) -> None:
        """Smaller slots, for accesses that are not made of whole ones."""
        times = self.slot // size
        self.slot = size
        self.inside, self.writer, self.lane = (
            None if a is None else np.repeat(a, times) for a in (self.inside, self.writer, self.lane)
        )

    def index(self, addresses: Array, size: int) -> Array:
        """Slots that these aligned accesses of `size` bytes cover: the first slot of each, then the second of each, ..."""
        offsets = (addresses - np.uint64(self.start)).astype(np.int64)
        if size < self.slot:
            self.split(size)
        if self.slot > 1:
            offsets >>= self.slot.bit_length() - 1
        if size == self.slot:
            return offsets
        return np.concatenate([offsets + i for i in range(size // self.slot)])

    def write(self, index: Array, mark: int, lanes: Array | None) -> None:
        if self.writer is None:
            self.writer, self.lane = np.zeros(self.slots, np.int64), np.zeros(self.slots, np.int32)
        assert self.lane is not None
        self.writer[index] = mark
        if lanes is not None:
            self.lane[index] = np.tile(lanes, len(index) // len(lanes))


@dataclass
class Launch:
    """One launch under the rules."""

    name: str
    windows: list[Window]
    program: int = 0
    place: tuple[int, ...] = (0, 0, 0)
    epoch: int = 0
    ordered: bool = False
    kept: list[tuple[Window, int, tuple[int, ...], Array, int]] = field(default_factory=list)
    kept_lanes: int = 0

    def __post_init__(self) -> None:
        self.starts = [w.start for w in self.windows]

    def enter(self, place: tuple[int, ...]) -> None:
        self.program, self.place, self.epoch, self.ordered = self.program + 1, place, 0, False

    @property
    def mark(self) -> int:
        return self.program << EPOCHS | self.epoch

    def fail(self, what: str, place: tuple[int, ...] | None = None) -> None:
        raise MemoryFault(f"{self.name}, program {self.place if place is None else place}: {what}")

    def where(self, address: int) -> str:
        """An address in words: its distance from the nearest tensor."""
        tensors = [t for w in self.windows for t in w.tensors]
        if not tensors:
            return f"address {address:#x}, and no tensor was passed"

        def distance(t: Tensor) -> int:
            return max(t.start - address, address - t.end + 1, 0)

        near = min(tensors, key=distance)
        words = f"{near.name} {list(near.tensor.shape)} {str(near.tensor.dtype).removeprefix('torch.')}"
        if address < near.start:
            return f"{near.start - address} bytes before {words}"
        if address >= near.end:
            return f"{address - near.end} bytes behind {words}"
        return f"byte {address - near.start} of {words} with strides {list(near.tensor.stride())}"

    def lanes(self, pointers: Array, mask: Array) -> tuple[Array, Array | None]:
        """Addresses in use and, where some are masked off, their positions."""
        mask = np.asarray(mask)
        if mask.all():
            return np.asarray(pointers).ravel(), None
        used = np.flatnonzero(np.broadcast_to(mask, pointers.shape))
        return np.asarray(pointers).ravel()[used], used

    def parts(self, addresses: Array, size: int, verb: str) -> list[tuple[Window, Array, Array | None]]:
        """The accesses by window, with their positions among `addresses` (None: all of them)."""
        if size > 1 and int(np.bitwise_or.reduce(addresses)) % size:
            first = int(addresses[np.argmax(addresses % np.uint64(size) != 0)])
            self.fail(f"{verb} {size} bytes at an address that is no multiple of that: {self.where(first)}")
        low, high = int(addresses.min()), int(addresses.max()) + size
        at = bisect_right(self.starts, low) - 1
        if at >= 0 and high <= self.windows[at].end:
            return [(self.windows[at], addresses, None)]
        ends = np.array([w.end for w in self.windows], dtype=np.uint64)
        which = np.searchsorted(np.array(self.starts, dtype=np.uint64), addresses, side="right") - 1
        wrong = which < 0
        if len(ends):
            wrong |= addresses + np.uint64(size) > ends[which]
        if wrong.any():
            self.outside(addresses, wrong, size, verb)
        picked = [(i, np.flatnonzero(which == i)) for i in np.unique(which)]
        return [(self.windows[i], addresses[used], used) for i, used in picked]

    def outside(self, addresses: Array, wrong: Array, size: int, verb: str) -> None:
        first = int(addresses[np.argmax(wrong)])
        self.fail(
            f"{verb} {size} bytes outside of the tensors in {int(wrong.sum())} lanes, the first {self.where(first)}"
        )

    def check_inside(self, window: Window, index: Array, addresses: Array, size: int, verb: str) -> None:
        if window.inside is not None:
            wrong = ~window.inside[index]
            if wrong.any():
                self.outside(addresses, wrong.reshape(-1, len(addresses)).any(0), size, verb)

    def loaded(self, pointers: Array, mask: Array, size: int) -> None:
        addresses, _ = self.lanes(pointers, mask)
        if not addresses.size:
            return
        for window, mine, _ in self.parts(addresses, size, "loads"):
            if not window.small:
                continue
            if window.inside is not None or window.writer is not None:
                index = window.index(mine, size)
                self.check_inside(window, index, mine, size, "loads")
                if window.writer is not None:
                    self.check_read(window, index, mine)
            if not self.ordered and self.kept_lanes + mine.size <= MOST_KEPT:
                self.kept.append((window, self.program, self.place, mine, size))
                self.kept_lanes += mine.size

    def check_read(self, window: Window, index: Array, addresses: Array) -> None:
        assert window.writer is not None
        found = window.writer[index]
        if not found.any():
            return
        unordered = found == self.mark
        if unordered.any():
            first = int(addresses[np.argmax(unordered) % len(addresses)])
            self.fail(
                f"reads what it stored itself, without a tl.debug_barrier() in between: {self.where(first)}"
            )
        others = (found != 0) & (found >> EPOCHS != self.program)
        if others.any() and not self.ordered:
            first = int(addresses[np.argmax(others) % len(addresses)])
            self.fail(f"reads what another program of the launch wrote: {self.where(first)}")

    def storing(self, pointers: Array, mask: Array, size: int) -> None:
        addresses, used = self.lanes(pointers, mask)
        if not addresses.size:
            return
        positions = np.arange(addresses.size) if used is None else used
        for window, mine, chosen in self.parts(addresses, size, "stores"):
            if not window.small:
                continue
            index = window.index(mine, size)
            self.check_inside(window, index, mine, size, "stores")
            lanes = positions if chosen is None else positions[chosen]
            if window.writer is not None and window.lane is not None:
                found = window.writer[index]
                if found.any():
                    others = (found != 0) & (found >> EPOCHS != self.program)
                    if others.any() and not self.ordered:
                        first = int(mine[np.argmax(others) % len(mine)])
                        self.fail(f"stores where another program of the launch stored: {self.where(first)}")
                    again = (found == self.mark) & (
                        window.lane[index] != np.tile(lanes, len(index) // len(lanes))
                    )
                    if again.any():
                        first = int(mine[np.argmax(again) % len(mine)])
                        self.fail(
                            "stores where other lanes of it stored, without a tl.debug_barrier() in between: "
                            + self.where(first)
                        )
            window.write(index, self.mark, lanes)

    def atomic(self, pointers: Array, mask: Array | None, size: int) -> None:
        self.ordered = True
        addresses, _ = self.lanes(pointers, np.ones((), dtype=bool) if mask is None else mask)
        if not addresses.size:
            return
        for window, mine, _ in self.parts(addresses, size, "does an atomic operation on"):
            if window.small:
                index = window.index(mine, size)
                self.check_inside(window, index, mine, size, "does an atomic operation on")
                window.write(index, ATOMIC, None)

    def finish(self) -> None:
        """What was read before another program wrote it."""
        for window, program, place, addresses, size in self.kept:
            if window.writer is None:
                continue
            found = window.writer[window.index(addresses, size)]
            others = (found != 0) & (found >> EPOCHS != program)
            if others.any():
                first = int(addresses[np.argmax(others) % len(addresses)])
                self.fail(f"reads what another program of the launch writes: {self.where(first)}", place)


class _Interpreter:
    """Stands in for Triton's compiled half of the interpreter."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self.launch: Launch | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def load(self, pointers: Array, mask: Array, other: Array, dtype: Any) -> Array:
        if self.launch is not None:
            self.launch.loaded(pointers, mask, np.dtype(dtype).itemsize)
        return self._real.load(pointers, mask, other, dtype)

    def store(self, pointers: Array, value: Array, mask: Array) -> Any:
        if self.launch is None:
            return self._real.store(pointers, value, mask)
        self.launch.storing(pointers, mask, value.itemsize)
        done = self._real.store(pointers, value, mask)
        if value.size > 1:
            value = np.ascontiguousarray(value)
            back = self._real.load(pointers, mask, value, value.dtype)
            if back.tobytes() != value.tobytes():
                self.launch.fail("two lanes of one store write different values to one address")
        return done

    def atomic_rmw(self, op: Any, pointers: Array, value: Array, mask: Array, *order: Any) -> Any:
        if self.launch is not None:
            self.launch.atomic(pointers, mask, value.itemsize)
        return self._real.atomic_rmw(op, pointers, value, mask, *order)

    def atomic_cas(self, pointers: Array, compare: Array, value: Array, *order: Any) -> Any:
        if self.launch is not None:
            self.launch.atomic(pointers, None, value.itemsize)
        return self._real.atomic_cas(pointers, compare, value, *order)


def _tensors(name: str, value: Any) -> Iterator[Tensor]:
    """Tensors in an argument, with their names."""
    if isinstance(value, torch.Tensor):
        if value.numel():
            yield Tensor(name, value)
    elif isinstance(value, TensorDescriptor | TensorWrapper):
        yield from _tensors(name, value.base)
    elif isinstance(value, tuple | list):
        for i, part in enumerate(value):
            yield from _tensors(f"{name}[{i}]", part)


def windows_of(tensors: list[Tensor]) -> list[Window]:
    """Disjoint windows in order of their addresses."""
    windows: list[Window] = []
    for tensor in sorted(tensors, key=lambda t: t.start):
        if windows and tensor.start < windows[-1].end:
            windows[-1].tensors.append(tensor)
            windows[-1].end = max(windows[-1].end, tensor.end)
        else:
            windows.append(Window(tensor.start, tensor.end, [tensor]))
    for window in windows:
        window.prepare()
    return windows


@contextmanager
def checking() -> Iterator[None]:
    """Inside the block, an interpreted launch that breaks a rule raises `MemoryFault`, an AssertionError."""
    proxy = _Interpreter(interpreter._interpreter)
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    set_grid_idx, create_barrier, call = builder.set_grid_idx, builder.create_barrier, executor.__call__
    patch_lang_tensor = interpreter._patch_lang_tensor

    def enter(self: Any, *place: int) -> None:
        set_grid_idx(self, *place)
        if proxy.launch is not None:
            proxy.launch.enter(place)

    def barrier(self: Any, *args: Any) -> Any:
        if proxy.launch is not None:
            proxy.launch.epoch += 1
        return create_barrier(self, *args)

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        name = self.fn.__name__
        if not callable(self.grid):
            for side, most in zip(self.grid, MOST_PROGRAMS, strict=False):
                if not 1 <= side <= most:
                    raise MemoryFault(f"{name}: grid {self.grid}: expected sides from 1 to {MOST_PROGRAMS}")
        given = [*zip(self.arg_names, args, strict=False), *kwargs.items()]
        found = [tensor for at, value in given for tensor in _tensors(at, value)]
        proxy.launch = Launch(name, windows_of(found))
        try:
            call(self, *args, **kwargs)
            proxy.launch.finish()
        except interpreter.InterpreterError as error:
            if isinstance(error.__cause__, MemoryFault):
                raise error.__cause__ from None
            raise
        finally:
            proxy.launch = None

    def patch_tensor(tensor: Any, scope: Any) -> None:
        """Triton 3.6 takes a bound of `range` from an array of one element, which NumPy 2.4 no longer makes a number."""
        patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def nothing_to_restore(self: Any, *args: Any) -> None:
        """The arguments were on the host all along; Triton would copy each storage to itself, page by page."""

    with ExitStack() as stack:
        for owner, name, value in (
            (interpreter, "_interpreter", proxy),
            (interpreter, "_patch_lang_tensor", patch_tensor),
            (builder, "set_grid_idx", enter),
            (builder, "create_barrier", barrier),
            (executor, "__call__", launch),
            (executor, "_restore_args_dev", nothing_to_restore),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield

# SPDX-License-Identifier: Apache-2.0
"""A stand-in for a GPU: tensors that say they are on ``cuda:0`` and compute on the CPU.

Code that is to run on a GPU breaks there in ways no CPU test shows: a tensor made on the wrong device, a table left behind
on the host, an index vector that was never moved. Inside `stand_in_gpu()` torch's own rules hold (operands of two devices are
refused, `numpy()` of a device tensor too), Triton kernels run in the interpreter on the memory behind the tensors, and every
read of a device value by the host is noted.

It sits where Python calls torch (`__torch_function__`), above torch's C++: that has no device guard for a GPU it was built without.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_flatten, tree_map

from glimpse_kernels import _triton

DEVICE = torch.device("cuda", 0)

HOST_READS = {
    Tensor.item,
    Tensor.tolist,
    Tensor.cpu,
    Tensor.__bool__,
    Tensor.__int__,
    Tensor.__float__,
    Tensor.__index__,
    Tensor.__contains__,
    Tensor.nonzero,
    Tensor.masked_select,
    Tensor.equal,
    torch.nonzero,
    torch.masked_select,
    torch.equal,
    torch.allclose,
    torch.unique,
    torch.unique_consecutive,
    torch.bincount,
    Tensor.unique,
    Tensor.unique_consecutive,
    Tensor.bincount,
    Tensor.allclose,
}
"""What the host has to wait for."""
REPEATS = {torch.repeat_interleave, Tensor.repeat_interleave}
"""Waits for the sum of `repeats` unless it is told."""
INDEXING = {Tensor.__getitem__, Tensor.__setitem__, Tensor.index_put_, Tensor.copy_}
"""What torch lets have a host tensor beside a device tensor."""


class HostWaited(AssertionError):
    """Inside `StandIn.nothing_waits` the host read a device value, or made torch wait for a copy."""


@dataclass
class StandIn:
    """What happened inside the block: `reads` names each wait of the host for a device value."""

    reads: list[str] = field(default_factory=list)
    _strict: bool = False
    _locked: dict[int, Tensor] = field(default_factory=dict)  # page-locked memory by its address

    @contextmanager
    def nothing_waits(self) -> Iterator[None]:
        """Inside, whatever would make the host wait raises `HostWaited`: what is in `reads` otherwise, and copies between the device
        and memory that is not page-locked. Copies that are asked to be `non_blocking`, from or to page-locked memory, may pass: who
        reads what they bring waits for an event, which is no concern of this one."""
        outer, self._strict = self._strict, True
        try:
            yield
        finally:
            self._strict = outer

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Inside, as if this were a kernel: what the host reads is not noted."""
        seen, outer = len(self.reads), self._strict
        self._strict = False
        try:
            yield
        finally:
            self._strict = outer
            del self.reads[seen:]

    def lock(self, memory: Tensor) -> None:
        self._locked[memory.untyped_storage().data_ptr()] = memory

    def passes(self, host: Tensor, non_blocking: bool) -> bool:
        """Whether a copy between `host` and the device is queued without a wait."""
        return not host.numel() or (non_blocking and host.untyped_storage().data_ptr() in self._locked)

    def forbid(self, what: str) -> None:
        if self._strict:
            raise HostWaited(what)


_current: StandIn | None = None


_SHELL = torch.empty(0, device="meta")


class DeviceTensor(Tensor):
    """A tensor on `DEVICE` by its own account; `held` is the memory, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> DeviceTensor:
        made = _SHELL.as_subclass(cls)
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.held!r})"

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return _call(func, args, dict(kwargs or {}))


class _Mode(TorchFunctionMode):
    """Sees the calls that have no device tensor among their arguments, too: factories, and copies from the host."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return _call(func, args, dict(kwargs or {}))


def active() -> bool:
    """Whether a stand-in is in force."""
    return _current is not None


def adopt(held: Tensor) -> Tensor:
    """A device tensor on memory that is there already: nothing is copied."""
    return DeviceTensor(held)


def _note(func: Any) -> None:
    if _current is not None:
        _current.reads.append(resolve_name(func) or str(func))
        _current.forbid(f"{resolve_name(func) or func} reads a device value")


def _between(func: Any, host: Tensor, non_blocking: bool) -> None:
    """A copy between the device and `host`."""
    if _current is not None and not _current.passes(host, non_blocking):
        _current.forbid(
            f"{resolve_name(func) or func} copies between the device and memory that is not page-locked"
        )


def _watch_copies(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], to_device: bool) -> None:
    """Copies from the host that torch waits for."""
    patient = bool(kwargs.get("non_blocking") or (func is Tensor.copy_ and len(args) > 2 and args[2]))
    source = args[0] if args else None
    if to_device and func in (Tensor.to, Tensor.cuda):
        if isinstance(source, Tensor) and not isinstance(source, DeviceTensor):
            _between(func, source, patient)
    elif to_device and func in (torch.tensor, torch.as_tensor, torch.asarray):
        if not isinstance(source, DeviceTensor):
            _between(func, torch.as_tensor(source), False)
    elif func is Tensor.new_tensor and isinstance(source, DeviceTensor):
        _between(func, torch.as_tensor(args[1]), False)
    elif func in (Tensor.copy_, Tensor.__setitem__) and isinstance(source, DeviceTensor):
        given = args[1] if func is Tensor.copy_ else args[2]
        if isinstance(given, Tensor) and not isinstance(given, DeviceTensor):
            _between(func, given, patient)


def _is_ours(device: Any) -> bool:
    return isinstance(device, torch.device | str) and str(device).split(":")[0] == DEVICE.type


def _call(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if func is torch.device:
        return func(*args, **kwargs)
    leaves = tree_flatten((args, kwargs))[0]
    mine = {id(x.held): x for x in leaves if isinstance(x, DeviceTensor)}
    if func == Tensor.device.__get__:
        return DEVICE if mine else args[0].device
    if func == Tensor.is_cuda.__get__:
        return bool(mine)
    if func == Tensor.is_cpu.__get__:
        return not mine
    if func is Tensor.numpy and mine:
        raise TypeError(f"cannot convert a tensor on {DEVICE} to NumPy: call cpu() first")
    if kwargs.pop("pin_memory", False):  # page-locked or not, it is memory of the host
        made = func(*args, **kwargs)
        if _current is not None:
            _current.lock(made)
        return made
    if func is Tensor.cuda:
        _watch_copies(func, args, kwargs, to_device=True)
        return args[0] if mine else DeviceTensor(args[0].clone())

    generator = kwargs.get("generator")
    if generator is not None and generator.device.type == "cpu" and (mine or _is_ours(kwargs.get("device"))):
        raise RuntimeError(f"{resolve_name(func)}: expected a generator on {DEVICE}, found one on cpu")

    on_device = bool(mine)
    devices = [x for x in leaves if isinstance(x, torch.device)] + [
        x for x in (kwargs.get("device"), *(args[1:2] if func is Tensor.to else ())) if isinstance(x, str)
    ]
    if devices:
        on_device = _is_ours(devices[0])
        moved = func is Tensor.to and on_device is not bool(mine)
        if mine and not on_device:
            _note(func)
        _watch_copies(func, args, kwargs, on_device)
        args, kwargs = tree_map(lambda x: torch.device("cpu") if _is_ours(x) else x, (args, kwargs))
        found = func(*_open(args), **_open(kwargs))
        if moved and found is _open(args)[0]:
            found = found.clone()
        return _close(found, mine, on_device)
    if mine:
        others = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, DeviceTensor) and x.dim()]
        if others and func not in INDEXING and not (func is Tensor.to or func is Tensor.type_as):
            raise RuntimeError(
                f"{resolve_name(func)}: expected all tensors on the same device, found {DEVICE} and {others[0].device}"
            )
        if func is Tensor.copy_ and not isinstance(args[0], DeviceTensor):
            if _current is None or not _current.passes(args[0], bool(kwargs.get("non_blocking"))):
                _note(func)
        elif func in HOST_READS or _host_waits(func, args, kwargs):
            _note(func)
        _watch_copies(func, args, kwargs, to_device=False)
        if func is Tensor.cpu:
            return args[0].held.clone()
        if func is Tensor.copy_ and not isinstance(args[0], DeviceTensor):
            on_device = False
    return _close(func(*_open(args), **_open(kwargs)), mine, on_device)


def _host_waits(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """A boolean mask as an index, or as many of something as the device says: the host allocates what comes of it."""
    if func in REPEATS:
        repeats = kwargs.get("repeats", args[1] if len(args) > 1 else args[0])
        return isinstance(repeats, DeviceTensor) and kwargs.get("output_size") is None
    if func in (torch.where, Tensor.where):
        return len(args) == 1 and not kwargs
    if func in (Tensor.__getitem__, Tensor.__setitem__):
        where = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(
            isinstance(x, DeviceTensor) and (x.held.dtype is torch.bool or not x.held.dim()) for x in where
        )
    return False


def _open(tree: Any) -> Any:
    return tree_map(lambda x: x.held if isinstance(x, DeviceTensor) else x, tree)


def _close(tree: Any, mine: Mapping[int, DeviceTensor], on_device: bool) -> Any:
    if isinstance(tree, torch.Size):
        return tree

    def close(x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, DeviceTensor):
            return x
        if not on_device:
            return x
        return mine[id(x)] if id(x) in mine else DeviceTensor(x)

    return tree_map(close, tree)


def _argument(x: Any) -> Any:
    """An argument of a kernel as the interpreter can take it."""
    if isinstance(x, DeviceTensor):
        return x.held
    if isinstance(x, Tensor):
        raise RuntimeError(f"Triton: expected tensors on {DEVICE}, found one on {x.device}")
    if isinstance(x, tuple | list):
        return type(x)(_argument(e) for e in x)
    if type(x).__name__ == "TensorWrapper":  # what triton.reinterpret makes
        return type(x)(_argument(x.base), x.dtype)
    if type(x).__name__ == "TensorDescriptor":
        return type(x)(_argument(x.base), x.shape, x.strides, x.block_shape)
    return x


class _Stream:
    """Everything is done when it is asked for, so streams and events have nothing to wait for."""

    device_index = 0
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def _nothing(self, *_: Any, **__: Any) -> None: ...

    wait_event = wait_stream = record = wait = synchronize = _nothing


_CUDA = {
    "current_device": lambda: DEVICE.index,
    "current_stream": lambda device=None: _Stream(),
    "is_current_stream_capturing": lambda: False,
    "stream": lambda stream: nullcontext(),
    "synchronize": lambda device=None: None,
    "Stream": _Stream,
    "Event": _Stream,
}
"""What takes the place of functions of `torch.cuda`."""


@contextmanager
def stand_in_gpu() -> Iterator[StandIn]:
    """Inside the block ``cuda:0`` exists. `torch.cuda.is_available()` stays as it is."""
    global _current
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        opened = [_argument(a) for a in args], {k: _argument(v) for k, v in kwargs.items()}
        with torch._C.DisableTorchFunction():
            return launch(self, *opened[0], **opened[1])

    previous, _current = _current, StandIn()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **_CUDA))
        stack.enter_context(mock.patch.object(GridExecutor, "__call__", run))
        stack.enter_context(_triton.force_chip(_triton.INTERPRETER))
        stack.enter_context(_Mode())
        try:
            yield _current
        finally:
            _current = previous

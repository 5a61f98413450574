# SPDX-License-Identifier: Apache-2.0
"""Which backend serves an op on this machine, and why each other one was passed over.

What exists says `glimpse_kernels.support`.

Environment: ``GLIMPSE_BACKEND`` in {auto, naive, cpu, triton, cuda}, or several of them with commas between, of which the first
that can serve does ("cuda,triton"). No other one ever does: an op that none of them can serve raises `UnsupportedError`. Under
``auto`` the first usable backend in `PREFERENCE` order serves, of several GPU kernels the one that was the fastest on this GPU
at about this size (`glimpse_kernels.measured`). Where only the definition is left, that is logged once with its reason. A GPU
kernel that has never passed its tests on a GPU (`glimpse_kernels.proof`) is not chosen under ``auto``.

With Triton's interpreter on (``TRITON_INTERPRET=1``), ``triton`` can be forced on CPU tensors, and ``cuda`` with the
emulation on (``GLIMPSE_CUDA_EMULATED=1``): for tests.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from glimpse_kernels import _cuda, _ext, _triton, measured, proof
from glimpse_kernels.measured import dtype_name
from glimpse_kernels.support import BACKENDS, BY_OP, FLOATS, KERNEL_FLOATS, TABLE, Support, table_markdown

__all__ = [
    "BACKENDS",
    "FLOATS",
    "KERNEL_FLOATS",
    "PREFERENCE",
    "Support",
    "UnsupportedError",
    "choose",
    "explain",
    "force_backend",
    "forced_backend",
    "ops",
    "select",
    "support_table",
    "table_markdown",
]

logger = logging.getLogger("glimpse_kernels")

PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "naive"), "cuda": ("triton", "cuda", "naive")}
"""By device type, for lack of a measurement (`glimpse_kernels.measured`). A device that is not named here has the definitions
only. Triton stands before CUDA C++: it compiles for the very GPU and sizes it is given and serves where nothing was built; the
CUDA C++ kernels are there for the calls that are short or scattered, and where that pays is for a measurement to say."""


class UnsupportedError(TypeError):
    """No usable kernel for this op, device and dtype (or for the forced backend). The message lists what was tried."""


BackendFn = Callable[..., Any]

_cache: dict[tuple[object, ...], BackendFn] = {}
_logged: set[str] = set()


def _checked(where: str, name: str) -> str:
    """ "auto", or names of `BACKENDS` with commas between."""
    names = [part.strip() for part in name.lower().split(",")]
    if names != ["auto"] and not set(names) <= set(BACKENDS):
        raise ValueError(f"{where}: expected one of auto, {', '.join(BACKENDS)}; found {name.strip()!r}")
    return ",".join(names)


def _from_environment() -> str:
    return _checked("GLIMPSE_BACKEND", os.environ.get("GLIMPSE_BACKEND", "").strip() or "auto")


_forced: str = _from_environment()


def support_table() -> tuple[Support, ...]:
    """Every (op, backend, device, dtypes) this version of the package has a kernel for."""
    return TABLE


def ops() -> tuple[str, ...]:
    """Names of all ops in table order."""
    return tuple(BY_OP)


def forced_backend() -> str:
    """The backend in force: "auto", or what GLIMPSE_BACKEND or `force_backend` names, with commas between."""
    return _forced


@contextmanager
def force_backend(name: str) -> Iterator[None]:
    """Use only this backend inside the block, of several ("cuda,triton") the first one that can serve the op ("auto": the normal
    choice). For tests and benchmarks; not thread-safe."""
    global _forced
    previous = _forced
    _forced = _checked("force_backend: name", name)
    _cache.clear()
    try:
        yield
    finally:
        _forced = previous
        _cache.clear()


def _module_name(row: Support) -> str:
    return f"glimpse_kernels.{row.folder}.{row.backend}"


def _judge(row: Support, device: str, dtype: torch.dtype, grad: bool) -> tuple[bool, str]:
    """Whether this row serves the request on this machine, and the reason in words."""
    on_host = device == "cpu" and (
        (row.backend == "triton" and _triton.interpreting()) or (row.backend == "cuda" and _cuda.emulating())
    )
    if row.device not in ("any", device) and not on_host:
        return False, f"runs on {row.device} tensors, not on {device}"
    if row.dtypes is not None and dtype not in row.dtypes:
        words = ", ".join(dtype_name(d) for d in row.dtypes)
        return False, f"has no {dtype_name(dtype)} kernel (has {words})"
    if grad and not row.grad:
        return False, "has no backward and autograd is recording"
    if row.backend == "cpu":
        module = _ext.compiled()
        if module is None:
            return False, f"compiled extension not available ({_ext.compiled_error()})"
        for symbol in row.symbols:
            if not hasattr(module, symbol):
                return False, f"compiled extension has no {symbol}"
        reason = f"C++ ({module.isa()})"
    elif row.backend == "triton":
        if _triton.missing():
            return False, _triton.missing()
        reason = "Triton, interpreted" if on_host else "Triton"
    elif row.backend == "cuda":
        if _cuda.missing():
            return False, _cuda.missing()
        for symbol in row.symbols:
            if not hasattr(_cuda.module(), symbol):
                return False, f"compiled extension has no CUDA {symbol}"
        reason = "CUDA C++, emulated" if on_host else "CUDA C++"
    else:
        reason = "PyTorch definition"
    if importlib.util.find_spec(_module_name(row)) is None:
        return False, f"no module {_module_name(row)}"
    if (
        row.device == "cuda"
        and not on_host
        and row.backend not in _forced.split(",")
        and not proof.proven(row.op, row.backend)
    ):
        return False, (
            "never run on a GPU yet (docs/gpu-status.md); "
            f"GLIMPSE_BACKEND={row.backend} takes it all the same"
        )
    return True, reason


def _device_type(device: torch.device | str) -> str:
    return device.type if isinstance(device, torch.device) else torch.device(device).type


def explain(
    op: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    grad: bool = False,
    size: Sequence[int] = (),
) -> list[tuple[str, bool, str]]:
    """(backend, usable, reason) of every backend, in the order in which they are preferred on this device for a call of this
    size (see `select`)."""
    if op not in BY_OP:
        raise ValueError(f"explain: op: expected one of {', '.join(BY_OP)}; found {op!r}")
    kind = _device_type(device)
    first = PREFERENCE.get(kind, ("naive",))
    order = (*first, *(b for b in BACKENDS if b not in first))
    rows = {row.backend: row for row in BY_OP[op]}
    result = []
    for backend in order:
        if backend in rows:
            result.append((backend, *_judge(rows[backend], kind, dtype, grad)))
        else:
            result.append((backend, False, "no kernel for this op"))
    if kind == "cuda" and _forced == "auto":
        result = measured.fastest_first(torch.device(device).index, op, dtype, size, result)
    return result


def _log_once(key: str, message: str) -> None:
    if key not in _logged:
        _logged.add(key)
        logger.warning(message)


def _report_fallback(
    op: str, kind: str, dtype: torch.dtype, verdicts: list[tuple[str, bool, str]], grad: bool
) -> None:
    """Say once that a slower backend serves although the table has a faster one for this device."""
    if grad:  # training asks for the definitions, nothing is lost
        return
    rows = {row.backend: row for row in BY_OP[op]}
    backend, usable, reason = next(verdict for verdict in verdicts if verdict[0] in rows)
    if usable:
        return
    if backend == "cpu" and _ext.compiled() is None:
        _log_once(
            "no extension",
            f"glimpse_kernels: compiled CPU kernels not available ({_ext.compiled_error()}); "
            "using PyTorch definitions, slower",
        )
        return
    _log_once(
        f"{op} {kind} {dtype}",
        f"glimpse_kernels: {op} on {kind} in {dtype_name(dtype)}: backend {backend} passed over: {reason}; "
        "using the PyTorch definition, slower",
    )


def choose(
    op: str,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    grad: bool = False,
    size: Sequence[int] = (),
) -> str:
    """Name of the backend that serves this request. UnsupportedError if there is none."""
    kind = _device_type(device)
    verdicts = explain(op, device, dtype, grad=grad, size=size)
    if _forced == "auto":
        allowed = PREFERENCE.get(kind, ("naive",))
        for position, (backend, usable, _) in enumerate(verdicts):
            if usable and backend in allowed:
                if position and backend == "naive":
                    _report_fallback(op, kind, dtype, verdicts, grad)
                return backend
    else:
        here = [backend for backend, usable, _ in verdicts if usable]
        for backend in _forced.split(","):
            if backend in here:
                return backend
    wanted = "a backend" if _forced == "auto" else f"backend {_forced} (forced)"
    tried = "; ".join(f"{backend}: {reason}" for backend, usable, reason in verdicts if not usable)
    raise UnsupportedError(
        f"{op}: expected {wanted} for {dtype_name(dtype)} on {kind}, found none usable: {tried}"
    )


def select(
    op: str,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    grad: bool = False,
    size: Sequence[int] = (),
) -> BackendFn:
    """The function that serves `op` for this device and dtype, cached.

    grad: autograd is recording (`_tensors.needs_grad`), so only a differentiable backend will do.
    size: of a call on a GPU, the op's own numbers from shapes and capacities, at least 0; the measurements that choose among
        several kernels are kept by the nearest powers of two.
    Raises UnsupportedError (a TypeError) if no backend, or not the forced one, can serve.
    """
    kind = device.type if isinstance(device, torch.device) else _device_type(device)
    key: tuple[object, ...] = (op, kind, dtype, grad)
    if size:
        key = (*key, device, measured.buckets(size))
    found = _cache.get(key)
    if found is None:
        backend = choose(op, device, dtype, grad=grad, size=size)
        row = next(r for r in BY_OP[op] if r.backend == backend)
        found = getattr(importlib.import_module(_module_name(row)), op)
        if row.device == "cuda" and kind == "cuda" and torch.cuda.device_count() > 1:
            found = _on_the_device_of_its_tensors(found)
        _cache[key] = found
    return found


def _on_the_device_of_its_tensors(serve: BackendFn) -> BackendFn:
    """Kernels are launched on the current device, whichever GPU the tensors are on. With one GPU there is nothing to choose."""

    @functools.wraps(serve)
    def run(*args: Any, **kwargs: Any) -> Any:
        # The first tensor, or the first one of a list: all are on one device (`_tensors.expect_same_device`).
        given = (t for a in args for t in (a if isinstance(a, list | tuple) else (a,)))
        device = next((t.device for t in given if isinstance(t, torch.Tensor)), None)
        with torch.cuda.device(device):
            return serve(*args, **kwargs)

    return run

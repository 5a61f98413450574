# SPDX-License-Identifier: Apache-2.0
"""Which backend serves an op on this machine, and why each other one was passed over.

The support table below is the only place that knows what exists; tests and docs/kernels.md are generated from it.
A backend of an op lives in ``glimpse_kernels/<folder>/<backend>.py`` as a function of the op's name.

Environment: ``GLIMPSE_BACKEND`` in {auto, naive, cpu, triton, cuda}. A forced backend never falls back: an op it cannot
serve raises `UnsupportedError`. Under ``auto`` the first usable backend in `PREFERENCE` order serves; when it is
not the fastest one the table lists for the device, that is logged once with its reason. A GPU kernel that has never passed its
tests on a GPU (`glimpse_kernels.proof`) is not chosen under ``auto``.

With Triton's interpreter on (``TRITON_INTERPRET=1``), ``triton`` can be forced on CPU tensors: for tests.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from glimpse_kernels import _ext, _triton, proof

logger = logging.getLogger("glimpse_kernels")

BACKENDS: tuple[str, ...] = ("cuda", "triton", "cpu", "naive")
PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "naive"), "cuda": ("cuda", "triton", "naive")}
"""Fastest first, by device type. A device that is not named here has the definitions only."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_FLOATS = (torch.float32, torch.bfloat16)
"""dtypes of the C++ kernels; the Triton kernels have all of `FLOATS`."""


class UnsupportedError(TypeError):
    """No usable kernel for this op, device and dtype (or for the forced backend). The message lists what was tried."""


@dataclass(frozen=True)
class Support:
    """One row of the support table.

    op: public name. backend: one of `BACKENDS`. device: torch device type, "any" for the definitions.
    dtypes: of the op's main tensor; None = any dtype. folder: package under glimpse_kernels. symbols: functions that
    the compiled extension must have. grad: whether autograd can go through it.
    """

    op: str
    backend: str
    device: str
    dtypes: tuple[torch.dtype, ...] | None
    folder: str
    symbols: tuple[str, ...] = ()
    grad: bool = False


def _rows(
    op: str,
    *,
    folder: str | None = None,
    symbols: tuple[str, ...] | None = None,
    naive: tuple[torch.dtype, ...] | None = FLOATS,
    cpu: tuple[torch.dtype, ...] | None = KERNEL_FLOATS,
    triton: tuple[torch.dtype, ...] | None = FLOATS,
    without: tuple[str, ...] = (),
) -> tuple[Support, ...]:
    folder = folder or op
    rows = (
        Support(op, "triton", "cuda", triton, folder),
        Support(op, "cpu", "cpu", cpu, folder, (op,) if symbols is None else symbols),
        Support(op, "naive", "any", naive, folder, grad=True),
    )
    return tuple(row for row in rows if row.backend not in without)


_TABLE: tuple[Support, ...] = (
    *_rows("attention"),
    *_rows("decode_attention"),
    *_rows("glimpse_scores"),
    *_rows("received_attention", without=("cpu",)),
    *_rows("last_row_attention", without=("cpu",)),
    *_rows("vip_conditions", folder="vip", symbols=("linear",)),
    *_rows("vip", symbols=("linear", "rms_norm", "rope", "attention")),
    *_rows("select_tokens", naive=(torch.float32,), cpu=(torch.float32,), triton=(torch.float32,)),
    *_rows("compact", naive=None, cpu=None, triton=None),
    *_rows("rope"),
    *_rows("rms_norm"),
    *_rows("swiglu"),
    *_rows("linear"),
    *_rows("linear_group", folder="linear", symbols=("linear",)),
    *_rows("gated_linear", folder="linear", symbols=("linear",)),
    *_rows("patchify", naive=(torch.uint8,), cpu=(torch.uint8,), triton=(torch.uint8,)),
)

_BY_OP: dict[str, tuple[Support, ...]] = {}
for _row in _TABLE:
    _BY_OP[_row.op] = (*_BY_OP.get(_row.op, ()), _row)

BackendFn = Callable[..., Any]

_cache: dict[tuple[str, str, torch.dtype, bool], BackendFn] = {}
_logged: set[str] = set()


def _from_environment() -> str:
    name = os.environ.get("GLIMPSE_BACKEND", "auto").strip().lower() or "auto"
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"GLIMPSE_BACKEND: expected one of auto, {', '.join(BACKENDS)}; found {name!r}")
    return name


_forced: str = _from_environment()


def support_table() -> tuple[Support, ...]:
    """Every (op, backend, device, dtypes) this version of the package has a kernel for."""
    return _TABLE


def ops() -> tuple[str, ...]:
    """Names of all ops in table order."""
    return tuple(_BY_OP)


def forced_backend() -> str:
    """The backend in force: "auto", or the name given by GLIMPSE_BACKEND or `force_backend`."""
    return _forced


@contextmanager
def force_backend(name: str) -> Iterator[None]:
    """Use only this backend inside the block ("auto": the normal choice). For tests and benchmarks; not thread-safe."""
    global _forced
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"force_backend: name: expected one of auto, {', '.join(BACKENDS)}; found {name!r}")
    previous = _forced
    _forced = name
    _cache.clear()
    try:
        yield
    finally:
        _forced = previous
        _cache.clear()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _module_name(row: Support) -> str:
    return f"glimpse_kernels.{row.folder}.{row.backend}"


def _judge(row: Support, device: str, dtype: torch.dtype, grad: bool) -> tuple[bool, str]:
    """Whether this row serves the request on this machine, and the reason in words."""
    interpreted = row.backend == "triton" and device == "cpu" and _triton.interpreting()
    if row.device not in ("any", device) and not interpreted:
        return False, f"runs on {row.device} tensors, not on {device}"
    if row.dtypes is not None and dtype not in row.dtypes:
        words = ", ".join(_dtype_name(d) for d in row.dtypes)
        return False, f"has no {_dtype_name(dtype)} kernel (has {words})"
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
        reason = "Triton, interpreted" if interpreted else "Triton"
        if not interpreted and _forced != "triton" and not proof.proven(row.op, row.backend):
            return (
                False,
                "never run on a GPU yet (docs/gpu-status.md); GLIMPSE_BACKEND=triton takes it all the same",
            )
    else:
        reason = "PyTorch definition"
    if importlib.util.find_spec(_module_name(row)) is None:
        return False, f"no module {_module_name(row)}"
    return True, reason


def _device_type(device: torch.device | str) -> str:
    return device.type if isinstance(device, torch.device) else torch.device(device).type


def explain(
    op: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, *, grad: bool = False
) -> list[tuple[str, bool, str]]:
    """(backend, usable, reason) of every backend, in the order in which they are preferred on this device."""
    if op not in _BY_OP:
        raise ValueError(f"explain: op: expected one of {', '.join(_BY_OP)}; found {op!r}")
    kind = _device_type(device)
    first = PREFERENCE.get(kind, ("naive",))
    order = (*first, *(b for b in BACKENDS if b not in first))
    rows = {row.backend: row for row in _BY_OP[op]}
    result = []
    for backend in order:
        if backend in rows:
            result.append((backend, *_judge(rows[backend], kind, dtype, grad)))
        else:
            result.append((backend, False, "no kernel for this op"))
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
    rows = {row.backend: row for row in _BY_OP[op]}
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
        f"glimpse_kernels: {op} on {kind} in {_dtype_name(dtype)}: backend {backend} passed over: {reason}; "
        "using the PyTorch definition, slower",
    )


def choose(op: str, device: torch.device | str, dtype: torch.dtype, *, grad: bool = False) -> str:
    """Name of the backend that serves this request. UnsupportedError if there is none."""
    kind = _device_type(device)
    verdicts = explain(op, kind, dtype, grad=grad)
    if _forced == "auto":
        allowed = PREFERENCE.get(kind, ("naive",))
        for position, (backend, usable, _) in enumerate(verdicts):
            if usable and backend in allowed:
                if position:
                    _report_fallback(op, kind, dtype, verdicts, grad)
                return backend
    elif any(backend == _forced and usable for backend, usable, _ in verdicts):
        return _forced
    wanted = "a backend" if _forced == "auto" else f"backend {_forced} (forced)"
    tried = "; ".join(f"{backend}: {reason}" for backend, usable, reason in verdicts if not usable)
    raise UnsupportedError(
        f"{op}: expected {wanted} for {_dtype_name(dtype)} on {kind}, found none usable: {tried}"
    )


def select(op: str, device: torch.device | str, dtype: torch.dtype, *, grad: bool = False) -> BackendFn:
    """The function that serves `op` for this device and dtype, cached.

    grad: autograd is recording (`_tensors.needs_grad`), so only a differentiable backend will do.
    Raises UnsupportedError (a TypeError) if no backend, or not the forced one, can serve.
    """
    kind = device.type if isinstance(device, torch.device) else _device_type(device)
    key = (op, kind, dtype, grad)
    found = _cache.get(key)
    if found is None:
        backend = choose(op, kind, dtype, grad=grad)
        row = next(r for r in _BY_OP[op] if r.backend == backend)
        found = getattr(importlib.import_module(_module_name(row)), op)
        if backend == "triton" and kind == "cuda" and torch.cuda.device_count() > 1:
            found = _on_the_device_of_its_tensors(found)
        _cache[key] = found
    return found


def _on_the_device_of_its_tensors(serve: BackendFn) -> BackendFn:
    """Triton launches on the current device, whichever GPU the tensors are on. With one GPU there is nothing to choose."""

    @functools.wraps(serve)
    def run(*args: Any, **kwargs: Any) -> Any:
        # The first tensor, or the first one of a list: all are on one device (`_tensors.expect_same_device`).
        given = (t for a in args for t in (a if isinstance(a, list | tuple) else (a,)))
        device = next((t.device for t in given if isinstance(t, torch.Tensor)), None)
        with torch.cuda.device(device):
            return serve(*args, **kwargs)

    return run


def table_markdown() -> str:
    """The support table as Markdown, one row an op (docs/kernels.md holds it, a test compares)."""

    def cell(op: str, backend: str) -> str:
        for row in _BY_OP[op]:
            if row.backend == backend:
                return "any dtype" if row.dtypes is None else ", ".join(_dtype_name(d) for d in row.dtypes)
        return "–"

    backends = [b for b in reversed(BACKENDS) if any(row.backend == b for row in _TABLE)]
    names = {"naive": "naive (any device)", "cpu": "cpu (C++)", "triton": "triton (CUDA)", "cuda": "cuda"}
    lines = ["| op | " + " | ".join(names[b] for b in backends) + " |", "| --- |" + " --- |" * len(backends)]
    lines += [f"| `{op}` | " + " | ".join(cell(op, b) for b in backends) + " |" for op in _BY_OP]
    return "\n".join(lines)

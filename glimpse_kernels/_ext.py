# SPDX-License-Identifier: Apache-2.0
"""The compiled extension, if this installation has one.

Nothing else imports ``glimpse_kernels._C``: a missing or unloadable extension is a fact to report, not an error
at import time.
"""

from __future__ import annotations

import importlib
import os
from functools import lru_cache
from types import ModuleType

import torch

ISAS: tuple[str, ...] = ("avx512bf16", "avx512", "avx2", "baseline")
"""Instruction sets the extension may be compiled for, best first."""


def _check_environment() -> None:
    name = os.environ.get("GLIMPSE_CPU_ISA", "auto").strip().lower() or "auto"
    if name not in ("auto", *ISAS):
        raise ValueError(f"GLIMPSE_CPU_ISA: expected one of auto, {', '.join(ISAS)}; found {name!r}")


MAX_THREADS = 1024


def requested_threads() -> int | None:
    """`GLIMPSE_NUM_THREADS`; None where it is not set. ValueError if it is no number of threads."""
    text = os.environ.get("GLIMPSE_NUM_THREADS", "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MAX_THREADS):
        raise ValueError(
            f"GLIMPSE_NUM_THREADS: expected a whole number from 1 to {MAX_THREADS}, found {text!r}"
        )
    return int(text)


def set_num_threads(number: int) -> None:
    """The number for torch and, with it, for the kernels."""
    torch.set_num_threads(number)
    module = compiled()
    if module is not None:
        _follow_torch(module)


def _follow_torch(module: ModuleType) -> None:
    """On torch's OpenMP threads kernels take torch's number by themselves; a pool of their own has to be told."""
    if module.thread_pool() == "own threads":
        module.set_num_threads(torch.get_num_threads())


_check_environment()
if (_wanted := requested_threads()) is not None:
    torch.set_num_threads(_wanted)


@lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module("glimpse_kernels._C")
        _follow_torch(module)
        return module, ""
    except ImportError as error:
        # a wish that this machine cannot serve is no missing extension
        if str(error).startswith("GLIMPSE_CPU_ISA"):
            raise ValueError(str(error)) from error
        return None, str(error)


def compiled() -> ModuleType | None:
    """The extension module, or None if it is not there."""
    return _load()[0]


def compiled_error() -> str:
    """Why `compiled()` is None; empty when it is not."""
    return _load()[1]


def extension() -> ModuleType:
    """The extension module. ImportError with the reason if it is not there."""
    module, reason = _load()
    if module is None:
        raise ImportError(f"glimpse_kernels: the compiled extension is not available: {reason}")
    return module

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

ISAS: tuple[str, ...] = ("avx512bf16", "avx512", "avx2", "baseline")
"""Instruction sets the extension may be compiled for, best first."""


def _check_environment() -> None:
    name = os.environ.get("GLIMPSE_CPU_ISA", "auto").strip().lower() or "auto"
    if name not in ("auto", *ISAS):
        raise ValueError(f"GLIMPSE_CPU_ISA: expected one of auto, {', '.join(ISAS)}; found {name!r}")


_check_environment()


@lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("glimpse_kernels._C"), ""
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

# SPDX-License-Identifier: Apache-2.0
"""What the CUDA C++ kernels share: the module that holds them, whether they can run, and the stream they run on.

They are the submodule ``cuda`` of the compiled extension. For tests, ``GLIMPSE_CUDA_EMULATED=1`` before this package is imported takes
``glimpse_kernels._emulated`` in its place, where the same source runs on the host, thread by thread: slow, but the same code
(csrc/cuda/kernel.cuh).
"""

from __future__ import annotations

import importlib
import os
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from glimpse_kernels import _ext


@lru_cache(maxsize=1)
def emulating() -> bool:
    """Whether CUDA kernels of this process run on the host: that was asked for, and the emulation is built."""
    return _wished() and not missing()


def _wished() -> bool:
    wish = os.environ.get("GLIMPSE_CUDA_EMULATED", "").strip()
    if wish not in ("", "0", "1"):
        raise ValueError(f"GLIMPSE_CUDA_EMULATED: expected 0 or 1, found {wish!r}")
    return wish == "1"


@lru_cache(maxsize=1)
def module() -> ModuleType:
    """The module with a function for each op that has a CUDA kernel. ImportError with the reason if there is none."""
    if _wished():
        return importlib.import_module("glimpse_kernels._emulated")
    found: ModuleType | None = getattr(_ext.extension(), "cuda", None)
    if found is None:
        raise ImportError(
            f"glimpse_kernels: the extension has no CUDA kernels: {_ext.extension().cuda_build}"
        )
    return found


def missing() -> str:
    """Why CUDA kernels cannot run in this process on the current device; empty where they can."""
    try:
        return module().missing() or ""
    except ImportError as error:
        return str(error)


def stream(t: Tensor) -> int:
    """The current stream of this tensor's device, as the kernels take it."""
    if emulating():
        return 0
    device = t.device.index
    return int(torch._C._cuda_getCurrentRawStream(torch.cuda.current_device() if device is None else device))

# SPDX-License-Identifier: Apache-2.0
"""The kernels of one op beside each other: which of them run here, and a call by one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from bench.gpu_facts import GPU_BACKENDS
from glimpse_kernels import dispatch

R = TypeVar("R")


def backends(op: str) -> tuple[str, ...]:
    """Those of `GPU_BACKENDS` that the support table has for the op."""
    there = {row.backend for row in dispatch.support_table() if row.op == op}
    return tuple(backend for backend in GPU_BACKENDS if backend in there)


def reason_against(op: str, backend: str, device: str) -> str:
    """Why this backend cannot serve the op on this type of device, even when it is forced; empty if it can."""
    row = next(row for row in dispatch.support_table() if (row.op, row.backend) == (op, backend))
    dtype = row.dtypes[0] if row.dtypes else torch.float32
    with dispatch.force_backend(backend):
        return next(
            "" if usable else reason
            for name, usable, reason in dispatch.explain(op, device, dtype)
            if name == backend
        )


def usable(op: str, device: str) -> tuple[str, ...]:
    """The kernels of the op that run here if they are forced, proven or not."""
    return tuple(backend for backend in backends(op) if not reason_against(op, backend, device))


def forced(backend: str, call: Callable[[], R]) -> Callable[[], R]:
    """The call, with every op inside it by this backend. What it costs to force one is part of a call from Python, not of a graph."""

    def run() -> R:
        with dispatch.force_backend(backend):
            return call()

    return run

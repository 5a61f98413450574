# SPDX-License-Identifier: Apache-2.0
"""A run of op calls, recorded once and run again in a single call: on the CPU what a CUDA graph is on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import TracebackType

import torch
from torch import Tensor

from glimpse_kernels import _ext, dispatch

__all__ = ["Recording", "available", "unavailable"]


def unavailable(
    device: torch.device | str = "cpu", dtype: torch.dtype | None = None, ops: Sequence[str] = ()
) -> str:
    """Why calls on this device cannot be recorded; "" if they can.

    With `dtype` and `ops`: also why one of these ops is not served by the compiled kernels, which alone are recorded.
    """
    kind = torch.device(device).type
    if kind != "cpu":
        return f"recordings are of CPU kernels, not of {kind} ones"
    if dispatch.forced_backend() not in ("auto", "cpu"):
        return f"backend {dispatch.forced_backend()} is forced; only the compiled kernels are recorded"
    module = _ext.compiled()
    if module is None:
        return f"compiled extension not available ({_ext.compiled_error()})"
    if not hasattr(module, "Recording"):
        return "compiled extension has no Recording"
    return _unserved(kind, dtype or torch.float32, tuple(ops))


@lru_cache
def _unserved(kind: str, dtype: torch.dtype, ops: tuple[str, ...]) -> str:
    """What `explain` says of the first op without a compiled kernel; it is asked for each decoding, and nothing of it changes."""
    for op in ops:
        for backend, usable, reason in dispatch.explain(op, kind, dtype):
            if backend == "cpu" and not usable:
                return f"{op}: {reason}"
    return ""


def available(
    device: torch.device | str = "cpu", dtype: torch.dtype | None = None, ops: Sequence[str] = ()
) -> bool:
    """Whether `Recording` works here; `unavailable` has the reason if it does not."""
    return not unavailable(device, dtype, ops)


class Recording:
    """Op calls of one thread, to be run again without Python between them.

        with Recording() as steps:                 # runs and records
            rms_norm(x, weight, 1e-6, out=y)
            swiglu(y, y, out=z)
        x.copy_(other)
        steps.replay()                             # y and z again, from what x holds now

    Inside the block every op that a compiled kernel serves runs as always and is recorded: which kernel, and the
    *addresses*, sizes and numbers it was given. A replay reads and writes the same memory again. So:

    - Tensors must outlive the recording; `keep` holds on to them. Give `out=`: a result that the op allocates is
      written to again by every replay, but nothing but the caller's own reference keeps its memory.
    - What differs between replays must lie in tensors (lengths, slots, tables). Shapes and Python numbers are frozen.
    - Whatever is no compiled kernel (torch's own operations, definitions in PyTorch, the copy that an op makes of a
      tensor with strides it cannot take) runs, but is NOT recorded. `ops` says what was.
    - `compact` cannot be recorded and raises TypeError inside the block. Recordings do not nest (ValueError).

    Only the thread that entered the block records. Replays use the instruction set and the number of threads in force
    at that time, run on any thread, and release the GIL; two at once are the caller's race, as two calls of an op on
    the same tensors would be. If the block raises, nothing is kept and the thread does not record any more.

    Raises:
        UnsupportedError: there is nothing to record here (`unavailable`).
    """

    def __init__(self) -> None:
        reason = unavailable()
        if reason:
            raise dispatch.UnsupportedError(f"Recording: {reason}")
        self._calls = _ext.extension().Recording()
        self._kept: list[Tensor] = []

    def __enter__(self) -> Recording:
        """Start to record. ValueError if this thread records already, or if this recording was made already."""
        self._calls.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._calls.end()
        else:
            self._calls.clear()

    def keep(self, *tensors: Tensor) -> None:
        """Hold references to tensors whose memory the recorded calls use."""
        self._kept.extend(tensors)

    def replay(self) -> None:
        """Run all recorded calls in order.

        Raises:
            ValueError, TypeError, MemoryError: what the first failing op raises, with its number and name; or nothing was
                recorded yet.
        """
        self._calls.replay()

    @property
    def ops(self) -> tuple[str, ...]:
        """Names of the recorded kernels, in order (those of the C interface: `linear_group` is a `linear`)."""
        return tuple(self._calls.ops())

    def __len__(self) -> int:
        return len(self._calls)

# SPDX-License-Identifier: Apache-2.0
"""The gated activation of the MLPs."""

from __future__ import annotations

from torch import Tensor

from glimpse_kernels import _tensors as check
from glimpse_kernels import dispatch

__all__ = ["swiglu"]


def swiglu(gate: Tensor, up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up, element by element (Shazeer, arXiv:2002.05202, section 2).

    gate, up: [T, I], float32, bfloat16 or (not in C++) float16, both of one dtype; last dimension contiguous,
        row stride free, so that both may be halves of one fused GEMM output. out: [T, I] of their dtype; may be gate or up.

    Returns out. Computed in fp32 and rounded once.

    Raises TypeError / ValueError for a wrong dtype / shape, UnsupportedError if no backend serves the dtype or device.
    """
    # The usual call, in as few looks at the tensors as it takes: one decoded token is less work than the full checks.
    if not (isinstance(gate, Tensor) and isinstance(up, Tensor)):
        check.expect_tensors("swiglu", gate=gate, up=up)
    device = gate.device
    if not (
        out is None
        and up.device == device
        and gate.dim() == 2
        and gate.shape == up.shape
        and gate.dtype is up.dtype
        and gate.stride()[1] == 1
        and up.stride()[1] == 1
    ):
        _check(gate, up, out)
    serve = dispatch.select("swiglu", device, gate.dtype, grad=check.needs_grad(gate, up))
    return serve(gate, up, out=out)


def _check(gate: Tensor, up: Tensor, out: Tensor | None) -> None:
    op = "swiglu"
    check.expect_shape(op, "gate", gate, (None, None), "[T, I]")
    check.expect_shape(op, "up", up, gate.shape, "[T, I]")
    check.expect_dtype(op, "up", up, gate.dtype)
    if out is not None:
        check.expect_shape(op, "out", out, gate.shape, "[T, I]")
        check.expect_dtype(op, "out", out, gate.dtype)
    check.expect_last_contiguous(op, gate=gate, up=up, out=out)
    check.expect_same_device(op, gate.device, up=up, out=out)

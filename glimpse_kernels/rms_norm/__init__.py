# SPDX-License-Identifier: Apache-2.0
"""Root-mean-square norm, with the residual addition in front of it."""

from __future__ import annotations

from torch import Tensor

from glimpse_kernels import _tensors as check
from glimpse_kernels import dispatch

__all__ = ["rms_norm"]


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich, arXiv:1910.07467, section 4).

    With `residual`: residual += x first, in place and rounded once to its dtype; the norm of the new residual is returned.

    x: [..., C], float32, bfloat16 or (not in C++) float16; a leading [T] of any stride, last dimension
        contiguous. weight: [C] of x's dtype. eps: added to the mean square.
    residual: shape and dtype of x, overwritten. out: shape and dtype of x; may be x itself, not the residual.

    Returns out. The mean square is taken in fp32; the normalised value is rounded to the dtype before it is multiplied
    by the weight, as Hugging Face's Qwen2RMSNorm does.

    Raises TypeError / ValueError for a wrong dtype / shape, UnsupportedError if no backend serves the dtype or device.
    """
    # The usual call, in as few looks at the tensors as it takes: one decoded token is less work than the full checks.
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor)):
        check.expect_tensors("rms_norm", x=x, weight=weight)
    device = x.device
    if not (
        out is None
        and weight.device == device
        and x.dim() == 2
        and weight.shape == x.shape[1:]
        and weight.dtype is x.dtype
        and x.stride()[1] == 1
        and weight.is_contiguous()
        and (
            residual is None
            or (
                residual.device == device
                and residual.shape == x.shape
                and residual.dtype is x.dtype
                and residual.stride()[1] == 1
            )
        )
    ):
        _check(x, weight, residual, out)
    serve = dispatch.select("rms_norm", device, x.dtype, grad=check.needs_grad(x, weight, residual))
    return serve(x, weight, eps, residual=residual, out=out)


def _check(x: Tensor, weight: Tensor, residual: Tensor | None, out: Tensor | None) -> None:
    op = "rms_norm"
    if x.dim() < 1:
        raise ValueError(f"{op}: x: expected shape [..., C], found {check.describe(x)}")
    check.expect_shape(op, "weight", weight, (x.shape[-1],), "[C]")
    check.expect_dtype(op, "weight", weight, x.dtype)
    for name, t in (("residual", residual), ("out", out)):
        if t is not None:
            check.expect_dtype(op, name, t, x.dtype)
            check.expect_shape(op, name, t, x.shape, "x's shape")
    check.expect_last_contiguous(op, x=x, weight=weight, residual=residual, out=out)
    check.expect_same_device(op, x.device, weight=weight, residual=residual, out=out)
    if out is not None and residual is not None and out.numel() and out.data_ptr() == residual.data_ptr():
        raise ValueError(
            f"{op}: out: expected other memory than residual, which holds the sum, found the same"
        )

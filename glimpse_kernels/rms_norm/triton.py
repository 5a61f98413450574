# SPDX-License-Identifier: Apache-2.0
"""`rms_norm` in Triton: a row lies in the registers of one program, so x and residual are read once.

Bytes decide: x, residual and weight in, residual and the result out. A thread has 16 values (two 16-byte vectors of a 16-bit
type) of each; with the 2048 threads that a multiprocessor holds, 64 KiB of loads are on their way at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from glimpse_kernels import _triton


@dataclass(frozen=True)
class Rows(_triton.Launch):
    """rows: that one program norms."""

    rows: int = 1


CONFIGS: _triton.Configs[Rows] = _triton.Configs(
    "rms_norm",
    {
        **{(80, 1 << p): Rows(warps=4, rows=2048 >> p) for p in range(11)},
        (80, 2048): Rows(warps=4),
        (80, 4096): Rows(warps=8),
        **{(80, 1 << p): Rows(warps=16) for p in range(13, 21)},
    },
    candidates=[Rows(warps=w, rows=r) for w in (1, 2, 4, 8, 16) for r in (1, 2, 4, 8, 16)],
)
"""By the columns, rounded up to a power of two."""


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    rows,
    inner,  # row r is (r // inner, r % inner) in two leading dimensions with a stride each
    cols,
    x_outer,
    x_inner,
    residual_outer,
    residual_inner,
    out_outer,
    out_inner,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    c = tl.arange(0, BLOCK_COLS)[None, :]
    live = (r < rows)[:, None] & (c < cols)
    outer, within = (r // inner).to(tl.int64)[:, None], (r % inner).to(tl.int64)[:, None]
    w = tl.load(weight + c, mask=c < cols, other=0.0)
    h = tl.load(x + outer * x_outer + within * x_inner + c, mask=live, other=0.0).to(tl.float32)
    if residual is not None:
        place = residual + outer * residual_outer + within * residual_inner + c
        total = (tl.load(place, mask=live, other=0.0).to(tl.float32) + h).to(residual.dtype.element_ty)
        tl.store(place, total, mask=live)
        h = total.to(tl.float32)
    h = h * tl.rsqrt(tl.sum(h * h, axis=1) / cols + eps)[:, None]
    y = h.to(out.dtype.element_ty).to(tl.float32) * w.to(tl.float32)
    tl.store(out + outer * out_outer + within * out_inner + c, y.to(out.dtype.element_ty), mask=live)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """See `glimpse_kernels.rms_norm`; arguments are checked there."""
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not x.numel():
        return out
    if x.dim() > 3:
        # Rows in more dimensions than the kernel knows strides for: what cannot be seen with fewer goes through a copy.
        flat = out.reshape(-1, *out.shape[-2:])
        total = None if residual is None else residual.reshape(flat.shape)
        _launch(x.reshape(flat.shape), weight, eps, total, flat)
        _write_back(flat, out)
        if residual is not None and total is not None:
            _write_back(total, residual)
    else:
        _launch(x, weight, eps, residual, out)
    return out


def _write_back(seen: Tensor, original: Tensor) -> None:
    """What was written to `seen`, if it is a copy."""
    if seen.data_ptr() != original.data_ptr():
        original.copy_(seen.view(original.shape))


def _launch(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, out: Tensor) -> None:
    shape = x.shape
    cols = shape[-1]
    inner = shape[1] if len(shape) == 3 else 1
    rows = x.numel() // cols
    block = _triton.power_of_2(cols)
    config = CONFIGS.pick(_triton.chip(x.device).capability, block)
    rms_norm_kernel[(triton.cdiv(rows, config.rows),)](
        x,
        residual,
        weight,
        out,
        rows,
        inner,
        cols,
        *_strides(x),
        *((0, 0) if residual is None else _strides(residual)),
        *_strides(out),
        eps,
        BLOCK_ROWS=config.rows,
        BLOCK_COLS=block,
        num_warps=config.warps,
        num_stages=config.stages,
    )


def _strides(t: Tensor) -> tuple[int, int]:
    """Of the leading dimensions, which may be none, one or two."""
    strides = t.stride()
    if len(strides) == 2:
        return strides[0], 0
    return (strides[0], strides[1]) if len(strides) == 3 else (0, 0)

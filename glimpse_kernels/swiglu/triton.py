# SPDX-License-Identifier: Apache-2.0
"""`swiglu` in Triton: three streams of bytes, one tile of rows by columns a program."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from glimpse_kernels import _triton


@dataclass(frozen=True)
class Tile(_triton.Launch):
    """rows, cols: of a program's tile; cols is cut to the matrix."""

    rows: int = 1
    cols: int = 1024


CONFIGS: _triton.Configs[Tile] = _triton.Configs(
    "swiglu",
    {(80, "row"): Tile(warps=4, rows=1, cols=1024), (80, "rows"): Tile(warps=4, rows=2, cols=1024)},
    candidates=[Tile(w, 2, r, c) for w in (2, 4, 8) for r in (1, 2, 4) for c in (512, 1024, 2048)],
)
"""By whether there is one row or more."""

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2_HIGH = tl.constexpr(0.693359375)  # of few bits, so that whole multiples of it are exact in fp32
LN_2_LOW = tl.constexpr(-2.1219444005469058e-4)
MOST = tl.constexpr(100.0)  # exp of it is infinite in fp32, exp of its negative nothing beside 1


@triton.jit
def silu(g):
    """g * sigmoid(g) in fp32, as exact where g is -80 as where it is 1.

    exp2 of t log2(e) would be off by the rounding of that product, 2^-24 of an exponent of up to 144. So the exponent is split
    into a whole number and a rest that is small (Cody and Waite, Software Manual for the Elementary Functions, chapter 6).
    """
    t = tl.minimum(tl.maximum(-g, -MOST), MOST)
    whole = tl.floor(t * LOG2_E + 0.5)
    rest = (t - whole * LN_2_HIGH) - whole * LN_2_LOW
    return g / (1.0 + tl.exp2(whole) * tl.exp2(rest * LOG2_E))


@triton.jit(do_not_specialize=["rows"])
def swiglu_kernel(
    gate,
    up,
    out,
    rows,
    chunks,  # columns, and strides, in units of VECTOR
    gate_chunks,
    up_chunks,
    out_chunks,
    VECTOR: tl.constexpr,
    VECTOR_BYTES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    cols = chunks * VECTOR
    blocks = tl.cdiv(cols, BLOCK_COLS)
    r = tl.program_id(0) // blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    c = tl.program_id(0) % blocks * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    live = (r < rows)[:, None] & (c < cols)[None, :]
    wide = r.to(tl.int64)[:, None]
    # Halves of a fused product need not start at 16 bytes; the compiler knows only of those that do.
    g_at = tl.multiple_of(gate + wide * (gate_chunks * VECTOR) + c[None, :], (1, VECTOR_BYTES))
    u_at = tl.multiple_of(up + wide * (up_chunks * VECTOR) + c[None, :], (1, VECTOR_BYTES))
    o_at = tl.multiple_of(out + wide * (out_chunks * VECTOR) + c[None, :], (1, VECTOR_BYTES))
    g = tl.load(g_at, mask=live, other=0.0).to(tl.float32)
    u = tl.load(u_at, mask=live, other=0.0).to(tl.float32)
    tl.store(o_at, (silu(g) * u).to(out.dtype.element_ty), mask=live)


def swiglu(gate: Tensor, up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """See `glimpse_kernels.swiglu`; arguments are checked there."""
    rows, cols = gate.shape
    if out is None:
        out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if not gate.numel():
        return out
    config = CONFIGS.pick(_triton.chip(gate.device).capability, "row" if rows == 1 else "rows")
    strides = (gate.stride(0), up.stride(0), out.stride(0)) if rows > 1 else (0, 0, 0)
    size = gate.element_size()
    # The widest vector, of 16 bytes at most, that every row of every tensor is made of.
    bits = (
        gate.data_ptr()
        | up.data_ptr()
        | out.data_ptr()
        | (strides[0] | strides[1] | strides[2] | cols) * size
        | 16
    )
    width = bits & -bits
    vector = width // size
    block = min(config.cols, _triton.power_of_2(cols))
    swiglu_kernel[(triton.cdiv(rows, config.rows) * triton.cdiv(cols, block),)](
        gate,
        up,
        out,
        rows,
        cols // vector,
        strides[0] // vector,
        strides[1] // vector,
        strides[2] // vector,
        VECTOR=vector,
        VECTOR_BYTES=width,
        BLOCK_ROWS=config.rows,
        BLOCK_COLS=block,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out

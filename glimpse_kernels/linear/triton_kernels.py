# SPDX-License-Identifier: Apache-2.0
"""The two kernels of `linear`, `linear_group` and `gated_linear`: one row of x by fused multiply-adds, more rows by tiles.

Both take up to four weights in one launch (the blocks of one follow those of the other), or two whose products meet in a
gate, and read every weight once. Loads run several steps ahead of the arithmetic (`STAGES`), through shared memory.

8-bit weights become floats without a rounding, as they are integers of at most 127; a run of products with one scale is
summed first and then scaled. No sum is split over programs, and none depends on the other outputs or rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from glimpse_kernels.swiglu.triton import silu

NONE, GELU, GATED = 0, 1, 2
_GELU, _GATED = tl.constexpr(GELU), tl.constexpr(GATED)
_SQRT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit
def _of(part, PARTS: tl.constexpr, a, b, c, d):
    """The one of a, b, c, d that belongs to this part."""
    found = a
    if PARTS > 1:
        found = tl.where(part == 1, b, found)
    if PARTS > 2:
        found = tl.where(part == 2, c, found)
    if PARTS > 3:
        found = tl.where(part == 3, d, found)
    return found


@triton.jit
def _whose(block, PARTS: tl.constexpr, BLOCK: tl.constexpr, n0, n1, n2):
    """Which weight a block of outputs belongs to, and how many blocks are before that weight's first."""
    part = 0
    before = 0
    if PARTS > 1:
        end = tl.cdiv(n0, BLOCK)
        part = (block >= end).to(tl.int32)
        before = tl.where(block >= end, end, 0)
        if PARTS > 2:
            end += tl.cdiv(n1, BLOCK)
            part = tl.where(block >= end, 2, part)
            before = tl.where(block >= end, end, before)
        if PARTS > 3:
            end += tl.cdiv(n2, BLOCK)
            part = tl.where(block >= end, 3, part)
            before = tl.where(block >= end, end, before)
    return part, before


@triton.jit
def _biased(y, bias, n, outputs, part, BIASES: tl.constexpr):
    """y plus the bias of this part at n, where bit `part` of BIASES says that it has one."""
    if BIASES != 0:
        y += tl.load(bias + n, mask=n < outputs * ((BIASES >> part) & 1), other=0.0).to(tl.float32)
    return y


@triton.jit
def _finished(y, EPILOGUE: tl.constexpr):
    if EPILOGUE == _GELU:
        y = 0.5 * y * (1.0 + tl.erf(y * _SQRT_HALF))
    return y


@triton.jit
def _runs(
    rows, mask, values, scales, starts, there, GROUP: tl.constexpr, BLOCK: tl.constexpr, RUNS: tl.constexpr, RUN: tl.constexpr
):  # fmt: skip
    """[BLOCK, RUNS] sums of RUN products each, every one in a single thread."""
    products = tl.load(rows, mask=mask, other=0.0).to(tl.float32) * values
    sums = tl.sum(tl.reshape(products, (BLOCK, RUNS, RUN)), axis=2)
    if GROUP > 0:
        sums *= tl.load(scales + starts // GROUP, mask=there, other=0.0)
    return sums


@triton.jit
def linear_row_kernel(
    x, w0, w1, w2, w3, s0, s1, s2, s3, b0, b1, b2, b3, o0, o1, o2, o3, n0, n1, n2, n3,
    w0_stride, w1_stride, w2_stride, w3_stride, depth,
    GROUP: tl.constexpr, PARTS: tl.constexpr, BIASES: tl.constexpr, EPILOGUE: tl.constexpr,
    BLOCK: tl.constexpr, RUN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row of x. A tile is BLOCK outputs by 32 runs of RUN inputs, a run being the 16 bytes of a thread's load.

    So a warp has the whole of an output in every tile, and no sum crosses warps: the order is the same in tiles of any size.
    """
    RUNS: tl.constexpr = 32
    block = tl.program_id(0)
    part, before = _whose(block, PARTS, BLOCK, n0, n1, n2)
    outputs = _of(part, PARTS, n0, n1, n2, n3)
    stride = _of(part, PARTS, w0_stride, w1_stride, w2_stride, w3_stride)
    n = (block - before) * BLOCK + tl.arange(0, BLOCK)
    far = n.to(tl.int64)[:, None]
    live = (n < outputs)[:, None]
    k = tl.arange(0, RUNS * RUN)
    run = tl.arange(0, RUNS) * RUN
    rows = _of(part, PARTS, w0, w1, w2, w3) + far * stride + k[None, :]
    scales = s0
    if GROUP > 0:
        scales = _of(part, PARTS, s0, s1, s2, s3) + far * tl.cdiv(depth, GROUP)
    total = tl.zeros((BLOCK, RUNS), tl.float32)
    if EPILOGUE == _GATED:
        up_rows = w1 + far * w1_stride + k[None, :]
        up_scales = s1
        if GROUP > 0:
            up_scales = s1 + far * tl.cdiv(depth, GROUP)
        up_total = tl.zeros((BLOCK, RUNS), tl.float32)
    for start in tl.range(0, depth, RUNS * RUN, num_stages=STAGES):
        inside = start + k < depth
        values = tl.load(x + start + k, mask=inside, other=0.0).to(tl.float32)[None, :]
        mask = live & inside[None, :]
        starts = (start + run)[None, :]
        there = live & (starts < depth)
        total += _runs(rows + start, mask, values, scales, starts, there, GROUP, BLOCK, RUNS, RUN)
        if EPILOGUE == _GATED:
            up_total += _runs(
                up_rows + start, mask, values, up_scales, starts, there, GROUP, BLOCK, RUNS, RUN
            )
    y = _biased(tl.sum(total, axis=1), _of(part, PARTS, b0, b1, b2, b3), n, outputs, part, BIASES)
    if EPILOGUE == _GATED:
        y = silu(y) * _biased(tl.sum(up_total, axis=1), b1, n, outputs, 1, BIASES)
    out = _of(part, PARTS, o0, o1, o2, o3)
    tl.store(out + n, _finished(y, EPILOGUE).to(out.dtype.element_ty), mask=n < outputs)


@triton.jit
def _tile(rows, x_rows, start, k, live, mask, total, scales, GROUP: tl.constexpr):
    """total + rows . x^T over one step of the inputs."""
    w = tl.load(rows + start, mask=live[:, None] & mask, other=0.0)
    if GROUP > 0:
        scale = tl.load(scales + start // GROUP, mask=live, other=0.0)
        sums = tl.dot(w.to(x_rows.dtype), tl.trans(x_rows), input_precision="ieee")
        total += sums * scale[:, None]
    else:
        total = tl.dot(w, tl.trans(x_rows), total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["rows"])
def linear_tile_kernel(
    x, w0, w1, w2, w3, s0, s1, s2, s3, b0, b1, b2, b3, o0, o1, o2, o3, n0, n1, n2, n3,
    w0_stride, w1_stride, w2_stride, w3_stride, o0_stride, o1_stride, o2_stride, o3_stride, x_stride, rows, depth,
    GROUP: tl.constexpr, PARTS: tl.constexpr, BIASES: tl.constexpr, EPILOGUE: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCK outputs by ROWS rows of x; STEP divides GROUP. The weights are the left operand of the product: theirs
    is the side that may come from registers, where 8 bits become 16, and the one that is long when x has few rows."""
    row_blocks = tl.cdiv(rows, ROWS)
    block = tl.program_id(0) // row_blocks
    part, before = _whose(block, PARTS, BLOCK, n0, n1, n2)
    outputs = _of(part, PARTS, n0, n1, n2, n3)
    stride = _of(part, PARTS, w0_stride, w1_stride, w2_stride, w3_stride)
    n = (block - before) * BLOCK + tl.arange(0, BLOCK)
    far = n.to(tl.int64)
    live = n < outputs
    m = tl.program_id(0) % row_blocks * ROWS + tl.arange(0, ROWS)
    wide = m.to(tl.int64)
    k = tl.arange(0, STEP)[None, :]
    w_rows = _of(part, PARTS, w0, w1, w2, w3) + (far * stride)[:, None] + k
    x_rows = x + (wide * x_stride)[:, None] + k
    scales = s0
    if GROUP > 0:
        scales = _of(part, PARTS, s0, s1, s2, s3) + far * tl.cdiv(depth, GROUP)
    total = tl.zeros((BLOCK, ROWS), tl.float32)
    if EPILOGUE == _GATED:
        up_rows = w1 + (far * w1_stride)[:, None] + k
        up_scales = scales
        if GROUP > 0:
            up_scales = s1 + far * tl.cdiv(depth, GROUP)
        up_total = tl.zeros((BLOCK, ROWS), tl.float32)
    for start in tl.range(0, depth, STEP, num_stages=STAGES):
        inside = start + k < depth
        values = tl.load(x_rows + start, mask=(m < rows)[:, None] & inside, other=0.0)
        total = _tile(w_rows, values, start, k, live, inside, total, scales, GROUP)
        if EPILOGUE == _GATED:
            up_total = _tile(up_rows, values, start, k, live, inside, up_total, up_scales, GROUP)
    y = _biased(total, _of(part, PARTS, b0, b1, b2, b3), n[:, None], outputs, part, BIASES)
    if EPILOGUE == _GATED:
        y = silu(y) * _biased(up_total, b1, n[:, None], outputs, 1, BIASES)
    out = _of(part, PARTS, o0, o1, o2, o3)
    out_stride = _of(part, PARTS, o0_stride, o1_stride, o2_stride, o3_stride)
    y = tl.trans(_finished(y, EPILOGUE).to(out.dtype.element_ty))
    place = out + (wide * out_stride)[:, None] + far[None, :]
    tl.store(place, y, mask=(m < rows)[:, None] & live[None, :])

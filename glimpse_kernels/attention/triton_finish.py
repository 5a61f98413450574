# SPDX-License-Identifier: Apache-2.0
"""What a library's attention leaves undone (see `_flash.py`), in one launch."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["stride_log", "rows", "segments"])
def attention_finish_kernel(
    out_ptr, logs_ptr, lse_ptr, cu_ptr, stride_ot, stride_oh, stride_log, rows, segments, heads, dim,
    LSE: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """BLOCK tokens. out [rows, heads, dim]: 0 outside all segments, else left alone. lse [rows, heads] from logs
    [heads, rows]: +inf becomes -inf, as does what is outside. Grid: rows / BLOCK."""
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(cu_ptr)
    last = tl.load(cu_ptr + segments)
    outside = (tokens < first) | (tokens >= last)
    live = tokens < rows
    if tl.sum((outside & live).to(tl.int32), 0) > 0:
        columns = tl.arange(0, DIM)
        ptrs = out_ptr + tokens.to(tl.int64)[:, None] * stride_ot + columns[None, :]
        mask = (outside & live)[:, None] & (columns < dim)[None, :]
        nothing = tl.zeros([BLOCK, DIM], out_ptr.dtype.element_ty)
        for _ in range(heads):
            tl.store(ptrs, nothing, mask=mask)
            ptrs += stride_oh
    if LSE:
        head = tl.arange(0, HEADS)
        known = live[:, None] & (head < heads)[None, :]
        logs = tl.load(
            logs_ptr + head.to(tl.int64)[None, :] * stride_log + tokens[:, None],
            mask=known & ~outside[:, None],
            other=float("-inf"),
        )
        logs = tl.where(logs == float("inf"), float("-inf"), logs)
        tl.store(lse_ptr + tokens.to(tl.int64)[:, None] * heads + head[None, :], logs, mask=known)

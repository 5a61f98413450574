# SPDX-License-Identifier: Apache-2.0
"""One query per sequence against the paged key/value pool."""

from __future__ import annotations

import torch
from torch import Tensor

from glimpse_kernels import _tensors as check
from glimpse_kernels import dispatch

__all__ = ["decode_attention"]


def decode_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v of one new token per sequence, keys and values in a paged pool.

    The kernels cut the keys of a row into parts and join these by their log-sum-exp (Flash-Decoding; Dao et al. 2023) in
    a fixed order. In C++ and CUDA a row has the same bits in every batch, on the CPU with every number of threads.

    q: [B, Hq, D]. k_pool: [num_blocks, block_size, Hkv, D], v_pool: [num_blocks, block_size, Hkv, Dv]; last dimension
        contiguous, other strides free. One dtype: float32, bfloat16 or (not in C++ on the CPU) float16.
    block_table: [B, max_blocks] int32; key j of row b lies in block_table[b, j // block_size], slot j % block_size.
        Entries past the row's last block are never read.
    lengths: [B] int32, keys of each row (at most max_blocks * block_size). 0: inactive row, output 0, no memory read.
    scale: factor of the logits, D**-0.5 if None. out: [B, Hq, Dv] of q's dtype.

    Returns [B, Hq, Dv]. Raises TypeError / ValueError / UnsupportedError.
    """
    op = "decode_attention"
    check.expect_tensors(op, q=q, k_pool=k_pool, v_pool=v_pool, block_table=block_table, lengths=lengths)
    check.expect_shape(op, "q", q, (None, None, None), "[B, Hq, D]")
    check.expect_head_dim(op, q)
    check.expect_shape(
        op, "k_pool", k_pool, (None, None, None, q.shape[2]), "[num_blocks, block_size, Hkv, D]"
    )
    check.expect_shape(op, "v_pool", v_pool, (*k_pool.shape[:3], None), "[num_blocks, block_size, Hkv, Dv]")
    check.expect_dtype(op, "k_pool", k_pool, q.dtype)
    check.expect_dtype(op, "v_pool", v_pool, q.dtype)
    if k_pool.shape[2] == 0 or q.shape[1] % k_pool.shape[2]:
        raise ValueError(
            f"{op}: q: expected a multiple of Hkv = {k_pool.shape[2]} heads, found {check.describe(q)}"
        )
    check.expect_dtype(op, "block_table", block_table, torch.int32)
    check.expect_shape(op, "block_table", block_table, (q.shape[0], None), "[B, max_blocks]")
    check.expect_dtype(op, "lengths", lengths, torch.int32)
    check.expect_shape(op, "lengths", lengths, (q.shape[0],), "[B]")
    check.expect_contiguous(op, "lengths", lengths)
    if out is not None:
        check.expect_dtype(op, "out", out, q.dtype)
        check.expect_shape(op, "out", out, (q.shape[0], q.shape[1], v_pool.shape[3]), "[B, Hq, Dv]")
    check.expect_last_contiguous(op, q=q, k_pool=k_pool, v_pool=v_pool, block_table=block_table, out=out)
    check.expect_same_device(
        op, q.device, k_pool=k_pool, v_pool=v_pool, block_table=block_table, lengths=lengths, out=out
    )
    # Rows of the grid and the most keys of one: lengths lie on the device.
    size = (q.shape[0] * k_pool.shape[2], block_table.shape[1] * k_pool.shape[1]) if q.is_cuda else ()
    serve = dispatch.select(op, q.device, q.dtype, grad=check.needs_grad(q, k_pool, v_pool), size=size)
    result: Tensor = serve(q, k_pool, v_pool, block_table, lengths, scale=scale, out=out)
    return result

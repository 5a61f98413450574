# SPDX-License-Identifier: Apache-2.0
"""What the compiled kernels of `decode_attention` are given, on a CPU and on a GPU alike: addresses, sizes and strides in the order of
csrc/python/bind_decode_attention.cpp."""

from __future__ import annotations

from torch import Tensor

from glimpse_kernels._tensors import DTYPE_CODES


def arguments(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float | None,
    out: Tensor,
) -> tuple[int | float, ...]:
    """As the op has them; `out` is there."""
    batch, q_heads, dim = q.shape
    blocks, block_size, kv_heads, v_dim = v_pool.shape
    return (
        q.data_ptr(),
        k_pool.data_ptr(),
        v_pool.data_ptr(),
        out.data_ptr(),
        block_table.data_ptr(),
        lengths.data_ptr(),
        batch,
        blocks,
        block_size,
        block_table.shape[1],
        q_heads,
        kv_heads,
        dim,
        v_dim,
        *q.stride()[:2],
        *k_pool.stride()[:3],
        *v_pool.stride()[:3],
        block_table.stride(0),
        *out.stride()[:2],
        dim**-0.5 if scale is None else scale,
        DTYPE_CODES[q.dtype],
    )

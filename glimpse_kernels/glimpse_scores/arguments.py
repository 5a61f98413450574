# SPDX-License-Identifier: Apache-2.0
"""What the compiled kernels of `glimpse_scores` are given, on a CPU and on a GPU alike: addresses, sizes and strides in the order of
csrc/python/bind_glimpse_scores.cpp."""

from __future__ import annotations

from torch import Tensor

from glimpse_kernels._tensors import DTYPE_CODES


def arguments(
    q: Tensor,
    k: Tensor,
    token_index: Tensor,
    token_seq: Tensor,
    scale: float | None,
    lse: Tensor | None,
    out: Tensor,
) -> tuple[int | float, ...]:
    """As the op has them; `out` is there."""
    sequences, q_heads, dim = q.shape
    tokens, kv_heads, _ = k.shape
    return (
        q.data_ptr(),
        k.data_ptr(),
        token_index.data_ptr(),
        token_seq.data_ptr(),
        0 if lse is None else lse.data_ptr(),
        out.data_ptr(),
        sequences,
        tokens,
        token_index.shape[0],
        q_heads,
        kv_heads,
        dim,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        0 if lse is None else lse.stride(0),
        out.stride(0),
        dim**-0.5 if scale is None else scale,
        DTYPE_CODES[q.dtype],
    )

# SPDX-License-Identifier: Apache-2.0
"""Variable-length attention over packed sequences."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from glimpse_kernels import _tensors as check
from glimpse_kernels import dispatch
from glimpse_kernels.attention import choice

__all__ = ["attention"]


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    q_positions: Tensor | None = None,
    max_seqlen_q: int | None = None,
    out: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    q_positions: Tensor | None = None,
    max_seqlen_q: int | None = None,
    out: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    q_positions: Tensor | None = None,
    max_seqlen_q: int | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v of every segment, per head.

    The tiled kernels follow FlashAttention-2 (Dao, arXiv:2307.08691, section 3.1): online softmax, normalised once at
    the end, with the log-sum-exp as a by-product.

    q: [Tq, Hq, D], k: [Tk, Hkv, D], v: [Tk, Hkv, Dv], all of one dtype (float32, bfloat16; the definition takes float16
        too); last dimension contiguous, row and head strides free. Query head h reads key head h // (Hq // Hkv).
    cu_seqlens_q, cu_seqlens_k: [B+1] int32; segment b has the rows cu[b] to cu[b+1]. Empty segments are allowed.
    causal: query i of a segment with Lq queries and Lk keys sees the keys j <= i + Lk - Lq.
    q_positions: [Tq] int32, only with causal: the query sees the keys j <= q_positions[i] of its segment instead
        (queries that were gathered out of a longer sequence). Negative: it sees nothing.
    scale: factor of the logits, D**-0.5 if None.
    max_seqlen_q: an upper bound of the longest query segment, if the caller knows one; a hint, never needed.
    out: [Tq, Hq, Dv] of q's dtype to write to; must not overlap the inputs.

    Returns out, or (out, lse) with lse [Tq, Hq] float32, the natural log of the sum of exp(scaled logits). A query that
    sees no key, and a row outside all segments, has output 0 and lse -inf.

    Raises TypeError / ValueError for a wrong dtype / shape, UnsupportedError if no backend serves the dtype or device.
    """
    op = "attention"
    check.expect_tensors(op, q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        raise ValueError(
            f"{op}: q, k, v: expected shapes [Tq, Hq, D], [Tk, Hkv, D], [Tk, Hkv, Dv], "
            f"found {check.describe(q)}, {check.describe(k)}, {check.describe(v)}"
        )
    check.expect_head_dim(op, q)
    check.expect_shape(op, "k", k, (None, None, q.shape[2]), "[Tk, Hkv, D]")
    check.expect_shape(op, "v", v, (k.shape[0], k.shape[1], None), "[Tk, Hkv, Dv]")
    check.expect_dtype(op, "k", k, q.dtype)
    check.expect_dtype(op, "v", v, q.dtype)
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{op}: q: expected a multiple of Hkv = {k.shape[1]} heads, found {check.describe(q)}"
        )
    check.expect_cu_seqlens(op, "cu_seqlens_q", cu_seqlens_q)
    check.expect_cu_seqlens(op, "cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape[0] - 1)
    if q_positions is not None:
        if not causal:
            raise ValueError(
                f"{op}: q_positions: expected None with causal=False, found {check.describe(q_positions)}"
            )
        check.expect_dtype(op, "q_positions", q_positions, torch.int32)
        check.expect_shape(op, "q_positions", q_positions, (q.shape[0],), "[Tq]")
        check.expect_contiguous(op, "q_positions", q_positions)
    if out is not None:
        check.expect_dtype(op, "out", out, q.dtype)
        check.expect_shape(op, "out", out, (q.shape[0], q.shape[1], v.shape[2]), "[Tq, Hq, Dv]")
    check.expect_last_contiguous(op, q=q, k=k, v=v, out=out)
    check.expect_same_device(
        op,
        q.device,
        k=k,
        v=v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        q_positions=q_positions,
        out=out,
    )
    grad = check.needs_grad(q, k, v)
    serve = None
    if q.is_cuda and not grad:
        serve = choice.provider(
            q,
            k,
            v,
            segments=cu_seqlens_q.shape[0] - 1,
            causal=causal,
            scale=scale,
            positions=q_positions is not None,
            bounded=max_seqlen_q is not None,
        )
    if serve is None:
        serve = dispatch.select(op, q.device, q.dtype, grad=grad)
    return serve(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        causal=causal,
        scale=scale,
        q_positions=q_positions,
        max_seqlen_q=max_seqlen_q,
        out=out,
        return_lse=return_lse,
    )

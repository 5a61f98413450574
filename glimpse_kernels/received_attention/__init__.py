# SPDX-License-Identifier: Apache-2.0
"""The attention that every key receives: column sums of a softmax matrix that is never formed."""

from __future__ import annotations

import torch
from torch import Tensor

from glimpse_kernels import _tensors as check
from glimpse_kernels import dispatch

__all__ = ["received_attention"]


def received_attention(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    q_positions: Tensor | None = None,
    scale: float | None = None,
    group: int = 1,
    order: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """What the queries of a segment give to each of its keys: the sum over queries, the mean over heads, of
    exp(scale * q·k - lse).

    VisionZip (arXiv:2412.04467), VScan (arXiv:2505.22654) and VisPruner (arXiv:2412.01818) rank visual tokens by it in
    vision towers without a class token; from rater rows only it is the score of SparseVLM (arXiv:2410.04417). With the
    log-sum-exp that `attention` returns, a second sweep over tiles of q k^T gives the same numbers as the whole matrix, in
    memory that grows with the number of tokens (the recomputation of FlashAttention-2's backward, arXiv:2307.08691,
    section 3.1).

    q: [Tq, Hq, D], k: [Tk, Hkv, D], of one dtype (float32, bfloat16, float16), rotary position
        applied; last dimension contiguous, row and head strides free. Query head h reads key head h // (Hq // Hkv).
    lse: [Tq, Hq] float32, any strides: each query's natural log of the sum of exp over all keys it attends to, which may be
        more than those of this call. A query with -inf gives nothing (its q must be finite, unless its position is
        negative); one with lse - log(w) counts w times.
    cu_seqlens_q, cu_seqlens_k: [B+1] int32; segment b has the rows cu[b] to cu[b+1]. Empty segments are allowed; a key
        outside all segments receives 0.
    causal: query i of a segment with Lq queries and Lk keys gives only to the keys j <= i + Lk - Lq.
    q_positions: [Tq] int32, only with causal: gives to the keys j <= q_positions[i] of its segment instead.
    scale: factor of the logits, D**-0.5 if None.
    group: consecutive rows of k that count as one token and get their mean; divides Tk. 4 for patches that Qwen2.5-VL
        merges 2 x 2.
    order: [Tk // group] int32, a permutation: the place of each token in the result. The order in which the tower stores
        its tokens (window by window) gives a result in raster order.
    out: [Tk // group] float32, contiguous; must not overlap the inputs.

    Returns [Tk // group] float32. Over a segment whose keys are all those of lse, it sums to Lq / group. Times Hq / Lq it
    is the mean over queries of the sum over heads.

    Raises TypeError / ValueError for a wrong dtype / shape, UnsupportedError if no backend serves the dtype or device.
    """
    op = "received_attention"
    check.expect_tensors(op, q=q, k=k, lse=lse, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check.expect_shape(op, "q", q, (None, None, None), "[Tq, Hq, D]")
    check.expect_head_dim(op, q)
    check.expect_shape(op, "k", k, (None, None, q.shape[2]), "[Tk, Hkv, D]")
    check.expect_dtype(op, "k", k, q.dtype)
    if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{op}: q: expected a multiple of Hkv = {k.shape[1]} heads, at least one, found {check.describe(q)}"
        )
    check.expect_dtype(op, "lse", lse, torch.float32)
    check.expect_shape(op, "lse", lse, (q.shape[0], q.shape[1]), "[Tq, Hq]")
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
    if group < 1 or k.shape[0] % group:
        raise ValueError(f"{op}: group: expected a divisor of Tk = {k.shape[0]}, found {group}")
    tokens = k.shape[0] // group
    if order is not None:
        check.expect_dtype(op, "order", order, torch.int32)
        check.expect_shape(op, "order", order, (tokens,), "[Tk // group]")
        check.expect_contiguous(op, "order", order)
    if out is not None:
        check.expect_dtype(op, "out", out, torch.float32)
        check.expect_shape(op, "out", out, (tokens,), "[Tk // group]")
        check.expect_contiguous(op, "out", out)
    check.expect_last_contiguous(op, q=q, k=k)
    check.expect_same_device(
        op,
        q.device,
        k=k,
        lse=lse,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        q_positions=q_positions,
        order=order,
        out=out,
    )
    serve = dispatch.select(op, q.device, q.dtype, grad=check.needs_grad(q, k, lse))
    result: Tensor = serve(
        q,
        k,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        causal=causal,
        q_positions=q_positions,
        scale=scale,
        group=group,
        order=order,
        out=out,
    )
    return result

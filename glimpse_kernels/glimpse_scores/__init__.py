# SPDX-License-Identifier: Apache-2.0
"""The glimpse row's attention logits against the image tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from glimpse_kernels import _tensors as check
from glimpse_kernels import dispatch

__all__ = ["glimpse_scores"]


def glimpse_scores(
    q: Tensor,
    k: Tensor,
    token_index: Tensor,
    token_seq: Tensor,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention logits of one query row per sequence against a list of keys, per head, without a softmax.

    These are the logits that GlimpsePrune (arXiv:2508.01548) feeds to its importance predictor; the dense attention
    matrix they are a slice of is never formed.

    q: [B, Hq, D], the glimpse row of each sequence, rotary position applied. k: [T, Hkv, D], rotated too. One dtype
        (float32, bfloat16; float16 everywhere but in C++ on the CPU), last dimension contiguous.
    token_index: [N] int32 rows of k. token_seq: [N] int32, the row of q each of them is scored against.
    scale: factor of the logits, D**-0.5 if None.
    lse: [B, Hq] float32, the row's log-sum-exp: if given it is subtracted (log of the softmax over all visible keys).
    out: [N, Hq] float32.

    Returns [N, Hq] float32. Raises TypeError / ValueError / UnsupportedError.
    """
    op = "glimpse_scores"
    check.expect_tensors(op, q=q, k=k, token_index=token_index, token_seq=token_seq)
    check.expect_shape(op, "q", q, (None, None, None), "[B, Hq, D]")
    check.expect_head_dim(op, q)
    check.expect_shape(op, "k", k, (None, None, q.shape[2]), "[T, Hkv, D]")
    check.expect_dtype(op, "k", k, q.dtype)
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{op}: q: expected a multiple of Hkv = {k.shape[1]} heads, found {check.describe(q)}"
        )
    for name, index in (("token_index", token_index), ("token_seq", token_seq)):
        check.expect_dtype(op, name, index, torch.int32)
        check.expect_shape(op, name, index, (token_index.shape[0] if token_index.dim() else None,), "[N]")
        check.expect_contiguous(op, name, index)
    if lse is not None:
        check.expect_dtype(op, "lse", lse, torch.float32)
        check.expect_shape(op, "lse", lse, (q.shape[0], q.shape[1]), "[B, Hq]")
    if out is not None:
        check.expect_dtype(op, "out", out, torch.float32)
        check.expect_shape(op, "out", out, (token_index.shape[0], q.shape[1]), "[N, Hq]")
    check.expect_last_contiguous(op, q=q, k=k, lse=lse, out=out)
    check.expect_same_device(
        op, q.device, k=k, token_index=token_index, token_seq=token_seq, lse=lse, out=out
    )
    size = (token_index.shape[0], k.shape[1] * k.shape[2]) if q.is_cuda else ()
    serve = dispatch.select(op, q.device, q.dtype, grad=check.needs_grad(q, k, lse), size=size)
    result: Tensor = serve(q, k, token_index, token_seq, scale=scale, lse=lse, out=out)
    return result

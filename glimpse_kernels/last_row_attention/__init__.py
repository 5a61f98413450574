# SPDX-License-Identifier: Apache-2.0
"""The attention that one query of each sequence, usually the last, gives to the image tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from glimpse_kernels import _tensors as check
from glimpse_kernels import dispatch

__all__ = ["last_row_attention"]


def last_row_attention(
    q: Tensor,
    k: Tensor,
    cu_seqlens_k: Tensor,
    token_index: Tensor,
    token_seq: Tensor,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Softmax over all keys of a sequence from one query, mean over heads, at a list of keys.

    The score of FastV (arXiv:2403.06764), PyramidDrop (arXiv:2410.17247) and the second stage of
    VScan (arXiv:2505.22654). Two passes over the keys, as in the split softmax of Flash-Decoding; the
    weights of single heads are never stored.

    q: [B, Hq, D], one row a sequence. k: [T, Hkv, D]. Of one dtype (float32, bfloat16, float16),
        with rotary position where the method wants it; last dimension contiguous. Query head h reads key head
        h // (Hq // Hkv).
    cu_seqlens_k: [B+1] int32; the row of sequence b sees the keys cu[b] to cu[b+1], all of them: as the last row does.
    token_index: [N] int32 rows of k, each inside its sequence. token_seq: [N] int32, the sequence each of them is in.
    scale: factor of the logits, D**-0.5 if None.
    lse: [B, Hq] float32, natural log of the sum of exp of the row's scaled logits, if `attention` has returned it already:
        then cu_seqlens_k is not read and the first pass is saved. A row with -inf gives 0.
    out: [N] float32, contiguous.

    Returns [N] float32. The weights are not rounded to the dtype of the model before the mean, as implementations of these
    methods do that form them in a matrix: a ranking without ties needs the full precision.

    Raises TypeError / ValueError for a wrong dtype / shape, UnsupportedError if no backend serves the dtype or device.
    """
    op = "last_row_attention"
    check.expect_tensors(
        op, q=q, k=k, cu_seqlens_k=cu_seqlens_k, token_index=token_index, token_seq=token_seq
    )
    check.expect_shape(op, "q", q, (None, None, None), "[B, Hq, D]")
    check.expect_head_dim(op, q)
    check.expect_shape(op, "k", k, (None, None, q.shape[2]), "[T, Hkv, D]")
    check.expect_dtype(op, "k", k, q.dtype)
    if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{op}: q: expected a multiple of Hkv = {k.shape[1]} heads, at least one, found {check.describe(q)}"
        )
    check.expect_cu_seqlens(op, "cu_seqlens_k", cu_seqlens_k, q.shape[0])
    for name, index in (("token_index", token_index), ("token_seq", token_seq)):
        check.expect_dtype(op, name, index, torch.int32)
        check.expect_shape(op, name, index, (token_index.shape[0] if token_index.dim() else None,), "[N]")
        check.expect_contiguous(op, name, index)
    if lse is not None:
        check.expect_dtype(op, "lse", lse, torch.float32)
        check.expect_shape(op, "lse", lse, (q.shape[0], q.shape[1]), "[B, Hq]")
    if out is not None:
        check.expect_dtype(op, "out", out, torch.float32)
        check.expect_shape(op, "out", out, (token_index.shape[0],), "[N]")
        check.expect_contiguous(op, "out", out)
    check.expect_last_contiguous(op, q=q, k=k, lse=lse)
    check.expect_same_device(
        op,
        q.device,
        k=k,
        cu_seqlens_k=cu_seqlens_k,
        token_index=token_index,
        token_seq=token_seq,
        lse=lse,
        out=out,
    )
    serve = dispatch.select(op, q.device, q.dtype, grad=check.needs_grad(q, k, lse))
    result: Tensor = serve(q, k, cu_seqlens_k, token_index, token_seq, scale=scale, lse=lse, out=out)
    return result

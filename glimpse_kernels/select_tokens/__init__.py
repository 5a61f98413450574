# SPDX-License-Identifier: Apache-2.0
"""From one score per visual token to the rows that stay."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from glimpse_kernels import _tensors as check
from glimpse_kernels import dispatch
from glimpse_kernels.select_tokens.selection import Selection

__all__ = ["Selection", "select_tokens"]


def select_tokens(
    logits: Tensor,
    cu_groups: Tensor,
    *,
    threshold: float,
    caps: Tensor,
    floors: Tensor,
    forced: Tensor | None = None,
    token_rows: Tensor,
    row_keep: Tensor,
    cu_seqlens: Tensor,
    capacity: int,
) -> Selection:
    """Threshold, cap, floor and anchors, group by group, and the compacted layout that follows (GlimpsePrune,
    arXiv 2508.01548, section 3).

    A group (an image, or all images of a prompt) keeps its tokens with logit > threshold, strictly. If these are more than
    its cap, it keeps its best `cap` tokens instead. Then its best `floor` tokens and its forced ones are added.
    Best means the higher fp32 logit, then the lower index; NaN is below everything and never above a threshold,
    -0.0 equals +0.0. The same set on every backend.

    logits: [N] float32, one per visual token, the groups one after the other.
    cu_groups: [G+1] int32, where each group starts; the last entry is N.
    threshold: in logit space, log(p / (1 - p)) for a probability p; +inf and -inf are allowed, NaN is not.
    caps, floors: [G] int32, at least 0. A cap of the group's size or more is none; a floor above the size keeps all.
    forced: [N] bool, tokens that stay whatever their score.
    token_rows: [N] int32, the packed row of each visual token, no row twice.
    row_keep: [T] bool. True: the row always stays (text). False: it goes unless it is a kept visual token.
    cu_seqlens: [B+1] int32, where each sequence starts among the T packed rows.
    capacity: length of the index; no more rows than this are ever written.

    Returns a `Selection`.

    Raises TypeError / ValueError for a wrong dtype / shape, UnsupportedError if no backend serves the device.
    """
    op = "select_tokens"
    check.expect_tensors(op, logits=logits, cu_groups=cu_groups, cu_seqlens=cu_seqlens)
    check.expect_shape(op, "logits", logits, (None,), "[N]")
    check.expect_dtype(op, "logits", logits, torch.float32)
    check.expect_cu_seqlens(op, "cu_groups", cu_groups)
    check.expect_cu_seqlens(op, "cu_seqlens", cu_seqlens)
    n, groups = logits.shape[0], cu_groups.shape[0] - 1
    for name, t, size, dtype in (
        ("caps", caps, groups, torch.int32),
        ("floors", floors, groups, torch.int32),
        ("forced", forced, n, torch.bool),
        ("token_rows", token_rows, n, torch.int32),
        ("row_keep", row_keep, None, torch.bool),
    ):
        if t is not None:
            check.expect_shape(op, name, t, (size,))
            check.expect_dtype(op, name, t, dtype)
            check.expect_contiguous(op, name, t)
    check.expect_contiguous(op, "logits", logits)
    if math.isnan(threshold):
        raise ValueError(f"{op}: threshold: expected a number, found NaN")
    if capacity < 0:
        raise ValueError(f"{op}: capacity: expected at least 0, found {capacity}")
    check.expect_same_device(
        op,
        logits.device,
        cu_groups=cu_groups,
        caps=caps,
        floors=floors,
        forced=forced,
        token_rows=token_rows,
        row_keep=row_keep,
        cu_seqlens=cu_seqlens,
    )
    serve = dispatch.select(op, logits.device, logits.dtype, size=(groups, n) if logits.is_cuda else ())
    return serve(
        logits,
        cu_groups,
        threshold=threshold,
        caps=caps,
        floors=floors,
        forced=forced,
        token_rows=token_rows,
        row_keep=row_keep,
        cu_seqlens=cu_seqlens,
        capacity=capacity,
    )

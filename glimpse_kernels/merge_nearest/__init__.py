# SPDX-License-Identifier: Apache-2.0
"""Dropped tokens go into the most similar kept one: the merging of VisionZip and VScan."""

from __future__ import annotations

import torch
from torch import Tensor

from glimpse_kernels import _tensors as check
from glimpse_kernels import dispatch

__all__ = ["MERGES", "merge_nearest"]

MERGES = ("mean", "target_plus_mean")
"""What a target with value x becomes when k sources with the sum s join it: (x + s) / (1 + k), or x + s / max(k, 1)."""


def merge_nearest(
    values: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    *,
    sources: Tensor | None = None,
    metric: Tensor | None = None,
    how: str = "mean",
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Every source joins the target of its group whose metric has the largest cosine with its own; a target's value
    becomes a mean over those that joined it. Ties go to the lower row.

    VScan (arXiv:2505.22654): targets are the kept tokens, sources all others, the metric is the values, how="mean".
    VisionZip (arXiv:2412.04467, section 3.2): targets are the contextual tokens, sources the rest without the dominant
    ones, the metric is the keys' mean over heads. Its code has how="target_plus_mean", which about doubles what
    another token joins; the mean that the paper describes is "mean".

    values: [N, C] float32, bfloat16 or float16, the groups' rows one after the other; last dimension contiguous, row
        stride free.
    targets: [N] bool, contiguous.
    cu_seqlens: [G+1] int32, where the rows of each group start. Rows outside all groups have no part in it.
    sources: [N] bool, contiguous; None: every row that is no target. A row that is both is a target. Rows that are
        neither keep their value.
    metric: [N, D] float32, bfloat16 or float16, of any of these dtypes whatever that of the values, last dimension
        contiguous, row stride free; None: the values. Cosines are taken in float32, of lengths that are at least 1e-8:
        a row of zeros is at 0 from everything, and a source of zeros joins the first target. A row that is not
        finite, or the square of whose length is not in float32, is like nothing: it joins no target and no source
        joins it.
    how: one of `MERGES`. Sums are taken in float32 in the order of the rows and rounded once.
    out: [N, C] of the dtype of values, last dimension contiguous, row stride free. `values` itself, where only the
        targets that something joined change; else it must not overlap the inputs.

    Returns merged [N, C], targets with their new value in their own row and all other rows as they were, and nearest
    [N] int32, the row that a source joined, -1 for all other rows and for sources of a group without a target.
    Gradients go through the values; the choice has none.

    Raises TypeError / ValueError for a wrong dtype / shape / name, UnsupportedError if no backend serves the dtype or
    device.
    """
    op = "merge_nearest"
    check.expect_tensors(op, values=values, targets=targets, cu_seqlens=cu_seqlens)
    check.expect_shape(op, "values", values, (None, None), "[N, C]")
    rows = values.shape[0]
    for name, mask in (("targets", targets), ("sources", sources)):
        if mask is not None:
            check.expect_dtype(op, name, mask, torch.bool)
            check.expect_shape(op, name, mask, (rows,), "[N]")
            check.expect_contiguous(op, name, mask)
    check.expect_cu_seqlens(op, "cu_seqlens", cu_seqlens)
    if metric is not None:
        check.expect_dtype(op, "metric", metric, torch.float32, torch.bfloat16, torch.float16)
        check.expect_shape(op, "metric", metric, (rows, None), "[N, D]")
    if how not in MERGES:
        raise ValueError(f"{op}: how: expected one of {', '.join(MERGES)}, found {how!r}")
    if out is not None:
        check.expect_dtype(op, "out", out, values.dtype)
        check.expect_shape(op, "out", out, tuple(values.shape), "[N, C]")
    check.expect_last_contiguous(op, values=values, metric=metric, out=out)
    check.expect_same_device(
        op, values.device, targets=targets, cu_seqlens=cu_seqlens, sources=sources, metric=metric, out=out
    )
    serve = dispatch.select(op, values.device, values.dtype, grad=check.needs_grad(values))
    result: tuple[Tensor, Tensor] = serve(
        values, targets, cu_seqlens, sources=sources, metric=metric, how=how, out=out
    )
    return result

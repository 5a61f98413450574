# SPDX-License-Identifier: Apache-2.0
"""The best tokens of an image, but only so many from each window of its grid: VScan's local scan."""

from __future__ import annotations

import torch
from torch import Tensor

from glimpse_kernels import _tensors as check
from glimpse_kernels import dispatch

__all__ = ["SHARES", "window_topk"]

SHARES = ("up", "down")
"""How a budget that the windows do not divide is shared out."""


def window_topk(
    scores: Tensor,
    cu_seqlens: Tensor,
    grids: Tensor,
    cu_picks: Tensor,
    *,
    window: int,
    capacity: int,
    share: str = "up",
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The picks of every group by falling score, with at most so many of one window (VScan, arXiv:2505.22654, the local scan).

    A group is a grid of h x w tokens, row by row, cut into max(1, h // window) x max(1, w // window) windows of
    window x window tokens; rows and columns that are left over join the last window of their direction. So a grid that
    is smaller than a window in a direction is one window there (the original fails). Tokens are gone through by falling
    score; one is picked while its window has fewer picks than the cap and the group fewer than its budget. Equivalently,
    and in parallel: the tokens that rank below the cap in their window, and of these the best. The higher fp32 score is
    the better, then the lower index; NaN is below everything, -0.0 equals +0.0. The same on every backend.

    scores: [N] float32, the groups one after the other.
    cu_seqlens: [G+1] int32, where the tokens of each group start; starts at 0. N may be more than the last entry.
    grids: [G, 2] int32, height and width of each group. A token behind the h * w first ones of its group is in no
        window and never picked.
    cu_picks: [G+1] int32, where the picks of each group start: cu_picks[g+1] - cu_picks[g] is the group's budget.
    window: side of a window in tokens, at least 1. VScan: 4 on Qwen2.5-VL's merged grid, 6 on CLIP's 24 x 24.
    capacity: length of the result; no more picks than this are ever written.
    share: the cap of a window is the budget over the number of windows, rounded
        "up", VScan's choice on Qwen: the budget is used up unless tokens run out;
        "down", VScan's choice on LLaVA: all windows give equally many, and what is over (all of a budget smaller than
        the number of windows, where the original fails) is not picked here.
    max_seqlen: the length of the longest group where the host knows it; it bounds the memory of a launch. A group
        that is longer than it has no picks. None: what the shapes allow.

    Returns picks [capacity] int32, packed rows in the order in which they were picked, those of group g from
    cu_picks[g] on, with -1 where there is nothing to pick and behind cu_picks[G], and keep [N] bool, True where a row is
    picked.

    Raises TypeError / ValueError for a wrong dtype / shape / value, UnsupportedError if no backend serves the device.
    """
    op = "window_topk"
    check.expect_tensors(op, scores=scores, cu_seqlens=cu_seqlens, grids=grids, cu_picks=cu_picks)
    check.expect_shape(op, "scores", scores, (None,), "[N]")
    check.expect_dtype(op, "scores", scores, torch.float32)
    check.expect_contiguous(op, "scores", scores)
    check.expect_cu_seqlens(op, "cu_seqlens", cu_seqlens)
    groups = cu_seqlens.shape[0] - 1
    check.expect_shape(op, "grids", grids, (groups, 2), "[G, 2]")
    check.expect_dtype(op, "grids", grids, torch.int32)
    check.expect_contiguous(op, "grids", grids)
    check.expect_cu_seqlens(op, "cu_picks", cu_picks, groups)
    check.expect_count(op, "window", window, least=1)
    check.expect_count(op, "capacity", capacity)
    check.expect_count(op, "max_seqlen", max_seqlen or 0)
    if share not in SHARES:
        raise ValueError(f"{op}: share: expected one of {', '.join(SHARES)}; found {share!r}")
    check.expect_same_device(op, scores.device, cu_seqlens=cu_seqlens, grids=grids, cu_picks=cu_picks)
    serve = dispatch.select(op, scores.device, scores.dtype)
    result: tuple[Tensor, Tensor] = serve(
        scores,
        cu_seqlens,
        grids,
        cu_picks,
        window=window,
        capacity=capacity,
        share=share,
        max_seqlen=max_seqlen,
    )
    return result

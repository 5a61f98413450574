# SPDX-License-Identifier: Apache-2.0
"""The measured rows of choosing the best tokens of every window; see `bench.op_cases`."""

from __future__ import annotations

import torch

import glimpse_kernels as kernels
from bench.gpu_targets import SIXTEEN
from bench.op_cases import nbytes
from bench.op_registry import REGISTRY, Results, Sizes, Work
from glimpse_kernels.window_topk.naive import window_topk as naive_window_topk

WINDOW = 4
ONE_IN = 6  # a third of the tokens stays, one half of them by their windows (VScan)


def _window(s: Sizes, pictures: int) -> Work:
    n, budget = s.image, s.image // ONE_IN
    # No two scores are equal: torch does not say which one of them its topk takes.
    scores = torch.cat([torch.randperm(n).float() for _ in range(pictures)])
    each = torch.arange(pictures + 1, dtype=torch.int32)
    cu, places = each * n, each * budget
    grids = torch.full((pictures, 2), s.side, dtype=torch.int32)
    options = {"window": WINDOW, "capacity": pictures * budget, "share": "up", "max_seqlen": n}
    windows = (s.side // WINDOW) ** 2
    cap = -(-budget // windows)
    first = each[:-1, None] * n

    def plain() -> Results:
        # The windows of these pictures fill the grid, all have one size.
        grid = (pictures, s.side // WINDOW, WINDOW, s.side // WINDOW, WINDOW)
        by_window = scores.view(grid).transpose(2, 3).reshape(pictures, windows, WINDOW**2)
        cut = by_window.topk(cap).values[:, :, -1]
        in_reach = (by_window >= cut[:, :, None]).view(pictures, grid[1], grid[3], WINDOW, WINDOW)
        allowed = in_reach.transpose(2, 3).reshape(pictures, n)
        picks = scores.view(pictures, n).masked_fill(~allowed, float("-inf")).topk(budget).indices
        keep = torch.zeros(pictures, n, dtype=torch.bool).scatter_(1, picks, True)
        return (picks.int() + first).flatten(), keep.flatten()

    return Work(
        lambda: kernels.window_topk(scores, cu, grids, places, **options),  # type: ignore[arg-type]
        plain,
        lambda: naive_window_topk(scores, cu, grids, places, **options),  # type: ignore[arg-type]
        nbytes(scores) + pictures * (n + 4 * budget),
        "byte",
        tolerance=0.0,
        plain_name="topk, twice",
    )


@REGISTRY.add("window_topk", "1 picture", per_picture=True)
def window_one(s: Sizes, dtype: torch.dtype) -> Work:
    return _window(s, 1)


@REGISTRY.add("window_topk", SIXTEEN, per_picture=True)
def window_many(s: Sizes, dtype: torch.dtype) -> Work:
    return _window(s, 16)

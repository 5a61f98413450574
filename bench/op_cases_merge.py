# SPDX-License-Identifier: Apache-2.0
"""The measured rows of merging dropped tokens into kept ones; see `bench.op_cases`."""

from __future__ import annotations

import torch
from torch import Tensor

import glimpse_kernels as kernels
from bench.op_cases import nbytes
from bench.op_registry import REGISTRY, Results, Sizes, Work
from glimpse_kernels.merge_nearest.naive import merge_nearest as naive_merge

KEPT_ONE_IN = 9  # 11 % of the tokens, the middle one of the published budgets


def _merge(s: Sizes, dtype: torch.dtype, dim: int | None, how: str) -> Work:
    n = s.image
    targets = torch.arange(n) % KEPT_ONE_IN == 0
    cu = torch.arange(2, dtype=torch.int32) * n
    kept = torch.arange(n)[::KEPT_ONE_IN]
    given = torch.tensor([i for i in range(n) if i % KEPT_ONE_IN])

    def features(width: int) -> Tensor:
        # Every token near one kept token: two that are almost equally near may change places with the order of a sum.
        centres = torch.randn(len(kept), width)
        return (centres[torch.arange(n) // KEPT_ONE_IN] + 0.5 * torch.randn(n, width)).to(dtype)

    values = features(s.hidden)
    metric = None if dim is None else features(dim)
    like = values if metric is None else metric

    def plain() -> Results:
        # In float32, as the op has its cosines: rounded to 16 bits many of them tie.
        unit = torch.nn.functional.normalize(like.float(), dim=1)
        best = (unit[given] @ unit[kept].T).argmax(1)
        total = torch.zeros(len(kept), s.hidden).index_add_(0, best, values[given].float())
        count = torch.zeros(len(kept)).index_add_(0, best, torch.ones(len(given)))[:, None]
        own = values[kept].float()
        mean = (own + total) / (1 + count) if how == "mean" else own + total / count.clamp(min=1)
        nearest = torch.full((n,), -1, dtype=torch.int32).index_copy_(0, given, kept[best].int())
        return values.index_copy(0, kept, mean.to(dtype)), nearest

    flops = 2 * len(kept) * len(given) * like.shape[1]
    options = {"metric": metric, "how": how}
    return Work(
        lambda: kernels.merge_nearest(values, targets, cu, **options),  # type: ignore[arg-type]
        plain,
        lambda: naive_merge(values, targets, cu, **options),  # type: ignore[arg-type]
        flops if dim is None else nbytes(values, values, like),
        "flop" if dim is None else "byte",
        tolerance=1e-2,
    )


@REGISTRY.add("merge_nearest", "by values (VScan)")
def merge_by_values(s: Sizes, dtype: torch.dtype) -> Work:
    return _merge(s, dtype, None, "mean")


@REGISTRY.add("merge_nearest", "by keys (VisionZip)")
def merge_by_keys(s: Sizes, dtype: torch.dtype) -> Work:
    return _merge(s, dtype, s.vision_dim, "target_plus_mean")

# SPDX-License-Identifier: Apache-2.0
"""Definition of `merge_nearest` in plain PyTorch, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-8
"""Least length of a row that a cosine divides by, as in torch.nn.functional.cosine_similarity."""
CHUNK = 1 << 24
"""Cosines held at once, so that memory grows with the number of tokens and not with its square."""


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
    """See `glimpse_kernels.merge_nearest`. Reads lengths and masks on the host. Differentiable in the values."""
    like = (values if metric is None else metric).detach()
    givers = ~targets if sources is None else sources & ~targets
    nearest = torch.full((values.shape[0],), -1, dtype=torch.int32, device=values.device)
    rows, means = [], []
    bounds = cu_seqlens.tolist()
    for row, end in zip(bounds[:-1], bounds[1:], strict=True):
        kept = row + targets[row:end].nonzero()[:, 0]
        given = row + givers[row:end].nonzero()[:, 0]
        best = most_similar(like[given], like[kept])
        given, best = given[best >= 0], best[best >= 0]
        if len(given) == 0:
            continue
        nearest[given] = kept[best].int()
        # Segments of one target's sources each, in the order of the rows: no sum depends on which thread came first.
        best, order = best.sort(stable=True)
        count = torch.bincount(best, minlength=len(kept))
        joined = values[given[order]].float()
        total = torch.segment_reduce(joined, "sum", lengths=count, axis=0, initial=0.0, unsafe=True)
        own, count = values[kept].float(), count[:, None]
        mean = (own + total) / (1 + count) if how == "mean" else own + total / count.clamp(min=1)
        rows.append(kept)
        means.append(torch.where(count > 0, mean, own).to(values.dtype))
    merged = values.index_copy(0, torch.cat(rows), torch.cat(means)) if rows else values.clone()
    return merged if out is None else out.copy_(merged), nearest


def most_similar(given: Tensor, kept: Tensor) -> Tensor:
    """[S] int64: for each row of `given [S, D]` the first row of `kept [T, D]` with the largest cosine, -1 where none has one."""
    if len(kept) == 0:
        return given.new_full((len(given),), -1, dtype=torch.int64)
    unit, finite = normalized(given)
    unit_kept, finite_kept = normalized(kept)
    found = []
    step = max(1, CHUNK // len(kept))
    for some, usable in zip(unit.split(step), finite.split(step), strict=True):
        cosine = (some @ unit_kept.T).masked_fill(~finite_kept, float("-inf"))
        found.append(torch.where(usable & finite_kept.any(), cosine.argmax(1), -1))
    return torch.cat(found)


def normalized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [R, D] in float32 over their lengths, and [R] whether the length is a finite number."""
    rows = rows.float()
    length = rows.square().sum(1, keepdim=True).sqrt()
    return rows / length.clamp(min=EPS), length[:, 0].isfinite()

# SPDX-License-Identifier: Apache-2.0
"""The measured rows of the ops that choose tokens one after the other, at the sizes of LLaVA's vision towers; see `bench.op_cases`.

Plain torch gets all pictures as one batch, and never waits: on a GPU its time is that of the launches of hundreds of steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import glimpse_kernels as kernels
from bench.op_cases import nbytes
from bench.op_registry import REGISTRY, Results, Sizes, Work
from glimpse_kernels.drop_duplicates.naive import drop_duplicates as naive_drop
from glimpse_kernels.farthest_points.naive import farthest_points as naive_farthest
from glimpse_kernels.greedy_dpp.naive import greedy_dpp as naive_dpp
from glimpse_kernels.similarity import cosine_similarity

TOKENS, PICKS = 576, 64  # of a picture of 24 x 24 patches, and of those what stays
TILES = 5  # of a large picture in LLaVA-NeXT
PER_ROUND = 8  # as VisPruner has it
COUNTS = {1: f"{TOKENS} tokens", TILES: f"{TILES} x {TOKENS} tokens"}


def _sizes(s: Sizes) -> tuple[int, int, int]:
    """Tokens, picks and width of the features, small where the shape is."""
    return (TOKENS, PICKS, 1024) if s.hidden >= 1024 else (24, 4, 32)


def _bounds(groups: int, each: int) -> Tensor:
    return torch.arange(groups + 1, dtype=torch.int32) * each


def _packed(picks: Tensor, n: int) -> Results:
    """[G, picks] of a batch as the ops give them: packed rows in their order, and whether each row is there."""
    groups = picks.shape[0]
    keep = torch.zeros(groups, n, dtype=torch.bool).scatter_(1, picks, True)
    return (picks + torch.arange(groups)[:, None] * n).flatten(), keep.flatten()


def _farthest(s: Sizes, dtype: torch.dtype, groups: int) -> Work:
    n, count, width = _sizes(s)
    similarity = cosine_similarity(torch.randn(groups * n, width).to(dtype), [n] * groups)
    cu, cu_picks = _bounds(groups, n), _bounds(groups, count)
    sizes = {"tokens": groups * n, "capacity": groups * count, "repeat": True, "max_seqlen": n}

    def plain() -> Results:
        distance = 1 - similarity.view(groups, n, n)
        nearest, picks = distance.kthvalue(2, dim=1).values, []
        for i in range(count):
            picks.append(nearest.argmax(1, keepdim=True))
            row = distance.gather(1, picks[-1][:, :, None].expand(-1, -1, n))[:, 0]
            nearest = row if i == 0 else torch.minimum(nearest, row)
        return _packed(torch.cat(picks, 1), n)

    return Work(
        lambda: kernels.farthest_points(similarity, cu, cu_picks, **sizes),  # type: ignore[arg-type]
        plain,
        lambda: naive_farthest(similarity, cu, cu_picks, **sizes),  # type: ignore[arg-type]
        nbytes(similarity) * (1 + count / n) + groups * n + 4 * groups * count,
        "byte",
        tolerance=0.0,
    )


def _dpp(s: Sizes, dtype: torch.dtype, groups: int) -> Work:
    n, count, width = _sizes(s)
    features = torch.randn(groups * n, width).to(dtype)
    similarity = cosine_similarity(features, [n] * groups, dtype=torch.float32)
    # Some per cent apart, so that no two gains differ by no more than the rounding of their sums.
    relevance = torch.cat([torch.exp(-0.02 * torch.randperm(n)) for _ in range(groups)])
    cu, cu_picks = _bounds(groups, n), _bounds(groups, count)

    def plain() -> Results:
        quality = relevance.view(groups, n)
        kernel = quality[:, :, None] * similarity.view(groups, n, n) * quality[:, None]
        gain, picks = kernel.diagonal(dim1=1, dim2=2).clone(), []
        factors = torch.zeros(groups, count, n)
        for i in range(count):
            picks.append(pick := gain.argmax(1, keepdim=True))
            row = kernel.gather(1, pick[:, :, None].expand(-1, -1, n))
            before = factors[:, :i]
            at = before.gather(2, pick[:, None].expand(-1, i, -1))
            factor = (row - at.transpose(1, 2) @ before)[:, 0] / gain.gather(1, pick).sqrt()
            factors[:, i] = factor
            gain = (gain - factor * factor).scatter(1, pick, float("-inf"))
        return _packed(torch.cat(picks, 1), n)

    sizes = {"capacity": groups * count, "eps": 1e-5, "max_seqlen": n}
    return Work(
        lambda: kernels.greedy_dpp(similarity, relevance, cu, cu_picks, **sizes),  # type: ignore[arg-type]
        plain,
        lambda: naive_dpp(similarity, relevance, cu, cu_picks, **sizes),  # type: ignore[arg-type]
        # The diagonal, a row of the kernel a pick; what lies between them stays in caches.
        groups * 4 * (2 * n + count * n) + groups * n + 4 * groups * count,
        "byte",
        tolerance=0.0,
    )


def _drop(s: Sizes, dtype: torch.dtype, groups: int) -> Work:
    n, count, width = _sizes(s)
    similarity = cosine_similarity(torch.randn(groups * n, width).to(dtype), [n] * groups)
    cu = _bounds(groups, n)
    lists = torch.stack([torch.randperm(n) for _ in range(groups)])
    order = (lists + torch.arange(groups)[:, None] * n).int().flatten()
    targets = torch.full((groups,), count, dtype=torch.int32)

    def plain() -> Results:
        matrix, left = similarity.view(groups, n, n), lists
        while (drop := min(PER_ROUND, left.shape[1] - count, (left.shape[1] + 1) // 2)) > 0:
            a, b = left[:, 0::2], left[:, 1::2]
            rows = matrix.gather(1, a[:, :, None].expand(-1, -1, n))
            redundancy = rows.gather(2, b[:, None].expand(-1, a.shape[1], -1)).amax(2)
            ranks = redundancy.float().argsort(dim=1, descending=True, stable=True)
            left = torch.cat((a.gather(1, ranks)[:, drop:], b), 1)
        survivors = torch.full((groups, n), -1)
        survivors[:, :count], keep = (x.view(groups, -1) for x in _packed(left, n))
        return survivors.flatten(), keep.flatten()

    sizes = {"tokens": groups * n, "per_round": PER_ROUND, "max_seqlen": n}
    return Work(
        lambda: kernels.drop_duplicates(similarity, cu, order, cu, targets, **sizes),  # type: ignore[arg-type]
        plain,
        lambda: naive_drop(similarity, cu, order, cu, targets, **sizes),  # type: ignore[arg-type]
        nbytes(similarity, order, order) + groups * n,
        "byte",
        tolerance=0.0,
    )


GREEDY: dict[str, Callable[[Sizes, torch.dtype, int], Work]] = {
    "farthest_points": _farthest,
    "greedy_dpp": _dpp,
    "drop_duplicates": _drop,
}


def _add(groups: int, what: str) -> None:
    for op, make in GREEDY.items():

        def build(s: Sizes, dtype: torch.dtype, make=make) -> Work:  # type: ignore[no-untyped-def]
            return make(s, dtype, groups)  # type: ignore[no-any-return]

        REGISTRY.add(op, what, per_model=True)(build)


for _groups, _what in COUNTS.items():
    _add(_groups, _what)

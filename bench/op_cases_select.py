# SPDX-License-Identifier: Apache-2.0
"""The measured rows of the ops that choose tokens and move them together; see `bench.op_cases`."""

from __future__ import annotations

import torch
from torch import Tensor

import glimpse_kernels as kernels
from bench.op_cases import nbytes
from bench.op_registry import REGISTRY, Sizes, Work
from glimpse_kernels.compact.naive import compact as naive_compact
from glimpse_kernels.select_tokens.naive import select_tokens as naive_select


def _select(s: Sizes, pictures: int) -> Work:
    n = pictures * s.image
    logits, group = torch.randn(n), torch.arange(pictures + 1, dtype=torch.int32)
    caps = torch.full((pictures,), s.kept_image, dtype=torch.int32)
    floors = torch.ones_like(caps)
    rows = (torch.arange(n) + s.text * (torch.arange(n) // s.image)).int()
    keep_row = torch.ones(pictures * s.rows, dtype=torch.bool)
    keep_row[rows.long()] = False
    cu, cu_rows = group * s.image, group * s.rows
    options = {
        "threshold": 0.0, "caps": caps, "floors": floors, "forced": None, "token_rows": rows, "row_keep": keep_row,
        "cu_seqlens": cu_rows, "capacity": pictures * s.rows,
    }  # fmt: skip
    long = rows.long()

    def ours() -> tuple[Tensor, ...]:
        found = kernels.select_tokens(logits, cu, **options)  # type: ignore[arg-type]
        return found.keep, found.counts, found.index, found.cu_seqlens

    def truth() -> tuple[Tensor, ...]:
        found = naive_select(logits, cu, **options)  # type: ignore[arg-type]
        return found.keep, found.counts, found.index, found.cu_seqlens

    def plain() -> tuple[Tensor, ...]:
        # All groups have one size here, so torch can do them in one topk; no threshold passes less than the cap.
        best = logits.view(pictures, -1).topk(s.kept_image).indices
        keep = torch.zeros(pictures, s.image, dtype=torch.bool).scatter_(1, best, True)
        stays = keep_row.index_put((long,), keep.flatten())
        return keep.flatten(), keep.sum(1), stays.nonzero(), stays.view(pictures, -1).sum(1).cumsum(0)

    amount = nbytes(logits, rows, keep_row, cu, cu_rows, caps, floors) + n + 4 * pictures * s.rows
    return Work(ours, plain, truth, amount, "byte", tolerance=0.0)


@REGISTRY.add("select_tokens", "1 picture", per_picture=True)
def select_one(s: Sizes, dtype: torch.dtype) -> Work:
    return _select(s, 1)


@REGISTRY.add("select_tokens", "16 pictures", per_picture=True)
def select_many(s: Sizes, dtype: torch.dtype) -> Work:
    return _select(s, 16)


@REGISTRY.add("compact", "keys, values, hidden")
def compact(s: Sizes, dtype: torch.dtype) -> Work:
    shape = (s.cached, s.rows, s.kv_heads, s.dim)
    k, v = (torch.randn(shape).to(dtype) for _ in range(2))
    hidden = torch.randn(s.rows, s.hidden).to(dtype)
    kept = torch.randperm(s.rows)[: s.kept].sort().values
    slots = torch.arange(5, 5 + s.kept)
    index32, slots32 = kept.int(), slots.int()

    def destinations() -> tuple[Tensor, Tensor, Tensor]:
        pools = (torch.zeros(s.cached, 2 * s.rows, s.kv_heads, s.dim, dtype=dtype) for _ in range(2))
        return (*pools, torch.zeros(s.kept, s.hidden, dtype=dtype))  # type: ignore[return-value]

    mine, theirs, right = destinations(), destinations(), destinations()

    def ours() -> tuple[Tensor, ...]:
        kernels.compact(index32, slots32, k, v, mine[0], mine[1], [(hidden, mine[2])])
        return mine

    def plain() -> tuple[Tensor, ...]:
        theirs[0].index_copy_(1, slots, k.index_select(1, kept))
        theirs[1].index_copy_(1, slots, v.index_select(1, kept))
        torch.index_select(hidden, 0, kept, out=theirs[2])
        return theirs

    def truth() -> tuple[Tensor, ...]:
        naive_compact(index32, slots32, k, v, right[0], right[1], [(hidden, right[2])])
        return right

    amount = 2 * s.kept * (2 * nbytes(k) // s.rows + nbytes(hidden) // s.rows) + nbytes(index32, slots32)
    return Work(ours, plain, truth, amount, "byte", tolerance=0.0)

# SPDX-License-Identifier: Apache-2.0
"""The measured rows of the ops that choose tokens and move them together; see `bench.op_cases`."""

from __future__ import annotations

import torch
from torch import Tensor

import glimpse_kernels as kernels
from bench.gpu_targets import ALL_STAY, BOOLEAN, GATHERS, SIXTEEN, SMALL
from bench.op_cases import nbytes
from bench.op_registry import REGISTRY, Results, Sizes, Work
from glimpse_kernels.compact.naive import compact as naive_compact
from glimpse_kernels.select_tokens.naive import select_tokens as naive_select

LOOPED = "a picture at a time"


def _select(s: Sizes, pictures: int, *, together: bool = False, with_loop: bool = False) -> Work:
    """`together`: all pictures are one group, a budget for the whole prompt. `with_loop`: torch also gets them one by one."""
    n, groups = pictures * s.image, 1 if together else pictures
    kept = pictures * s.kept_image // groups
    logits, group = torch.randn(n), torch.arange(pictures + 1, dtype=torch.int32)
    caps = torch.full((groups,), kept, dtype=torch.int32)
    floors = torch.ones_like(caps)
    rows = (torch.arange(n) + s.text * (torch.arange(n) // s.image)).int()
    keep_row = torch.ones(pictures * s.rows, dtype=torch.bool)
    keep_row[rows.long()] = False
    cu, cu_rows = torch.arange(groups + 1, dtype=torch.int32) * (n // groups), group * s.rows
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
        best = logits.view(groups, -1).topk(kept).indices
        keep = torch.zeros(groups, n // groups, dtype=torch.bool).scatter_(1, best, True)
        stays = keep_row.index_put((long,), keep.flatten())
        return keep.flatten(), keep.sum(1), stays.nonzero(), stays.view(pictures, -1).sum(1).cumsum(0)

    def loop() -> tuple[Tensor, ...]:
        """As GlimpsePrune's own code has it: a picture after the other, and the host reads how many pass."""
        masks = []
        for part in logits.view(groups, -1).unbind(0):
            mask = part.sigmoid() > 0.5
            if mask.sum().item() > kept:
                mask = torch.zeros_like(mask).scatter_(0, part.topk(kept).indices, True)
            masks.append(mask)
        keep = torch.cat(masks)
        stays = keep_row.index_put((long,), keep)
        found = stays.nonzero()[:, 0]
        index = torch.full((pictures * s.rows,), -1)
        index[: len(found)] = found
        bounds = torch.zeros(pictures + 1, dtype=torch.int64)
        bounds[1:] = stays.view(pictures, -1).sum(1).cumsum(0)
        return keep, torch.stack([m.sum() for m in masks]), index, bounds

    amount = nbytes(logits, rows, keep_row, cu, cu_rows, caps, floors) + n + 4 * pictures * s.rows
    others = {LOOPED: loop} if with_loop else {}
    return Work(ours, plain, truth, amount, "byte", tolerance=0.0, plain_name="topk", others=others)


@REGISTRY.add("select_tokens", "1 picture", per_picture=True)
def select_one(s: Sizes, dtype: torch.dtype) -> Work:
    return _select(s, 1)


@REGISTRY.add("select_tokens", SIXTEEN, per_picture=True)
def select_many(s: Sizes, dtype: torch.dtype) -> Work:
    return _select(s, 16, with_loop=True)


@REGISTRY.add("select_tokens", f"{SIXTEEN}, one group", per_picture=True, where="gpu")
def select_together(s: Sizes, dtype: torch.dtype) -> Work:
    return _select(s, 16, together=True)


def _compact(s: Sizes, dtype: torch.dtype, rows: int, room: int) -> Work:
    """`rows` rows stay, of which the host knows only that they are `room` at most."""
    shape = (s.cached, s.rows, s.kv_heads, s.dim)
    k, v = (torch.randn(shape).to(dtype) for _ in range(2))
    hidden = torch.randn(s.rows, s.hidden).to(dtype)
    kept = torch.randperm(s.rows)[:rows].sort().values
    slots = torch.arange(5, 5 + rows)
    index32, slots32 = (torch.full((room,), -1, dtype=torch.int32) for _ in range(2))
    index32[:rows], slots32[:rows] = kept.int(), slots.int()

    def destinations() -> tuple[Tensor, Tensor, Tensor]:
        pools = (torch.zeros(s.cached, 2 * s.rows, s.kv_heads, s.dim, dtype=dtype) for _ in range(2))
        return (*pools, torch.zeros(room, s.hidden, dtype=dtype))  # type: ignore[return-value]

    mine, theirs, right = destinations(), destinations(), destinations()

    def ours() -> tuple[Tensor, ...]:
        kernels.compact(index32, slots32, k, v, mine[0], mine[1], [(hidden, mine[2])])
        return mine

    def plain() -> tuple[Tensor, ...]:
        theirs[0].index_copy_(1, slots, k.index_select(1, kept))
        theirs[1].index_copy_(1, slots, v.index_select(1, kept))
        torch.index_select(hidden, 0, kept, out=theirs[2][:rows])
        return theirs

    def truth() -> tuple[Tensor, ...]:
        naive_compact(index32, slots32, k, v, right[0], right[1], [(hidden, right[2])])
        return right

    amount = 2 * rows * (2 * nbytes(k) // s.rows + nbytes(hidden) // s.rows) + nbytes(index32, slots32)
    return Work(ours, plain, truth, amount, "byte", tolerance=0.0)


@REGISTRY.add("compact", "keys, values, hidden")
def compact_kept(s: Sizes, dtype: torch.dtype) -> Work:
    return _compact(s, dtype, s.kept, s.kept)


@REGISTRY.add("compact", "keys, values, hidden, room for all rows", where="gpu")
def compact_with_room(s: Sizes, dtype: torch.dtype) -> Work:
    return _compact(s, dtype, s.kept, s.rows)


@REGISTRY.add("compact", ALL_STAY, where="gpu")
def compact_all(s: Sizes, dtype: torch.dtype) -> Work:
    return _compact(s, dtype, s.rows, s.rows)


@REGISTRY.add("compact", SMALL, per_model=True, where="gpu")
def compact_few(s: Sizes, dtype: torch.dtype) -> Work:
    rows = min(128, s.rows)
    return _compact(s, dtype, rows, rows)


@REGISTRY.add("compact", GATHERS, where="gpu")
def compact_beside_boolean_gathers(s: Sizes, dtype: torch.dtype) -> Work:
    """One launch for all layers, and a mask that indexes keys and values of each layer in turn: every time the host waits for
    the count of what stays, to allocate it."""
    k, v = (torch.randn(s.cached, s.rows, s.kv_heads, s.dim).to(dtype) for _ in range(2))
    hidden = torch.randn(s.rows, s.hidden).to(dtype)
    stays = torch.zeros(s.rows, dtype=torch.bool)
    kept = torch.randperm(s.rows)[: s.kept].sort().values
    stays[kept] = True
    index, slots = kept.int(), torch.arange(s.kept, dtype=torch.int32)
    heads_first = [
        t.transpose(1, 2).contiguous() for t in (k, v)
    ]  # [L, Hkv, T, D]: as torch's attention has its cache

    def buffers() -> tuple[Tensor, Tensor, Tensor]:
        pools = (torch.zeros(s.cached, s.kept, s.kv_heads, s.dim, dtype=dtype) for _ in range(2))
        return (*pools, torch.zeros(s.kept, s.hidden, dtype=dtype))  # type: ignore[return-value]

    mine, theirs, right = buffers(), buffers(), buffers()

    def layers(found: tuple[Tensor, Tensor, Tensor]) -> Results:
        return (*found[0].unbind(0), *found[1].unbind(0), found[2])

    def ours() -> Results:
        kernels.compact(index, slots, k, v, mine[0], mine[1], [(hidden, mine[2])])
        return layers(mine)

    def plain() -> Results:
        torch.index_select(k, 1, kept, out=theirs[0])
        torch.index_select(v, 1, kept, out=theirs[1])
        torch.index_select(hidden, 0, kept, out=theirs[2])
        return layers(theirs)

    def boolean() -> Results:
        parts = [layer[:, stays].transpose(0, 1) for t in heads_first for layer in t.unbind(0)]
        return (*parts, hidden[stays])

    def truth() -> Results:
        naive_compact(index, slots, k, v, right[0], right[1], [(hidden, right[2])])
        return layers(right)

    amount = 2 * s.kept * (2 * nbytes(k) // s.rows + nbytes(hidden) // s.rows) + nbytes(index, slots)
    return Work(
        ours, plain, truth, amount, "byte", tolerance=0.0, plain_name="index_select",
        others={f"{BOOLEAN}, a layer at a time": boolean},
    )  # fmt: skip

# SPDX-License-Identifier: Apache-2.0
"""`drop_duplicates` in Triton: one launch, one program for a group's list from its first round to its last.

A round reads the matrix rows of A, tile by tile and as they lie, and takes the highest entry among the columns that are in B: each
column has the number of the last round in which it was, so that nothing has to be cleared. Then a token of A counts those that come
before it, which is its place in the order: fewer comparisons than the rows had entries, and no sort. Lists, redundancies and
numbers of rounds are in memory, for any thread to read; a list is written beside the one that is read, and a barrier ends each part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from glimpse_kernels._triton import Configs, Launch, chip
from glimpse_kernels._triton_groups import fill, longest_group, matrix_of, places_of

SMALL = 256
"""The longest group for which the smaller tile serves."""


@dataclass(frozen=True)
class Tile(Launch):
    """rows: tokens of A. columns: of the matrix."""

    rows: int = 64
    columns: int = 128


CONFIGS: Configs[Tile] = Configs(
    "drop_duplicates",
    {
        (80, "small"): Tile(warps=8, stages=1, rows=64, columns=64),
        (80, "large"): Tile(warps=16, stages=1, rows=64, columns=128),
    },
    candidates=[
        Tile(warps=warps, stages=1, rows=rows, columns=columns)
        for warps, rows, columns in (
            (4, 32, 64), (8, 32, 128), (8, 64, 64), (8, 64, 128), (16, 32, 256), (16, 64, 128), (16, 64, 256), (16, 128, 128),
        )
    ],
)  # fmt: skip

_LIST = tl.constexpr(1024)
"""Entries of a list that are moved at once."""


@triton.jit
def _put(to, stamps, place, row, live, round, first, n):
    """Rows into a list; those at odd places are in B of this round. What is no row of the group stays in the list alone."""
    tl.store(to + place, row, mask=live)
    mine = live & (place % 2 == 1) & (row >= first) & (row - first < n)
    tl.store(stamps + row, tl.full(row.shape, 0, tl.int32) + round, mask=mine)


@triton.jit(
    do_not_specialize=["groups", "entries", "tokens", "listed", "longest", "per_round"],
    do_not_specialize_on_alignment=["cu_seqlens", "cu_order", "order", "targets"],
)
def drop_duplicates_kernel(
    similarity, cu_seqlens, order, cu_order, targets, lists, worth, stamps, survivors, keep, groups, entries, tokens,
    listed, longest, per_round, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid (groups,). lists: [2, listed] int32. worth: [listed] fp32, the redundancy by place in A. stamps: [tokens] int32,
    the last round in which a row was in B."""
    group = tl.program_id(0)
    first, n, offset = matrix_of(cu_seqlens, group, groups, entries, tokens, longest)
    place, length = places_of(cu_order, group, groups, listed)
    length = tl.minimum(length, n)
    target = tl.maximum(tl.load(targets + group, mask=group < groups, other=0), 0)
    fill(keep, 0, cu_seqlens, group, groups, tokens, _LIST)
    fill(stamps, 0, cu_seqlens, group, groups, tokens, _LIST)
    fill(survivors, -1, cu_order, group, groups, listed, _LIST)
    tl.debug_barrier()

    similarity += offset
    worth += place
    item, side, top = tl.arange(0, _LIST), tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    mine, other = lists + place, lists + listed + place
    round = 1 + 0 * n
    for start in range(0, length, _LIST):
        at = start + item
        row = tl.load(order + place + at, mask=at < length, other=0)
        _put(mine, stamps, at, row, at < length, round, first, n)
    tl.debug_barrier()

    even = (length + 1) // 2
    drop = tl.minimum(per_round, tl.minimum(length - target, even))
    while drop > 0:
        for start in range(0, even, ROWS):
            a = start + top
            row = tl.load(mine + 2 * a, mask=a < even, other=-1)
            inside = (row >= first) & (row - first < n) & (a < even)
            matrix_row = similarity + tl.where(inside, row - first, 0).to(tl.int64) * n
            highest = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
            for left in range(0, n, COLUMNS):
                column = left + side
                in_b = tl.load(stamps + first + column, mask=column < n, other=0) == round
                found = tl.load(
                    matrix_row[:, None] + column[None, :],
                    mask=inside[:, None] & in_b[None, :],
                    other=float("-inf"),
                ).to(tl.float32)
                highest = tl.maximum(highest, tl.where(found == found, found, float("-inf")))
            tl.store(worth + a, tl.max(highest, axis=1), mask=a < even)
        tl.debug_barrier()

        round += 1
        for start in range(0, even, ROWS):
            a = start + top
            own = tl.load(worth + a, mask=a < even, other=float("-inf"))
            row = tl.load(mine + 2 * a, mask=a < even, other=-1)
            before = tl.full([ROWS, COLUMNS], 0, tl.int32)
            for left in range(0, even, COLUMNS):
                b = left + side
                rival = tl.load(worth + b, mask=b < even, other=float("-inf"))
                ahead = rival[None, :] > own[:, None]
                tied = (rival[None, :] == own[:, None]) & (b[None, :] < a[:, None])
                before += (ahead | tied).to(tl.int32)
            to = tl.sum(before, axis=1) - drop
            _put(other, stamps, to, row, (a < even) & (to >= 0), round, first, n)
        tl.debug_barrier()  # a row that is listed twice may be in both parts
        for start in range(0, length - even, _LIST):
            b = start + item
            row = tl.load(mine + 2 * b + 1, mask=b < length - even, other=-1)
            _put(other, stamps, even - drop + b, row, b < length - even, round, first, n)
        tl.debug_barrier()
        mine, other = other, mine
        length -= drop
        even = (length + 1) // 2
        drop = tl.minimum(per_round, tl.minimum(length - target, even))

    for start in range(0, length, _LIST):
        at = start + item
        row = tl.load(mine + at, mask=at < length, other=-1)
        tl.store(survivors + place + at, row, mask=at < length)
        inside = (at < length) & (row >= first) & (row - first < n)
        tl.store(keep + row, tl.full([_LIST], 1, tl.uint8), mask=inside)


def drop_duplicates(
    similarity: Tensor,
    cu_seqlens: Tensor,
    order: Tensor,
    cu_order: Tensor,
    targets: Tensor,
    *,
    tokens: int,
    per_round: int,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor]:
    """See `glimpse_kernels.drop_duplicates`; arguments are checked there."""
    device = similarity.device
    entries, listed, groups = similarity.shape[0], order.shape[0], cu_seqlens.shape[0] - 1
    longest = longest_group(entries, tokens, max_seqlen)
    survivors = torch.empty_like(order)
    keep = torch.empty(tokens, dtype=torch.bool, device=device)
    lists = torch.empty(2 * listed, dtype=torch.int32, device=device)
    worth = torch.empty(listed, dtype=torch.float32, device=device)
    stamps = torch.empty(tokens, dtype=torch.int32, device=device)
    tile = CONFIGS.pick(chip(device).capability, "small" if longest <= SMALL else "large")
    drop_duplicates_kernel[(max(1, groups),)](
        similarity, cu_seqlens, order, cu_order, targets, lists, worth, stamps, survivors, keep.view(torch.uint8), groups,
        entries, tokens, listed, longest, min(per_round, max(listed, 1)), ROWS=tile.rows, COLUMNS=tile.columns,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return survivors, keep

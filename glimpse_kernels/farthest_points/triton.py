# SPDX-License-Identifier: Apache-2.0
"""`farthest_points` in Triton: max-min selection in two launches.

The first pick needs every entry of the matrix once (the second-smallest distance of each column), so programs that take a few columns
each share them. Every later pick needs one row, the running minimum and an argmax: a chain of latencies, for which a group has one
program from beginning to end. The minimum stays in registers where the group fits; a longer one keeps it in memory, in two halves that
take turns: what a step reads is written in none but the step before, with a barrier between them, whichever thread owns what.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from glimpse_kernels._triton import Configs, Launch, chip, power_of_2
from glimpse_kernels._triton_groups import fill, longest_group, matrix_of, places_of

LEAST_BLOCK, MOST_BLOCK = 512, 8192
"""Columns that a program has at once."""

CONFIGS: Configs[Launch] = Configs(
    "farthest_points",
    {
        (80, 512): Launch(warps=4, stages=1),
        (80, 1024): Launch(warps=4, stages=1),
        (80, 2048): Launch(warps=8, stages=1),
        (80, 4096): Launch(warps=8, stages=1),
        (80, 8192): Launch(warps=16, stages=1),
    },
    candidates=[Launch(warps=warps, stages=1) for warps in (2, 4, 8, 16)],
)

ROWS, COLUMNS = 64, 32
"""Sides of a tile of the first launch."""

_LEAST = tl.constexpr(-3.4028234663852886e38)
"""The lowest finite fp32."""


@triton.jit
def _distance(similarity):
    """1 - s as torch rounds it, in fp32; what is no number is the least distance."""
    distance = (1.0 - similarity.to(tl.float32)).to(similarity.dtype).to(tl.float32)
    return tl.where(distance >= _LEAST, distance, _LEAST)


@triton.jit(
    do_not_specialize=["groups", "entries", "tokens", "longest", "tiles"],
    do_not_specialize_on_alignment=["cu_seqlens"],
)
def farthest_points_nearest_kernel(
    similarity, cu_seqlens, nearest, groups, entries, tokens, longest, tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """nearest [tokens]: the second-smallest distance of each column, the only one of a group of one token.
    Grid (groups * tiles of columns,)."""
    group = tl.program_id(0) // tiles
    left = tl.program_id(0) % tiles * COLUMNS
    first, n, offset = matrix_of(cu_seqlens, group, groups, entries, tokens, longest)
    if left < n:
        column = left + tl.arange(0, COLUMNS)
        least = tl.full([ROWS, COLUMNS], float("inf"), tl.float32)
        second = tl.full([ROWS, COLUMNS], float("inf"), tl.float32)
        for top in range(0, n, ROWS):
            row = top + tl.arange(0, ROWS)
            inside = (row[:, None] < n) & (column[None, :] < n)
            address = similarity + offset + row.to(tl.int64)[:, None] * n + column[None, :]
            distance = _distance(tl.load(address, mask=inside, other=0.0))
            distance = tl.where(inside, distance, float("inf"))
            second = tl.minimum(second, tl.maximum(least, distance))
            least = tl.minimum(least, distance)
        lowest = tl.min(least, axis=0)
        at_lowest = least == lowest[None, :]
        next_one = tl.min(tl.where(at_lowest, float("inf"), least), axis=0)
        next_one = tl.minimum(next_one, tl.min(second, axis=0))
        twice = tl.sum(at_lowest.to(tl.int32), axis=0) > 1
        found = tl.where(twice | (n == 1), lowest, next_one)
        tl.store(nearest + first + column, found, mask=column < n)


@triton.jit(
    do_not_specialize=["groups", "entries", "tokens", "capacity", "longest"],
    do_not_specialize_on_alignment=["cu_seqlens", "cu_picks"],
)
def farthest_points_kernel(
    similarity, cu_seqlens, cu_picks, nearest, states, picks, keep, groups, entries, tokens, capacity, longest,
    REPEAT: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (groups,). WHOLE: every group fits a block. Else states: [2, tokens] fp32, the running minimum."""
    group = tl.program_id(0)
    first, n, offset = matrix_of(cu_seqlens, group, groups, entries, tokens, longest)
    place, count = places_of(cu_picks, group, groups, capacity)
    if not REPEAT:
        count = tl.minimum(count, n)
    count = tl.where(n > 0, count, 0)
    fill(keep, 0, cu_seqlens, group, groups, tokens, BLOCK)
    fill(picks, -1, cu_picks, group, groups, capacity, BLOCK)
    tl.debug_barrier()  # picks are written where other threads have filled

    similarity += offset
    nearest += first
    item = tl.arange(0, BLOCK)
    if WHOLE:
        inside = item < n
        least = tl.load(nearest + item, mask=inside, other=float("-inf"))
        for i in range(count):
            pick = tl.argmax(least, axis=0)  # the first of the largest
            tl.store(picks + place + i, first + pick)
            tl.store(keep + first + pick, 1)
            row = tl.load(similarity + pick.to(tl.int64) * n + item, mask=inside, other=0.0)
            distance = tl.where(inside, _distance(row), float("-inf"))
            if not REPEAT:
                distance = tl.where(item == pick, float("-inf"), distance)
            # The first choice was made by the distance to any other token; from now on the picked ones count.
            least = tl.where(i == 0, distance, tl.minimum(least, distance))
    else:
        states += first
        pick = 0 * n
        for i in range(count):
            # Each lane's best column; the argmax over lanes comes once, at the end.
            best = tl.full([BLOCK], float("-inf"), tl.float32)
            where = tl.full([BLOCK], 0, tl.int32)
            before = states + (i + 1) % 2 * tokens
            behind = states + i % 2 * tokens
            # The first step has but what the first launch found, the second one nothing before its row.
            fresh, known, older = tl.where(i == 0, n, 0), tl.where(i == 0, 0, n), tl.where(i > 1, n, 0)
            for start in range(0, n, BLOCK):
                column = start + item
                row = similarity + pick.to(tl.int64) * n
                distance = _distance(tl.load(row + column, mask=column < known, other=0.0))
                if not REPEAT:
                    distance = tl.where(column == pick, float("-inf"), distance)
                old = tl.load(before + column, mask=column < older, other=float("inf"))
                least = tl.minimum(old, distance)
                tl.store(behind + column, least, mask=column < known)
                first_choice = tl.load(nearest + column, mask=column < fresh, other=float("-inf"))
                value = tl.where(column < known, least, first_choice)
                where = tl.where(value > best, column, where)
                best = tl.maximum(best, value)
            top = tl.max(best, axis=0)
            pick = tl.min(tl.where(best == top, where, 2147483647), axis=0)
            tl.store(picks + place + i, first + pick)
            tl.store(keep + first + pick, 1)
            tl.debug_barrier()  # the next step reads what other threads have written


def farthest_points(
    similarity: Tensor,
    cu_seqlens: Tensor,
    cu_picks: Tensor,
    *,
    tokens: int,
    capacity: int,
    repeat: bool,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor]:
    """See `glimpse_kernels.farthest_points`; arguments are checked there."""
    device = similarity.device
    entries, groups = similarity.shape[0], cu_seqlens.shape[0] - 1
    longest = longest_group(entries, tokens, max_seqlen)
    picks = torch.empty(capacity, dtype=torch.int32, device=device)
    keep = torch.empty(tokens, dtype=torch.bool, device=device)
    nearest = torch.empty(tokens, dtype=torch.float32, device=device)
    block = min(max(power_of_2(max(longest, 1)), LEAST_BLOCK), MOST_BLOCK)
    whole = longest <= block
    states = nearest if whole else torch.empty(2 * tokens, dtype=torch.float32, device=device)
    tiles = triton.cdiv(longest, COLUMNS)
    if groups * tiles > 0:
        farthest_points_nearest_kernel[(groups * tiles,)](
            similarity, cu_seqlens, nearest, groups, entries, tokens, longest, tiles,
            ROWS=ROWS, COLUMNS=COLUMNS, num_warps=8, num_stages=1,
        )  # fmt: skip
    launch = CONFIGS.pick(chip(device).capability, block)
    farthest_points_kernel[(max(1, groups),)](
        similarity, cu_seqlens, cu_picks, nearest, states, picks, keep.view(torch.uint8), groups, entries, tokens, capacity,
        longest, REPEAT=repeat, WHOLE=whole, BLOCK=block, num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return picks, keep

# SPDX-License-Identifier: Apache-2.0
"""`greedy_dpp` in Triton: one launch, one program for a group from its first pick to its last.

A step is an argmax of the gains, one row of the kernel, and the product of the pick's own c with those of each column, the only part
that grows with the picks. The c lie in memory, a row a pick: each is written once, and there is a barrier before it is read. Gains stay in
registers where the group fits; a longer one keeps them in memory, in two halves that take turns: what a step reads is written in none but
the step before. Sums run over the picks in their order, products and differences are rounded apart: the result is the same in any layout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from glimpse_kernels._triton import Configs, Launch, chip, power_of_2
from glimpse_kernels._triton_groups import fill, longest_group, matrix_of, places_of

LEAST_BLOCK, MOST_BLOCK = 512, 4096
"""Columns that a program has at once."""


@dataclass(frozen=True)
class Rows(Launch):
    """flight: rows of c that are under way together."""

    flight: int = 8


CONFIGS: Configs[Rows] = Configs(
    "greedy_dpp",
    {
        (80, 512): Rows(warps=4, stages=1, flight=8),
        (80, 1024): Rows(warps=8, stages=1, flight=8),
        (80, 2048): Rows(warps=16, stages=1, flight=8),
        (80, 4096): Rows(warps=16, stages=1, flight=4),
    },
    candidates=[Rows(warps=warps, stages=1, flight=flight) for warps in (4, 8, 16) for flight in (4, 8, 16)],
)


@triton.jit
def _factor(
    row, quality, factors, stride, t, pick, gain, column, n, FLIGHT: tl.constexpr, BLOCK: tl.constexpr
):
    """The c of these columns for pick number t: what of its row of the kernel the picks before do not explain."""
    similar = tl.load(row + column, mask=column < n, other=0.0)
    entry = tl.load(quality + pick) * similar * tl.load(quality + column, mask=column < n, other=0.0)
    total = tl.full([BLOCK], 0.0, tl.float32)
    whole_fours = (n + 3) // 4 * 4
    for start in range(0, t, FLIGHT):
        for i in tl.static_range(FLIGHT):
            before = factors + (start + i) * stride
            columns = tl.where(start + i < t, whole_fours, 0)
            own = tl.load(before + pick, mask=pick < columns, other=0.0)
            c = tl.load(before + column, mask=column < columns, other=0.0)
            total = tl.fma(own, c, total)
    return tl.div_rn(entry - total, tl.sqrt_rn(gain))


@triton.jit(
    do_not_specialize=["groups", "entries", "tokens", "capacity", "longest", "stride"],
    do_not_specialize_on_alignment=["cu_seqlens", "cu_picks"],
)
def greedy_dpp_kernel(
    similarity, relevance, cu_seqlens, cu_picks, factors, states, picks, keep, groups, entries, tokens, capacity, longest,
    stride, eps, WHOLE: tl.constexpr, FLIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (groups,). factors: [capacity, stride] fp32, c by pick. WHOLE: every group fits a block. Else states: [3, tokens]
    fp32, the gains twice and the floors."""
    group = tl.program_id(0)
    first, n, offset = matrix_of(cu_seqlens, group, groups, entries, tokens, longest)
    place, count = places_of(cu_picks, group, groups, capacity)
    count = tl.minimum(count, n)
    fill(keep, 0, cu_seqlens, group, groups, tokens, BLOCK)
    fill(picks, -1, cu_picks, group, groups, capacity, BLOCK)

    similarity += offset
    quality = relevance + first
    stride = tl.multiple_of(stride.to(tl.int64), 4)
    factors += place * stride
    whole_fours = (
        (n + 3) // 4 * 4
    )  # of columns of c, to be moved sixteen bytes at a time; those behind the last token are 0
    item = tl.arange(0, BLOCK)
    t = 0 * n
    if WHOLE:
        tl.debug_barrier()  # picks are written where other threads have filled
        inside = item < n
        own = tl.load(quality + item, mask=inside, other=0.0)
        gain = own * tl.load(similarity + item.to(tl.int64) * (n + 1), mask=inside, other=0.0) * own
        floor = eps * gain
        while t < count:
            top, pick = tl.max(
                tl.where(gain > floor, gain, float("-inf")), axis=0, return_indices=True
            )  # the first of the largest
            if top > float("-inf"):
                tl.store(picks + place + t, first + pick)
                tl.store(keep + first + pick, 1)
                row = similarity + pick.to(tl.int64) * n
                c = _factor(row, quality, factors, stride, t, pick, top, item, n, FLIGHT, BLOCK)
                tl.store(factors + t * stride + item, c, mask=item < whole_fours)
                gain = tl.where(item == pick, float("-inf"), gain - c * c)
                t += 1
                tl.debug_barrier()  # the next step reads what other threads have written
            else:
                count = t
    else:
        states += first
        floors = states + 2 * tokens
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        where = tl.full([BLOCK], 0, tl.int32)
        for start in range(0, n, BLOCK):
            column = start + item
            inside = column < n
            own = tl.load(quality + column, mask=inside, other=0.0)
            gain = own * tl.load(similarity + column.to(tl.int64) * (n + 1), mask=inside, other=0.0) * own
            floor = eps * gain
            tl.store(states + column, gain, mask=inside)
            tl.store(floors + column, floor, mask=inside)
            better = (gain > floor) & (gain > best)
            where = tl.where(better, column, where)
            best = tl.where(better, gain, best)
        tl.debug_barrier()
        while t < count:
            top = tl.max(best, axis=0)
            if top > float("-inf"):
                pick = tl.min(tl.where(best == top, where, 2147483647), axis=0)
                tl.store(picks + place + t, first + pick)
                tl.store(keep + first + pick, 1)
                row = similarity + pick.to(tl.int64) * n
                before = states + t % 2 * tokens
                behind = states + (t + 1) % 2 * tokens
                best = tl.full([BLOCK], float("-inf"), tl.float32)
                for start in range(0, n, BLOCK):
                    column = start + item
                    inside = column < n
                    c = _factor(row, quality, factors, stride, t, pick, top, column, n, FLIGHT, BLOCK)
                    tl.store(factors + t * stride + column, c, mask=column < whole_fours)
                    gain = tl.load(before + column, mask=inside, other=float("-inf"))
                    gain = tl.where(column == pick, float("-inf"), gain - c * c)
                    tl.store(behind + column, gain, mask=inside)
                    floor = tl.load(floors + column, mask=inside, other=0.0)
                    better = (gain > floor) & (gain > best)
                    where = tl.where(better, column, where)
                    best = tl.where(better, gain, best)
                t += 1
                tl.debug_barrier()  # the next step reads what other threads have written
            else:
                count = t


def greedy_dpp(
    similarity: Tensor,
    relevance: Tensor,
    cu_seqlens: Tensor,
    cu_picks: Tensor,
    *,
    capacity: int,
    eps: float,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor]:
    """See `glimpse_kernels.greedy_dpp`; arguments are checked there."""
    device = similarity.device
    entries, tokens, groups = similarity.shape[0], relevance.shape[0], cu_seqlens.shape[0] - 1
    longest = longest_group(entries, tokens, max_seqlen)
    picks = torch.empty(capacity, dtype=torch.int32, device=device)
    keep = torch.empty(tokens, dtype=torch.bool, device=device)
    stride = (longest + 3) // 4 * 4
    factors = torch.empty(capacity * stride, dtype=torch.float32, device=device)
    block = min(max(power_of_2(max(longest, 1)), LEAST_BLOCK), MOST_BLOCK)
    whole = longest <= block
    states = factors if whole else torch.empty(3 * tokens, dtype=torch.float32, device=device)
    launch = CONFIGS.pick(chip(device).capability, block)
    greedy_dpp_kernel[(max(1, groups),)](
        similarity, relevance, cu_seqlens, cu_picks, factors, states, picks, keep.view(torch.uint8), groups, entries,
        tokens, capacity, longest, stride, float(eps), WHOLE=whole, FLIGHT=launch.flight, BLOCK=block,
        num_warps=launch.warps, num_stages=launch.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return picks, keep

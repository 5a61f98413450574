# SPDX-License-Identifier: Apache-2.0
"""`select_tokens` in Triton: threshold, cap, floor, anchors, index and new cu_seqlens in one launch.

What a group keeps before its forced tokens is always its best k, k = max(min(above, cap), floor), so a group needs one number, its
cut: scores become integers of the same order, and where k is not the threshold's own count, a search over these integers
narrows the cut down, two counts over the group a round, until exactly k tokens lie above it or only equals are left, of which the
first ones stay. The search works on registers (groups larger than a tile re-read the rest of their logits, from the cache) and
ends after some ten rounds on scores that differ.

With one or two groups a single program does everything. With more, there is a program for each group and, behind them, one for
each stripe of packed rows, which waits until all groups have marked the rows that stay, counts its own, and takes its
offset from the counts of the stripes before it. Programs take a ticket first: whoever waits, waits for lower tickets only, whose
programs run already, so this ends however few programs the GPU runs at a time. Tickets and counts are integers; the result does
not depend on who comes when. Their memory has to be zero at the start: a small fill before the launch, and the only other
thing on the stream. It belongs to this one call, so calls on other streams or graphs that replay side by side never share it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from glimpse_kernels._triton import Configs, Launch, chip
from glimpse_kernels.select_tokens.selection import Selection

MOST_ALONE = 2
"""Groups that one program does alone."""


@dataclass(frozen=True)
class TileLaunch(Launch):
    """tokens: of a group that fit the registers of a program. rows: packed rows of a stripe."""

    tokens: int = 4096
    rows: int = 4096


SMALL = 1024
"""Tokens, of all groups if one program is alone, else of the mean group, up to which the smaller tile serves."""

CONFIGS: Configs[TileLaunch] = Configs(
    "select_tokens",
    {
        (80, "alone small"): TileLaunch(warps=8, stages=1, tokens=1024, rows=2048),
        (80, "alone"): TileLaunch(warps=16, stages=1, tokens=4096, rows=4096),
        (80, "small"): TileLaunch(warps=8, stages=1, tokens=1024, rows=2048),
        (80, "large"): TileLaunch(warps=16, stages=1, tokens=4096, rows=4096),
    },
    candidates=[
        TileLaunch(warps=warps, stages=1, tokens=tokens, rows=rows)
        for tokens, rows, warps in (
            (1024, 1024, 4), (1024, 2048, 4), (1024, 2048, 8), (2048, 2048, 8), (2048, 4096, 16), (4096, 2048, 8),
            (4096, 2048, 16), (4096, 4096, 8), (4096, 4096, 16), (4096, 8192, 8), (4096, 8192, 16),
            (8192, 4096, 16), (8192, 8192, 16),
        )
    ],
)  # fmt: skip

_LEAST = tl.constexpr(-(2**31))
_MOST = tl.constexpr(2**31 - 1)
_KEY_OF_MINUS_INF = tl.constexpr(-0x7F800001)
_ABOVE_ALL_KEYS = tl.constexpr(0x7F800001)
_LOOK_BACK = tl.constexpr(64)
_MISSING = tl.constexpr(2**24)
"""More than the rows of so many stripes, and 32 bits hold it as often."""
_SEQUENCES = tl.constexpr(64)


@triton.jit
def _key(score):
    """Order-preserving: key(a) < key(b) exactly if a < b. NaN gets the key of -inf, -0 that of +0."""
    score = tl.where(score == score, score, float("-inf"))
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _keys(logits, item, n):
    """Keys of these tokens of the group; behind its end, one below all others."""
    score = tl.load(logits + item, mask=item < n, other=0.0)
    return tl.where(item < n, _key(score), _LEAST)


@triton.jit
def _reach(keys, a, b):
    """1 for a key of at least a, 1 << 16 more if it is at least b."""
    return (keys >= a).to(tl.int32) + ((keys >= b).to(tl.int32) << 16)


@triton.jit
def _count(first, logits, n, a, b, TOKENS: tl.constexpr):
    """How many keys are at least a (lower half) and b (upper half). `first`: keys of the first tile."""
    a, b = a.to(tl.int32), b.to(tl.int32)
    found = _reach(first, a, b)
    start = TOKENS
    while start < n:
        found += _reach(_keys(logits, start + tl.arange(0, TOKENS), n), a, b)
        start += TOKENS
    return tl.sum((found & 0xFFFF).to(tl.int64) + ((found >> 16).to(tl.int64) << 32))


@triton.jit
def _find_cut(first, logits, n, k, above, limit, TOKENS: tl.constexpr):
    """Where the best k of n end: (cut, ties), all tokens with a key above `cut` and the first `ties` with this one.
    `limit`: key of the threshold, which `above` tokens exceed, more or less than k."""
    capped = k < above
    low = tl.where(capped, limit + 1, _KEY_OF_MINUS_INF).to(tl.int64)
    high = tl.where(capped, _ABOVE_ALL_KEYS, limit + 1).to(tl.int64)
    at_low = tl.where(capped, above, n).to(tl.int64)
    at_high = tl.where(capped, 0, above).to(tl.int64)
    # At least k tokens reach `low`, fewer reach `high`.
    while (high - low > 1) & (at_low != k):
        third = (high - low + 2) // 3
        a, b = low + third, high - third
        both = _count(first, logits, n, a, b, TOKENS)
        at_a, at_b = both & 0xFFFFFFFF, both >> 32
        reach_a, reach_b = at_a >= k, at_b >= k
        high = tl.where(reach_b, high, tl.where(reach_a, b, a))
        at_high = tl.where(reach_b, at_high, tl.where(reach_a, at_b, at_a))
        low = tl.where(reach_b, b, tl.where(reach_a, a, low))
        at_low = tl.where(reach_b, at_b, tl.where(reach_a, at_a, at_low))
    exact = at_low == k
    return tl.where(exact, low - 1, low).to(tl.int32), tl.where(exact, 0, k - at_high).to(tl.int32)


@triton.jit
def _select_group(
    group,
    logits,
    cu_groups,
    caps,
    floors,
    forced,
    token_rows,
    rows,
    keep,
    counts,
    flags,
    threshold,
    TOKENS: tl.constexpr,
):
    """Decides one group: its part of `keep`, its count, and a mark in `flags` at the packed row of each token that stays."""
    begin = tl.load(cu_groups + group)
    n = tl.load(cu_groups + group + 1) - begin
    logits += begin
    token_rows += begin
    keep += begin
    item = tl.arange(0, TOKENS)
    keys = _keys(logits, item, n)
    places = tl.load(token_rows + item, mask=item < n, other=-1)

    limit = _key(threshold)
    above = (_count(keys, logits, n, limit + 1, limit + 1, TOKENS) >> 32).to(tl.int32)
    cap = tl.load(caps + group)
    floor = tl.load(floors + group)
    k = tl.maximum(tl.minimum(above, tl.maximum(cap, 0)), tl.minimum(floor, n))
    cut = tl.where(k == above, limit, tl.where(k <= 0, _MOST, _LEAST))
    ties = k * 0
    if (k != above) & (k > 0) & (k < n):
        cut, ties = _find_cut(keys, logits, n, k, above, limit, TOKENS)

    start, count, seen = 0 * n, 0 * n, 0 * n
    while start < n:
        stay = keys > cut
        if ties > 0:
            tied = (keys == cut).to(tl.int32)
            stay = stay | ((tied > 0) & (seen + tl.cumsum(tied, 0) <= ties))
            seen += tl.sum(tied)
        inside = start + item < n
        if forced is not None:
            stay = stay | (tl.load(forced + begin + start + item, mask=inside, other=0) != 0)
        stay = stay & inside
        tl.store(keep + start + item, stay, mask=inside)
        tl.store(flags + places, tl.full((TOKENS,), 1, tl.int8), mask=stay & (places >= 0) & (places < rows))
        count += tl.sum(stay.to(tl.int32))
        start += TOKENS
        if start < n:
            keys = _keys(logits, start + item, n)
        places = tl.load(token_rows + start + item, mask=start + item < n, other=-1)
    tl.store(counts + group, count)


@triton.jit
def _place_rows(first, base, own, rows, cu_seqlens, sequences, index, cu_out, capacity, ROWS: tl.constexpr):
    """Writes what follows from the stripe of rows at `first`, of which those in `own` stay, behind `base` others.

    A row that goes writes the -1 of its place behind the last row that stays, counted from the end."""
    row = first + tl.arange(0, ROWS)
    through = tl.cumsum(own, 0)
    before = base + through - own
    place = tl.where(own > 0, before, rows - 1 - (row - before))
    tl.store(index + place, tl.where(own > 0, row, -1), mask=(row < rows) & (place < capacity))
    segment = 0 * sequences
    while segment <= sequences:
        which = segment + tl.arange(0, _SEQUENCES)
        bound = tl.load(cu_seqlens + which, mask=which <= sequences, other=-1)
        bound = tl.minimum(bound, rows)
        # A bound belongs to the stripe of the row before it, the bound 0 to the first stripe.
        inside = (bound > tl.where(first == 0, -1, first)) & (bound <= first + ROWS)
        kept = base + tl.gather(through, tl.where(inside & (bound > 0), bound - first - 1, 0), 0)
        tl.store(cu_out + which, tl.where(bound == 0, 0, kept), mask=inside)
        segment += _SEQUENCES


@triton.jit
def _fill_rest(part, parts, rows, index, capacity, ROWS: tl.constexpr):
    """-1 in the index behind as many entries as there are rows, each program its share."""
    start = rows + part * ROWS
    while start < capacity:
        item = start + tl.arange(0, ROWS)
        tl.store(index + item, tl.full((ROWS,), -1, tl.int32), mask=item < capacity)
        start += parts * ROWS


@triton.jit
def _rows_that_stay(first, rows, row_keep, flags, ROWS: tl.constexpr):
    row = first + tl.arange(0, ROWS)
    always = tl.load(row_keep + row, mask=row < rows, other=0)
    # Marks of other programs: from the cache that all share.
    marked = tl.load(flags + row, mask=row < rows, other=0, cache_modifier=".cg")
    return ((always != 0) | (marked != 0)).to(tl.int32)


@triton.jit
def _look_back(stripes, back, part):
    """How many rows stay in the next stripes from `back` on and before `part`, and `_MISSING` more for each yet unknown.

    In one sum: there are more threads than entries, the copies of one entry are read at different times and may differ. Any of
    them is a true answer, but two sums could take it from two."""
    other = back + tl.arange(0, _LOOK_BACK)
    found = tl.load(stripes + other, mask=other < part, other=1, volatile=True)
    return tl.sum(tl.where(found == 0, _MISSING, found - 1))


# Rows stay one to a lane: if bytes were known to be aligned, threads would take 16 neighbours each, and the scan and the
# stores behind it would pay for the exchange. What is read a number at a time gains nothing from its alignment, and callers pass
# rows of one small tensor, whose alignment changes with the number of groups.
@triton.jit(
    do_not_specialize=["groups", "rows", "sequences", "capacity", "parts", "header"],
    do_not_specialize_on_alignment=["row_keep", "cu_groups", "caps", "floors", "cu_seqlens"],
)
def select_tokens_kernel(
    logits,
    cu_groups,
    caps,
    floors,
    forced,
    token_rows,
    row_keep,
    cu_seqlens,
    keep,
    counts,
    index,
    cu_out,
    work,
    threshold,
    groups,
    rows,
    sequences,
    capacity,
    parts,
    header,
    ALONE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """work: int32. `header` bytes (next ticket, groups done, 1 + rows that stay in each stripe), then a byte for each row.
    Zero at the start unless ALONE, when there is one program and no header."""
    flags = work.to(tl.pointer_type(tl.int8)) + header
    if ALONE:
        at = 0 * rows
        while at * 4 < rows:
            word = at + tl.arange(0, ROWS)
            tl.store(work + word, tl.full((ROWS,), 0, tl.int32), mask=word * 4 < rows)
            at += ROWS
        tl.debug_barrier()
        group = 0 * groups
        while group < groups:
            _select_group(
                group, logits, cu_groups, caps, floors, forced, token_rows, rows, keep, counts, flags, threshold, TOKENS
            )  # fmt: skip
            group += 1
        tl.debug_barrier()
        base, part = 0 * rows, 0 * rows
        own = _rows_that_stay(0, rows, row_keep, flags, ROWS)
        while part < parts:
            following = _rows_that_stay((part + 1) * ROWS, rows, row_keep, flags, ROWS)
            total = tl.sum(own)
            _place_rows(
                part * ROWS, base, own, rows, cu_seqlens, sequences, index, cu_out, capacity, ROWS
            )  # fmt: skip
            base += total
            own = following
            part += 1
        _fill_rest(0, 1, rows, index, capacity, ROWS)
    else:
        ticket = tl.atomic_add(work, 1, sem="relaxed")
        if ticket < groups:
            _select_group(
                ticket, logits, cu_groups, caps, floors, forced, token_rows, rows, keep, counts, flags, threshold, TOKENS
            )  # fmt: skip
            tl.debug_barrier()  # all threads have marked their rows before one of them says so
            tl.atomic_add(work + 1, 1, sem="release")
        else:
            part = ticket - groups
            _fill_rest(part, parts, rows, index, capacity, ROWS)
            done = tl.atomic_add(work + 1, 0, sem="acquire")
            while done < groups:
                done = tl.atomic_add(work + 1, 0, sem="acquire")
            tl.debug_barrier()
            own = _rows_that_stay(part * ROWS, rows, row_keep, flags, ROWS)
            total = tl.sum(own)
            stripes = work + 2
            tl.atomic_xchg(stripes + part, total + 1, sem="relaxed")
            base, back = 0 * rows, 0 * rows
            while back < part:
                seen = _look_back(stripes, back, part)
                while seen >= _MISSING:
                    seen = _look_back(stripes, back, part)
                base += seen
                back += _LOOK_BACK
            _place_rows(
                part * ROWS, base, own, rows, cu_seqlens, sequences, index, cu_out, capacity, ROWS
            )  # fmt: skip


def select_tokens(
    logits: Tensor,
    cu_groups: Tensor,
    *,
    threshold: float,
    caps: Tensor,
    floors: Tensor,
    forced: Tensor | None,
    token_rows: Tensor,
    row_keep: Tensor,
    cu_seqlens: Tensor,
    capacity: int,
) -> Selection:
    """See `glimpse_kernels.select_tokens`; arguments are checked there. Their values are not: that would make the host wait."""
    tokens, groups = logits.shape[0], cu_groups.shape[0] - 1
    rows, sequences = row_keep.shape[0], cu_seqlens.shape[0] - 1
    device = logits.device
    alone = groups <= MOST_ALONE
    small = tokens <= SMALL * (1 if alone else groups)
    key = ("alone small" if small else "alone") if alone else "small" if small else "large"
    config = CONFIGS.pick(chip(device).capability, key)
    parts = max(1, triton.cdiv(rows, config.rows))
    header = 0 if alone else 4 * (2 + parts)
    words = triton.cdiv(header + rows, 4)
    work = (torch.empty if alone else torch.zeros)(words, dtype=torch.int32, device=device)
    keep = torch.empty(tokens, dtype=torch.bool, device=device)
    counts = torch.empty(groups, dtype=torch.int32, device=device)
    index = torch.empty(capacity, dtype=torch.int32, device=device)
    cu_out = torch.empty(sequences + 1, dtype=torch.int32, device=device)
    threshold = float(threshold)  # an integer would be a kernel of its own, and 1 a constant in it
    if abs(threshold) > _LARGEST:
        threshold = math.copysign(math.inf, threshold)
    select_tokens_kernel[(1 if alone else groups + parts,)](
        logits, cu_groups, caps, floors, forced, token_rows, row_keep, cu_seqlens, keep, counts, index, cu_out, work,
        threshold, groups, rows, sequences, capacity, parts, header,
        ALONE=alone, TOKENS=config.tokens, ROWS=config.rows, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return Selection(keep=keep, counts=counts, index=index, cu_seqlens=cu_out)


_LARGEST = float(torch.finfo(torch.float32).max)
"""A float argument of a kernel has to fit fp32."""

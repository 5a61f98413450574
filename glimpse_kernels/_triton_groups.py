# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels that choose in the packed matrices of groups share (`farthest_points`, `greedy_dpp`, `drop_duplicates`).

One program takes a group from its first step to its last. Its steps hand numbers on through global memory, where one thread reads what
another one wrote: between the two there is always a barrier, and what is written in a step lies apart from what the same step reads.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

_GROUPS = tl.constexpr(64)
"""Groups whose lengths are read at once."""


def longest_group(entries: int, tokens: int, max_seqlen: int | None) -> int:
    """The most tokens that a group can have, from shapes alone: its matrix is in the entries."""
    found = min(math.isqrt(entries), tokens)
    return found if max_seqlen is None else min(found, max_seqlen)


@triton.jit
def matrix_of(cu_seqlens, group, groups, entries, tokens, longest):
    """First row of a group, its length, and where its matrix starts. Sizes that do not fit the tensors or the launch make a group of
    no tokens: nothing outside is touched."""
    first = tl.load(cu_seqlens + group, mask=group < groups, other=0)
    end = tl.load(cu_seqlens + group + 1, mask=group < groups, other=0)
    squares = tl.full([_GROUPS], 0, tl.int64)
    for start in range(0, group, _GROUPS):
        before = start + tl.arange(0, _GROUPS)
        low = tl.load(cu_seqlens + before, mask=before < group, other=0)
        high = tl.load(cu_seqlens + before + 1, mask=before < group, other=0)
        length = (high - low).to(tl.int64)
        squares += length * length
    offset = tl.sum(squares)
    n = end - first
    size = n.to(tl.int64) * n
    fits = (first >= 0) & (n >= 0) & (end <= tokens) & (n <= longest) & (offset + size <= entries)
    return first, tl.where(fits, n, 0), offset


@triton.jit
def places_of(cu_places, group, groups, capacity):
    """Where the picks, or the list, of a group start, and how many there is room for."""
    place = tl.load(cu_places + group, mask=group < groups, other=0)
    end = tl.load(cu_places + group + 1, mask=group < groups, other=0)
    place = tl.minimum(tl.maximum(place, 0), capacity)
    return place, tl.minimum(tl.maximum(end, place), capacity) - place


@triton.jit
def fill(what, value: tl.constexpr, cu, group, groups, total, BLOCK: tl.constexpr):
    """Fills the part of `what` that belongs to this group, and with the first and the last one what belongs to none."""
    begin = tl.load(cu + group, mask=(group > 0) & (group < groups), other=0)
    end = tl.load(cu + group + 1, mask=group + 1 < groups, other=total)
    begin = tl.maximum(begin, 0)
    end = tl.minimum(end, total)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(what + at, tl.full([BLOCK], value, what.dtype.element_ty), mask=at < end)

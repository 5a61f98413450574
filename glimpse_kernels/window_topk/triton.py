# SPDX-License-Identifier: Apache-2.0
"""`window_topk` in Triton: two launches that count instead of sorting.

A token's rank is the number of tokens that go before it. Its window has few; what ranks below the cap there is ranked among its
like in the whole group, by comparing all with all: at 16384 tokens that is 10^8 comparisons, little for a GPU, where a sort would
take several launches. Every rank is a count of its own, so programs need not wait for each other, and the rank is the place of the
pick.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 64
"""Of a group, that a program ranks."""
AT_ONCE = 16
"""Tokens of its window that each is compared with at once: all of VScan's."""
OTHERS = 64
"""Tokens of the group that these are compared with at once."""

_NO_KEY = tl.constexpr(-(2**31))
"""Below the key of -inf."""


@triton.jit
def _key(score):
    """Order-preserving: key(a) < key(b) exactly if a < b. NaN gets the key of -inf, -0 that of +0."""
    score = tl.where(score == score, score, float("-inf"))
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _bounds(cu_ptr, grid_ptr, group, longest):
    """First row of a group, and the number of its tokens that are on its grid: none if it is longer than `longest`."""
    begin = tl.load(cu_ptr + group)
    length = tl.load(cu_ptr + group + 1) - begin
    height = tl.maximum(tl.load(grid_ptr + 2 * group), 0)
    width = tl.maximum(tl.load(grid_ptr + 2 * group + 1), 0)
    n = tl.minimum(length.to(tl.int64), height.to(tl.int64) * width).to(tl.int32)
    return begin, tl.where(length > longest, 0, n), height, width


@triton.jit(do_not_specialize=["window", "longest", "tiles"])
def window_topk_window_kernel(
    score_ptr, cu_ptr, grid_ptr, cu_picks_ptr, key_ptr, window, longest, tiles, UP: tl.constexpr,
    TOKENS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """key [N]: of the tokens that rank below the cap in their window, `_NO_KEY` of the others. One program for each of `tiles` tiles of a
    group."""
    group, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    begin, n, height, width = _bounds(cu_ptr, grid_ptr, group, longest)
    token = tile * TOKENS + tl.arange(0, TOKENS)
    if tile * TOKENS < n:
        budget = tl.maximum(tl.load(cu_picks_ptr + group + 1) - tl.load(cu_picks_ptr + group), 0)
        down = tl.maximum(height // window, 1)
        across = tl.maximum(width // window, 1)
        windows = down.to(tl.int64) * across
        cap = ((budget + windows - 1) // windows if UP else budget // windows).to(tl.int32)

        score_ptr += begin
        key = _key(tl.load(score_ptr + token, mask=token < n, other=0.0))
        # What is left over belongs to the last window of its direction, which is no smaller than the others.
        at_y = tl.minimum(token // width // window, down - 1)
        at_x = tl.minimum(token % width // window, across - 1)
        lines = (n - 1) // width + 1  # that have tokens: a grid may be larger than its group
        tall = tl.minimum(height - (down - 1) * window, lines)
        wide = tl.minimum(width - (across - 1) * window, n)
        last_y = tl.where(at_y == down - 1, lines, tl.minimum((at_y + 1) * window, lines))
        last_x = tl.where(at_x == across - 1, width, (at_x + 1) * window)
        rank = tl.zeros([TOKENS], tl.int32)
        for start in range(0, tall * wide, AT_ONCE):
            place = start + tl.arange(0, AT_ONCE)[None, :]
            y = at_y[:, None] * window + place // wide
            x = at_x[:, None] * window + place % wide
            other = y * width + x
            here = (token[:, None] < n) & (y < last_y[:, None]) & (x < last_x[:, None]) & (other < n)
            other_key = _key(tl.load(score_ptr + other, mask=here, other=0.0))
            before = (other_key > key[:, None]) | ((other_key == key[:, None]) & (other < token[:, None]))
            rank += tl.sum((here & before).to(tl.int32), axis=1)
        tl.store(key_ptr + begin + token, tl.where(rank < cap, key, _NO_KEY), mask=token < n)


@triton.jit(do_not_specialize=["longest", "capacity", "tiles"])
def window_topk_pick_kernel(
    key_ptr, cu_ptr, grid_ptr, cu_picks_ptr, picks_ptr, keep_ptr, longest, capacity, tiles,
    TOKENS: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """The best of those that have a key, each at its place. One program for each of `tiles` tiles of a group."""
    group, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    begin, n, _, _ = _bounds(cu_ptr, grid_ptr, group, longest)
    token = tile * TOKENS + tl.arange(0, TOKENS)
    if tile * TOKENS < n:
        place = tl.load(cu_picks_ptr + group)
        budget = tl.load(cu_picks_ptr + group + 1) - place
        key_ptr += begin
        key = tl.load(key_ptr + token, mask=token < n, other=_NO_KEY)
        rank = tl.zeros([TOKENS], tl.int32)
        if tl.max(key, axis=0) > _NO_KEY:
            for start in range(0, n, OTHERS):
                other = start + tl.arange(0, OTHERS)
                other_key = tl.load(key_ptr + other, mask=other < n, other=_NO_KEY)[None, :]
                before = (other_key > key[:, None]) | (
                    (other_key == key[:, None]) & (other[None, :] < token[:, None])
                )
                rank += tl.sum(before.to(tl.int32), axis=1)
        picked = (key > _NO_KEY) & (rank < budget) & (place + rank >= 0) & (place + rank < capacity)
        tl.store(picks_ptr + place + rank, begin + token, mask=picked)
        tl.store(keep_ptr + begin + token, picked.to(tl.int8), mask=token < n)


def window_topk(
    scores: Tensor,
    cu_seqlens: Tensor,
    grids: Tensor,
    cu_picks: Tensor,
    *,
    window: int,
    capacity: int,
    share: str,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor]:
    """See `glimpse_kernels.window_topk`; arguments are checked there."""
    rows, groups, device = scores.shape[0], grids.shape[0], scores.device
    picks = torch.full((capacity,), -1, dtype=torch.int32, device=device)
    keep = torch.zeros(rows, dtype=torch.bool, device=device)
    longest = rows if max_seqlen is None else min(rows, max_seqlen)
    if longest == 0 or groups == 0 or capacity == 0:
        return picks, keep
    keys = torch.empty(rows, dtype=torch.int32, device=device)
    tiles = triton.cdiv(longest, TOKENS)
    grid = (groups * tiles,)
    window_topk_window_kernel[grid](
        scores, cu_seqlens, grids, cu_picks, keys, min(window, _MOST), longest, tiles,
        UP=share == "up", TOKENS=TOKENS, AT_ONCE=AT_ONCE, num_warps=4, num_stages=1,
    )  # fmt: skip
    window_topk_pick_kernel[grid](
        keys, cu_seqlens, grids, cu_picks, picks, keep.view(torch.uint8), longest, capacity, tiles,
        TOKENS=TOKENS, OTHERS=OTHERS, num_warps=4, num_stages=1,
    )  # fmt: skip
    return picks, keep


_MOST = 2**31 - 1
"""Grids are 32-bit numbers: no window is larger."""

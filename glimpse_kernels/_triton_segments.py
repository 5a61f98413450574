# SPDX-License-Identifier: Apache-2.0
"""Where a tile of rows lies among segments: what Triton kernels on packed rows share."""

from __future__ import annotations

import triton
import triton.language as tl

SEARCH = 256
"""Segment bounds read at once to find those of a tile."""


@triton.jit
def count_up_to(bounds, count, limit, SEARCH: tl.constexpr):
    """How many of the first `count` ascending bounds are at most `limit`."""
    found = 0
    for start in range(0, count, SEARCH):
        offsets = start + tl.arange(0, SEARCH)
        bound = tl.load(bounds + offsets, mask=offsets < count, other=0)
        found += tl.sum(((offsets < count) & (bound <= limit)).to(tl.int32), axis=0)
    return found

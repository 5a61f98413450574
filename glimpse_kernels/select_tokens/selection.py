# SPDX-License-Identifier: Apache-2.0
"""What `select_tokens` returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """Which visual tokens and packed rows stay. All tensors are on the device of the logits.

    Attributes:
        keep: `[N]` bool, one per visual token.
        counts: `[G]` int32, kept visual tokens of each group.
        index: `[capacity]` int32, packed rows that stay, ascending; -1 beyond the last.
        cu_seqlens: `[B+1]` int32, where each sequence starts among the rows that stay. The last entry is the total. It
            counts every row that stays, also one that found no place in `index`, so a total above the capacity tells that
            the buffer was too small.
    """

    keep: Tensor
    counts: Tensor
    index: Tensor
    cu_seqlens: Tensor

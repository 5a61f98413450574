# SPDX-License-Identifier: Apache-2.0
"""Definition of `compact` in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def compact(
    index: Tensor,
    slots: Tensor | None,
    k_src: Tensor | None,
    v_src: Tensor | None,
    k_dst: Tensor | None,
    v_dst: Tensor | None,
    rows: Sequence[tuple[Tensor, Tensor]] = (),
) -> None:
    """See `glimpse_kernels.compact`."""
    taken = index >= 0
    for src, dst in rows:
        dst[: index.numel()][taken] = src[index[taken].long()]
    if slots is None:
        return
    written = taken & (slots >= 0)
    source, target = index[written].long(), slots[written].long()
    for pair_src, pair_dst in ((k_src, k_dst), (v_src, v_dst)):
        if pair_src is not None and pair_dst is not None:
            pair_dst[:, target] = pair_src[:, source]

# SPDX-License-Identifier: Apache-2.0
"""`compact` in C++ (csrc/cpu/compact.cpp)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from torch import Tensor

from glimpse_kernels._ext import extension


def compact(
    index: Tensor,
    slots: Tensor | None,
    k_src: Tensor | None,
    v_src: Tensor | None,
    k_dst: Tensor | None,
    v_dst: Tensor | None,
    rows: Sequence[tuple[Tensor, Tensor]] = (),
) -> None:
    """See `glimpse_kernels.compact`; arguments are checked there."""
    copies = []
    for src, dst in ((k_src, k_dst), (v_src, v_dst)):
        if src is not None and dst is not None:
            size = src.element_size()
            copies.append(
                (
                    src.data_ptr(),
                    dst.data_ptr(),
                    src.shape[0],
                    src.shape[1],
                    dst.shape[1],
                    src.shape[2] * src.shape[3] * size,
                    src.stride(0) * size,
                    src.stride(1) * size,
                    dst.stride(0) * size,
                    dst.stride(1) * size,
                    True,
                )
            )
    for src, dst in rows:
        copies.extend(_columns(src, dst))
    extension().compact(index.data_ptr(), 0 if slots is None else slots.data_ptr(), index.shape[0], copies)


Copy = tuple[int, int, int, int, int, int, int, int, int, int, bool]


def _columns(src: Tensor, dst: Tensor) -> Iterator[Copy]:
    """One copy for rows that are contiguous; one per contiguous piece where they are not (positions kept as [3, T])."""
    size = src.element_size()
    # Trailing dimensions that are contiguous in both, innermost first.
    piece, dim = 1, src.dim()
    while dim > 1 and all(t.shape[dim - 1] == 1 or t.stride(dim - 1) == piece for t in (src, dst)):
        dim -= 1
        piece *= src.shape[dim]
    for where in product(*(range(n) for n in src.shape[1:dim])):
        src_offset = sum(i * s for i, s in zip(where, src.stride()[1:dim], strict=True))
        dst_offset = sum(i * s for i, s in zip(where, dst.stride()[1:dim], strict=True))
        yield (
            src.data_ptr() + src_offset * size,
            dst.data_ptr() + dst_offset * size,
            1,
            src.shape[0],
            dst.shape[0],
            piece * size,
            0,
            src.stride(0) * size,
            0,
            dst.stride(0) * size,
            False,
        )

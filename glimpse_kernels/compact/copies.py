# SPDX-License-Identifier: Apache-2.0
"""What `compact` is for a kernel: a few copies of the same kind, whatever the tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

from torch import Tensor


class Copy(NamedTuple):
    """dst[plane, to] = src[plane, row] for all planes: layers, or the rows of a transposed buffer.

    src, dst: tensors that begin where plane 0 and row 0 do. to_slots: entry i goes to row slots[i], else to row i. Sizes and
    strides in bytes.
    """

    src: Tensor
    dst: Tensor
    planes: int
    src_rows: int
    dst_rows: int
    row_bytes: int
    src_plane_stride: int
    src_row_stride: int
    dst_plane_stride: int
    dst_row_stride: int
    to_slots: bool


def copies(
    k_src: Tensor | None,
    v_src: Tensor | None,
    k_dst: Tensor | None,
    v_dst: Tensor | None,
    rows: Sequence[tuple[Tensor, Tensor]],
) -> list[Copy]:
    """The copies of a call of `compact`: one for the keys, one for the values, as a rule one for each pair of rows."""
    found = []
    for src, dst in ((k_src, k_dst), (v_src, v_dst)):
        if src is not None and dst is not None:
            size = src.element_size()
            layers, src_rows, heads, width = src.shape
            src_layer, src_row, *_ = src.stride()
            dst_layer, dst_row, *_ = dst.stride()
            found.append(
                Copy(
                    src, dst, layers, src_rows, dst.shape[1], heads * width * size,
                    src_layer * size, src_row * size, dst_layer * size, dst_row * size, True,
                )
            )  # fmt: skip
    for src, dst in rows:
        found.extend(_of_rows(src, dst))
    return found


def _of_rows(src: Tensor, dst: Tensor) -> Iterator[Copy]:
    """One copy for rows that are contiguous, or contiguous but for one dimension (positions kept as [3, T]); else several."""
    size = src.element_size()
    shape, src_strides, dst_strides = src.shape, src.stride(), dst.stride()
    # Trailing dimensions that are contiguous in both, innermost first.
    piece, dim = 1, len(shape)
    while dim > 1 and (shape[dim - 1] == 1 or src_strides[dim - 1] == dst_strides[dim - 1] == piece):
        dim -= 1
        piece *= shape[dim]
    planes, src_plane, dst_plane = 1, 0, 0
    if dim > 1:
        dim -= 1
        planes, src_plane, dst_plane = shape[dim], src_strides[dim] * size, dst_strides[dim] * size
    for where in product(*map(range, shape[1:dim])):
        at: tuple[slice | int, ...] = (slice(None), *where)
        yield Copy(
            src[at] if where else src, dst[at] if where else dst, planes, shape[0], dst.shape[0], piece * size,
            src_plane, src_strides[0] * size, dst_plane, dst_strides[0] * size, False,
        )  # fmt: skip


def flat(given: Sequence[Copy]) -> list[tuple[int | bool, ...]]:
    """As the compiled modules take them: addresses in place of tensors."""
    return [(copy.src.data_ptr(), copy.dst.data_ptr(), *copy[2:]) for copy in given]

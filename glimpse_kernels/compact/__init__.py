# SPDX-License-Identifier: Apache-2.0
"""Gather of the rows that stay: hidden states, positions, and the keys and values of all layers at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from glimpse_kernels import _tensors as check
from glimpse_kernels import dispatch

__all__ = ["compact"]


def compact(
    index: Tensor,
    slots: Tensor | None,
    k_src: Tensor | None,
    v_src: Tensor | None,
    k_dst: Tensor | None,
    v_dst: Tensor | None,
    rows: Sequence[tuple[Tensor, Tensor]] = (),
) -> None:
    """Exact copies: k_dst[l, slots[i]] = k_src[l, index[i]], the same for v, and dst[i] = src[index[i]] for `rows`.

    index: [M] int32, source row; -1: skip (nothing is written for this i).
    slots: [M] int32, destination row in the pool; -1: skip; no slot twice. None only without keys and values.
    k_src: [L, T, Hkv, D] and v_src: [L, T, Hkv, Dv], the workspace of the prefill; k_dst: [L, S, Hkv, D] and
        v_dst: [L, S, Hkv, Dv], the pool flattened over its blocks. A pair may be None. Any dtype, equal within a pair.
        The layer and row strides are free; the two last dimensions must be contiguous.
    rows: pairs (src [T, ...], dst [at least M, ...]) of any dtype, equal within a pair.

    Returns None. Source and destination must not overlap. While autograd records, the definition serves: gradients flow from
    the destinations to the sources as through any in-place operation of torch.

    Raises TypeError / ValueError for a wrong dtype / shape or an overlap, UnsupportedError if no backend serves the device.
    """
    op = "compact"
    check.expect_tensors(op, index=index)
    check.expect_shape(op, "index", index, (None,), "[M]")
    check.expect_dtype(op, "index", index, torch.int32)
    check.expect_contiguous(op, "index", index)
    m = index.shape[0]
    if (k_src is None) != (k_dst is None) or (v_src is None) != (v_dst is None):
        raise ValueError(f"{op}: k_src, k_dst, v_src, v_dst: expected source and destination together")
    if slots is not None:
        check.expect_shape(op, "slots", slots, (m,), "[M]")
        check.expect_dtype(op, "slots", slots, torch.int32)
        check.expect_contiguous(op, "slots", slots)
    elif k_src is not None or v_src is not None:
        raise ValueError(f"{op}: slots: expected a tensor with keys or values, found None")
    for name, src, dst in (("k", k_src, k_dst), ("v", v_src, v_dst)):
        if src is None or dst is None:
            continue
        check.expect_shape(op, f"{name}_src", src, (None, None, None, None), "[L, T, Hkv, D]")
        check.expect_shape(
            op, f"{name}_dst", dst, (src.shape[0], None, src.shape[2], src.shape[3]), "[L, S, Hkv, D]"
        )
        check.expect_dtype(op, f"{name}_dst", dst, src.dtype)
        for which, t in (("src", src), ("dst", dst)):
            if t.numel() and not t[0, 0].is_contiguous():
                raise ValueError(
                    f"{op}: {name}_{which}: expected contiguous rows [Hkv, D], found strides {list(t.stride())} "
                    f"for {check.describe(t)}"
                )
        _refuse_overlap(op, f"{name}_dst", src, dst)
        check.expect_same_device(op, index.device, **{f"{name}_src": src, f"{name}_dst": dst})
    for i, (src, dst) in enumerate(rows):
        name = f"rows[{i}]"
        if src.dim() < 1 or dst.dim() != src.dim() or dst.shape[0] < m or dst.shape[1:] != src.shape[1:]:
            raise ValueError(
                f"{op}: {name}: expected src [T, ...] and dst [at least {m}, ...] with equal trailing sizes, "
                f"found {check.describe(src)} and {check.describe(dst)}"
            )
        check.expect_dtype(op, name, dst, src.dtype)
        _refuse_overlap(op, name, src, dst)
        check.expect_same_device(op, index.device, **{f"{name} src": src, f"{name} dst": dst})
    check.expect_same_device(op, index.device, slots=slots)
    dtype = k_src.dtype if k_src is not None else rows[0][0].dtype if rows else torch.int32
    grad = check.needs_grad(k_src, v_src, *(src for src, _ in rows))
    size = (m, _entry_bytes(k_src, v_src, rows)) if index.is_cuda else ()
    serve = dispatch.select(op, index.device, dtype, grad=grad, size=size)
    serve(index, slots, k_src, v_src, k_dst, v_dst, rows)


def _entry_bytes(k: Tensor | None, v: Tensor | None, rows: Sequence[tuple[Tensor, Tensor]]) -> int:
    """What one entry of the index moves, in all layers."""
    planes = sum(t.shape[0] * t.shape[2] * t.shape[3] * t.element_size() for t in (k, v) if t is not None)
    return planes + sum(math.prod(src.shape[1:]) * src.element_size() for src, _ in rows)


def _span(t: Tensor) -> tuple[int, int]:
    """First byte and end of the memory that `t` reaches."""
    begin = t.data_ptr()
    reach = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return begin, begin + (reach + 1) * t.element_size()


def _refuse_overlap(op: str, name: str, src: Tensor, dst: Tensor) -> None:
    if not src.numel() or not dst.numel() or src.device != dst.device or src.is_meta:
        return
    (a, a_end), (b, b_end) = _span(src), _span(dst)
    if a < b_end and b < a_end:
        raise ValueError(
            f"{op}: {name}: expected a destination apart from its source, found overlapping memory"
        )

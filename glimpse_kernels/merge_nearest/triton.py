# SPDX-License-Identifier: Apache-2.0
"""`merge_nearest` in Triton: a matrix product whose epilogue is an argmax, then one sum a target.

The targets are listed first, so that rows of cosines are as long as a group has targets and not as it has tokens; what is
stored of them is one row number a source. Sorting the sources by what they join (stable: in the order of their rows) lets
each target add up its own, one after the other: no atomics, and the same bits whatever else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from glimpse_kernels import _triton
from glimpse_kernels._triton_segments import SEARCH, count_up_to
from glimpse_kernels.merge_nearest.naive import EPS

LIST_ROWS = 1024
LENGTH_ROWS = 16
LENGTH_DEPTH = 128
COLUMNS = 512
"""Values of a row that a program adds up."""


@dataclass(frozen=True)
class Tiles(_triton.Launch):
    """sources, targets: sides of a tile of cosines. depth: dimensions of the metric in a step."""

    sources: int = 64
    targets: int = 64
    depth: int = 64


CONFIGS: _triton.Configs[Tiles] = _triton.Configs(
    "merge_nearest",
    {
        # By bytes of an element of the metric. fp32 products run outside the tensor cores.
        (80, 2): Tiles(warps=4, stages=3, sources=64, targets=64, depth=64),
        (80, 4): Tiles(warps=8, stages=2, sources=32, targets=32, depth=32),
    },
    candidates=(
        Tiles(warps=4, stages=3, sources=64, targets=64, depth=32),
        Tiles(warps=4, stages=3, sources=64, targets=64, depth=64),
        Tiles(warps=4, stages=4, sources=64, targets=64, depth=64),
        Tiles(warps=8, stages=3, sources=128, targets=64, depth=64),
        Tiles(warps=8, stages=3, sources=128, targets=128, depth=64),
        Tiles(warps=8, stages=2, sources=64, targets=32, depth=32),
        Tiles(warps=8, stages=2, sources=32, targets=32, depth=32),
    ),
)


@triton.jit(do_not_specialize=["rows"])
def merge_nearest_list_kernel(target_ptr, before_ptr, list_ptr, rows, ROWS: tl.constexpr):
    """before [N+1]: targets above each row. list: the rows of the targets, rising. Grid (row tiles of N+1,)."""
    top = tl.program_id(0) * ROWS
    found = tl.zeros([ROWS], tl.int32)
    for start in range(0, top, ROWS):  # a byte a row: counted again by each program, and not handed on
        found += tl.load(target_ptr + start + tl.arange(0, ROWS)).to(tl.int32)
    row = top + tl.arange(0, ROWS)
    mine = tl.load(target_ptr + row, mask=row < rows, other=0).to(tl.int32)
    before = tl.sum(found, axis=0) + tl.cumsum(mine, axis=0) - mine
    tl.store(before_ptr + row, before, mask=row <= rows)
    tl.store(list_ptr + before, row, mask=mine > 0)


@triton.jit(do_not_specialize=["rows"])
def merge_nearest_length_kernel(
    metric_ptr, inverse_ptr, rows, dim, metric_stride, EPS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """inverse [N]: one over the length of each row of the metric, -1 where that is no finite number. Grid (row tiles,)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    address = metric_ptr + row.to(tl.int64)[:, None] * metric_stride
    square = tl.zeros([ROWS], tl.float32)
    for start in range(0, dim, DEPTH):
        d = start + tl.arange(0, DEPTH)
        x = tl.load(address + d[None, :], mask=(row[:, None] < rows) & (d[None, :] < dim), other=0.0)
        x = x.to(tl.float32)
        square += tl.sum(x * x, axis=1)
    inverse = 1.0 / tl.maximum(tl.sqrt_rn(square), EPS)
    tl.store(inverse_ptr + row, tl.where(square < float("inf"), inverse, -1.0), mask=row < rows)


@triton.jit(do_not_specialize=["rows", "groups"])
def merge_nearest_kernel(
    metric_ptr, inverse_ptr, target_ptr, source_ptr, before_ptr, list_ptr, cu_ptr, nearest_ptr, rows, groups, dim,
    metric_stride,
    GIVEN: tl.constexpr, SOURCES: tl.constexpr, TARGETS: tl.constexpr, DEPTH: tl.constexpr, SEARCH: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """nearest [N]: the target that each source joins, else -1. Grid (row tiles,)."""
    top = tl.program_id(0) * SOURCES
    row = top + tl.arange(0, SOURCES)
    inside = row < rows
    gives = inside & (tl.load(target_ptr + row, mask=inside, other=1) == 0)
    if GIVEN:
        gives = gives & (tl.load(source_ptr + row, mask=inside, other=0) != 0)
    inverse = tl.load(inverse_ptr + row, mask=inside, other=-1.0)
    gives = gives & (inverse >= 0.0)

    # Which part of the list holds the targets of a row's group: none for rows outside all groups.
    low, high = tl.zeros([SOURCES], tl.int32), tl.zeros([SOURCES], tl.int32)
    first_group = count_up_to(cu_ptr + 1, groups, top, SEARCH)
    last_group = count_up_to(cu_ptr, groups, top + SOURCES - 1, SEARCH)
    for group in range(first_group, last_group):
        begin, end = tl.load(cu_ptr + group), tl.load(cu_ptr + group + 1)
        mine = gives & (row >= begin) & (row < end)
        low = tl.where(mine, tl.load(before_ptr + begin), low)
        high = tl.where(mine, tl.load(before_ptr + end), high)
    begin = tl.min(tl.where(low < high, low, 2147483647), axis=0)
    end = tl.max(high, axis=0)

    best = tl.full([SOURCES], float("-inf"), tl.float32)
    nearest = tl.full([SOURCES], -1, tl.int32)
    address = metric_ptr + row.to(tl.int64)[:, None] * metric_stride
    for start in range(begin, end, TARGETS):
        place = start + tl.arange(0, TARGETS)
        listed = place < end
        target = tl.load(list_ptr + place, mask=listed, other=0)
        target_inverse = tl.load(inverse_ptr + target, mask=listed, other=-1.0)
        usable = target_inverse >= 0.0
        target_address = metric_ptr + target.to(tl.int64)[:, None] * metric_stride
        dots = tl.zeros([SOURCES, TARGETS], tl.float32)
        for depth in tl.range(0, dim, DEPTH, num_stages=STAGES):
            d = depth + tl.arange(0, DEPTH)[None, :]
            x = tl.load(address + d, mask=gives[:, None] & (d < dim), other=0.0)
            y = tl.load(target_address + d, mask=usable[:, None] & (d < dim), other=0.0)
            dots = tl.dot(x, tl.trans(y), dots, input_precision="ieee")
        allowed = usable[None, :] & (place[None, :] >= low[:, None]) & (place[None, :] < high[:, None])
        cosine = tl.where(allowed, dots * inverse[:, None] * target_inverse[None, :], float("-inf"))
        most = tl.max(cosine, axis=1)
        first = tl.min(tl.where(cosine == most[:, None], target[None, :], 2147483647), axis=1)
        nearest = tl.where(most > best, first, nearest)
        best = tl.maximum(best, most)
    tl.store(nearest_ptr + row, nearest, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def merge_nearest_sum_kernel(
    value_ptr, out_ptr, before_ptr, list_ptr, order_ptr, start_ptr, end_ptr, rows, width, value_stride, out_stride,
    PLUS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Targets that something joined get their mean. Grid (N, column tiles): no more targets than rows."""
    place = tl.program_id(0)
    if place < tl.load(before_ptr + rows):
        start = tl.load(start_ptr + place)
        end = tl.load(end_ptr + place)
        if start < end:
            column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
            mask = column < width
            total = tl.zeros([COLUMNS], tl.float32)
            for index in range(start, end):
                source = tl.load(order_ptr + index).to(tl.int64)
                total += tl.load(value_ptr + source * value_stride + column, mask=mask, other=0.0).to(
                    tl.float32
                )
            target = tl.load(list_ptr + place).to(tl.int64)
            own = tl.load(value_ptr + target * value_stride + column, mask=mask, other=0.0).to(tl.float32)
            count = (end - start).to(tl.float32)
            if PLUS:
                merged = own + tl.div_rn(total, tl.zeros([COLUMNS], tl.float32) + count)
            else:
                merged = tl.div_rn(own + total, tl.zeros([COLUMNS], tl.float32) + (count + 1.0))
            tl.store(out_ptr + target * out_stride + column, merged.to(out_ptr.dtype.element_ty), mask=mask)


def merge_nearest(
    values: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    *,
    sources: Tensor | None = None,
    metric: Tensor | None = None,
    how: str = "mean",
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `glimpse_kernels.merge_nearest`; arguments are checked there."""
    rows, width = values.shape
    device, metric = values.device, values if metric is None else metric
    nearest = torch.empty(rows, dtype=torch.int32, device=device)
    if out is None:
        out = torch.empty(rows, width, dtype=values.dtype, device=device)
    if out.data_ptr() != values.data_ptr() or rows == 0:
        out.copy_(values)
    if rows == 0:
        return out, nearest
    inverse = torch.empty(rows, dtype=torch.float32, device=device)
    before = torch.empty(rows + 1, dtype=torch.int32, device=device)
    listed = torch.empty(rows, dtype=torch.int32, device=device)
    marks = targets.view(torch.uint8)
    merge_nearest_list_kernel[(triton.cdiv(rows + 1, LIST_ROWS),)](
        marks, before, listed, rows, ROWS=LIST_ROWS, num_warps=4, num_stages=1,
    )  # fmt: skip
    merge_nearest_length_kernel[(triton.cdiv(rows, LENGTH_ROWS),)](
        metric, inverse, rows, metric.shape[1], metric.stride(0),
        EPS=EPS, ROWS=LENGTH_ROWS, DEPTH=LENGTH_DEPTH, num_warps=4, num_stages=2,
    )  # fmt: skip
    tiles = CONFIGS.pick(_triton.chip(device).capability, metric.element_size())
    merge_nearest_kernel[(triton.cdiv(rows, tiles.sources),)](
        metric, inverse, marks, marks if sources is None else sources.view(torch.uint8), before, listed, cu_seqlens,
        nearest, rows, cu_seqlens.shape[0] - 1, metric.shape[1], metric.stride(0),
        GIVEN=sources is not None, SOURCES=tiles.sources, TARGETS=tiles.targets, DEPTH=tiles.depth, SEARCH=SEARCH,
        STAGES=tiles.stages, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if width == 0:
        return out, nearest
    joined, order = nearest.sort(stable=True)
    # What lies behind the last listed target is anything; its bounds are found and not used.
    start = torch.searchsorted(joined, listed)
    end = torch.searchsorted(joined, listed, right=True)
    merge_nearest_sum_kernel[(rows, triton.cdiv(width, COLUMNS))](
        values, out, before, listed, order, start, end, rows, width, values.stride(0), out.stride(0),
        PLUS=how == "target_plus_mean", COLUMNS=min(COLUMNS, _triton.power_of_2(width)), num_warps=4, num_stages=1,
    )  # fmt: skip
    return out, nearest

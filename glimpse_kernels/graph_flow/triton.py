# SPDX-License-Identifier: Apache-2.0
"""`graph_flow` in Triton: tiles of cosines, made again in each pass, whose epilogue is the softmax or the step.

A program owns a tile of rows and goes through tiles of columns of the same group. Cosines are symmetric, so the share that row i
gives to row j is found in row j, and every pass adds along rows: no atomics. One picture has too few tiles of rows to fill a GPU:
its columns are dealt out to several programs in turn, whose sums are added up where they are read. Their number is the chip's, and
not that of the rows at hand, so that the order of a sum depends on nothing but the place in the group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from glimpse_kernels import _triton
from glimpse_kernels._triton_segments import SEARCH, count_up_to
from glimpse_kernels.graph_flow.naive import LEAST_HALF, LEAST_NORM

MOST_PARTS = 16
"""Programs that share the columns of a group."""
UNIT_ROWS = 4
UNIT_DEPTH = 512
ROWS = 128
"""Of a program that only adds up parts."""


@dataclass(frozen=True)
class Tiles(_triton.Launch):
    """rows, columns: sides of a tile of cosines. depth: dimensions in a step."""

    rows: int = 64
    columns: int = 64
    depth: int = 64


CONFIGS: _triton.Configs[Tiles] = _triton.Configs(
    "graph_flow",
    {
        # By bytes of an element of the unit rows. fp32 products run outside the tensor cores.
        (80, 2): Tiles(warps=8, stages=3, rows=64, columns=64, depth=64),
        (80, 4): Tiles(warps=8, stages=2, rows=64, columns=64, depth=32),
        (90, 2): Tiles(warps=4, stages=3, rows=64, columns=64, depth=64),
    },
    candidates=(
        Tiles(warps=4, stages=3, rows=64, columns=64, depth=64),
        Tiles(warps=4, stages=4, rows=64, columns=64, depth=64),
        Tiles(warps=4, stages=3, rows=64, columns=64, depth=128),
        Tiles(warps=8, stages=3, rows=128, columns=64, depth=64),
        Tiles(warps=8, stages=3, rows=128, columns=128, depth=64),
        Tiles(warps=8, stages=2, rows=64, columns=64, depth=32),
        Tiles(warps=8, stages=2, rows=32, columns=32, depth=32),
    ),
)


@triton.jit
def _to_dtype(x, ROUND: tl.constexpr):
    """x, rounded to a dtype if there is one."""
    if ROUND is None:
        return x
    else:
        return x.to(ROUND).to(tl.float32)


@triton.jit
def _divide(x, by, inverse):
    """x / by as it is rounded, for ordinary numbers; `inverse`: 1 / by. The exact division of a tile takes too many registers."""
    found = x * inverse
    return tl.fma(tl.fma(-found, by, x), inverse, found)


@triton.jit(do_not_specialize=["rows", "groups"])
def graph_flow_unit_kernel(
    x_ptr, cu_ptr, unit_ptr, norm_ptr, rows, groups, dim, x_stride,
    LEAST_NORM: tl.constexpr, ROUND: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """unit [N, D] and norm [N], NaN where it is not finite; the unit row is zero there. Grid (row tiles,)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < tl.load(cu_ptr + groups)
    address = x_ptr + row.to(tl.int64)[:, None] * x_stride
    square = tl.zeros([ROWS], tl.float32)
    for start in range(0, dim, DEPTH):
        d = start + tl.arange(0, DEPTH)[None, :]
        x = tl.load(address + d, mask=inside[:, None] & (d < dim), other=0.0).to(tl.float32)
        square += tl.sum(x * x, axis=1)
    norm = _to_dtype(tl.sqrt_rn(square), ROUND)
    fine = norm < float("inf")
    tl.store(norm_ptr + row, tl.where(fine, norm, float("nan")), mask=row < rows)
    length = tl.maximum(tl.where(fine, norm, 1.0), LEAST_NORM)
    unit_ptr += row.to(tl.int64)[:, None] * dim
    for start in range(0, dim, DEPTH):
        d = start + tl.arange(0, DEPTH)[None, :]
        mask = inside[:, None] & (d < dim)
        x = tl.load(address + d, mask=mask & fine[:, None], other=0.0).to(tl.float32)
        unit = tl.div_rn(x, tl.zeros([ROWS, DEPTH], tl.float32) + length[:, None])
        tl.store(unit_ptr + d, unit.to(unit_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _logits(
    unit_ptr, row, row_inside, column, column_inside, dim, threshold, temperature, inverse_temperature,
    ROUND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of s / temperature, -inf where there is no edge."""
    row_address = unit_ptr + row.to(tl.int64)[:, None] * dim
    column_address = unit_ptr + column.to(tl.int64)[:, None] * dim
    similar = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, dim, DEPTH, num_stages=STAGES):
        d = start + tl.arange(0, DEPTH)[None, :]
        x = tl.load(row_address + d, mask=row_inside[:, None] & (d < dim), other=0.0)
        y = tl.load(column_address + d, mask=column_inside[:, None] & (d < dim), other=0.0)
        similar = tl.dot(x, tl.trans(y), similar, input_precision="ieee")
    similar = _to_dtype(similar, ROUND)
    # What is not inside has a cosine of 0, which is below any threshold.
    whole = tl.zeros([ROWS, COLUMNS], tl.float32)
    logit = _to_dtype(_divide(similar, whole + temperature, whole + inverse_temperature), ROUND)
    return tl.where(similar >= threshold, logit, float("-inf"))


@triton.jit(do_not_specialize=["rows", "groups"])
def graph_flow_sums_kernel(
    unit_ptr, cu_ptr, top_ptr, sum_ptr, count_ptr, rows, groups, dim, threshold, temperature, inverse_temperature,
    ROUND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr,
    SEARCH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """top, sum, count [PARTS, N]: of a part of the softmax of each row. Grid (row tiles, PARTS)."""
    first = tl.program_id(0) * ROWS
    row = first + tl.arange(0, ROWS)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    count = tl.zeros([ROWS], tl.int32)
    first_group = count_up_to(cu_ptr + 1, groups, first, SEARCH)
    last_group = count_up_to(cu_ptr, groups, first + ROWS - 1, SEARCH)
    for group in range(first_group, last_group):
        begin = tl.load(cu_ptr + group)
        end = tl.load(cu_ptr + group + 1)
        mine = (row >= begin) & (row < end)
        for start in range(begin + tl.program_id(1) * COLUMNS, end, PARTS * COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            logit = _logits(
                unit_ptr, row, mine, column, column < end, dim, threshold, temperature, inverse_temperature,
                ROUND, ROWS, COLUMNS, DEPTH, STAGES,
            )  # fmt: skip
            here = tl.maximum(top, tl.max(logit, axis=1))
            finite = tl.where(here == float("-inf"), 0.0, here)
            total = total * tl.exp(top - finite) + tl.sum(tl.exp(logit - finite[:, None]), axis=1)
            top = here
            count += tl.sum((logit > float("-inf")).to(tl.int32), axis=1)
    out = tl.program_id(1).to(tl.int64) * rows + row
    tl.store(top_ptr + out, top, mask=row < rows)
    tl.store(sum_ptr + out, total, mask=row < rows)
    tl.store(count_ptr + out, count, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def graph_flow_merge_kernel(
    part_top_ptr, part_sum_ptr, top_ptr, sum_ptr, rows, PARTS: tl.constexpr, ROWS: tl.constexpr
):
    """top, sum [N] of all parts: 0 and 1 where there is no edge. Grid (row tiles,)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.arange(0, PARTS).to(tl.int64)[:, None] * rows + row[None, :]
    inside = (row < rows)[None, :]
    tops = tl.load(part_top_ptr + part, mask=inside, other=float("-inf"))
    top = tl.max(tops, axis=0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.load(part_sum_ptr + part, mask=inside, other=0.0) * tl.exp(tops - top[None, :]), axis=0)
    tl.store(top_ptr + row, top, mask=row < rows)
    tl.store(sum_ptr + row, tl.where(total > 0.0, total, 1.0), mask=row < rows)


@triton.jit
def _flow(flow_ptr, row, inside, rows, FIRST: tl.constexpr, PARTS: tl.constexpr):
    """What these rows have: their norm, 0 if it is not finite, or the sum of the parts."""
    if FIRST:
        norm = tl.load(flow_ptr + row, mask=inside, other=0.0)
        return tl.where(norm == norm, norm, 0.0)
    else:
        part = tl.arange(0, PARTS).to(tl.int64)[:, None] * rows + row[None, :]
        return tl.sum(tl.load(flow_ptr + part, mask=inside[None, :], other=0.0), axis=0)


@triton.jit(do_not_specialize=["rows", "groups"])
def graph_flow_step_kernel(
    unit_ptr, cu_ptr, top_ptr, sum_ptr, flow_ptr, out_ptr, count_ptr, rows, groups, dim, threshold, temperature, inverse_temperature,
    FIRST: tl.constexpr, COUNT: tl.constexpr, LEAST_HALF: tl.constexpr, ROUND: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, SEARCH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out [PARTS, N]: what flows to each row from a part of its group. COUNT: count [PARTS, N], of its own shares those that are no
    zero in float16. Grid (row tiles, PARTS)."""
    first = tl.program_id(0) * ROWS
    row = first + tl.arange(0, ROWS)
    received = tl.zeros([ROWS], tl.float32)
    count = tl.zeros([ROWS], tl.int32)
    if COUNT:
        own_top = tl.load(top_ptr + row, mask=row < rows, other=0.0)
        least = tl.load(sum_ptr + row, mask=row < rows, other=1.0) * LEAST_HALF
    first_group = count_up_to(cu_ptr + 1, groups, first, SEARCH)
    last_group = count_up_to(cu_ptr, groups, first + ROWS - 1, SEARCH)
    for group in range(first_group, last_group):
        begin = tl.load(cu_ptr + group)
        end = tl.load(cu_ptr + group + 1)
        mine = (row >= begin) & (row < end)
        for start in range(begin + tl.program_id(1) * COLUMNS, end, PARTS * COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            there = column < end
            logit = _logits(
                unit_ptr, row, mine, column, there, dim, threshold, temperature, inverse_temperature,
                ROUND, ROWS, COLUMNS, DEPTH, STAGES,
            )  # fmt: skip
            top = tl.load(top_ptr + column, mask=there, other=0.0)
            total = tl.load(sum_ptr + column, mask=there, other=1.0)
            flow = _flow(flow_ptr, column, there, rows, FIRST, PARTS)
            inverse = tl.div_rn(tl.full([COLUMNS], 1.0, tl.float32), total)
            whole = tl.zeros([ROWS, COLUMNS], tl.float32)
            share = _divide(tl.exp(logit - top[None, :]), whole + total[None, :], whole + inverse[None, :])
            share = _to_dtype(share, ROUND)
            received += tl.sum(share * flow[None, :], axis=1)
            if COUNT:
                own = tl.exp(logit - own_top[:, None])
                count += tl.sum((own > least[:, None]).to(tl.int32), axis=1)
    out = tl.program_id(1).to(tl.int64) * rows + row
    tl.store(out_ptr + out, received, mask=row < rows)
    if COUNT:
        tl.store(count_ptr + out, count, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def graph_flow_finish_kernel(
    norm_ptr, flow_ptr, count_ptr, score_ptr, degree_ptr, rows,
    FIRST: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Scores and degrees. Grid (row tiles,)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    part = tl.arange(0, PARTS).to(tl.int64)[:, None] * rows + row[None, :]
    degree = tl.sum(tl.load(count_ptr + part, mask=inside[None, :], other=0), axis=0)
    norm = tl.load(norm_ptr + row, mask=inside, other=0.0)
    flow = _flow(flow_ptr, row, inside, rows, FIRST, PARTS)
    score = tl.div_rn(flow, tl.maximum(degree, 1).to(tl.float32))
    tl.store(score_ptr + row, tl.where(norm == norm, score, norm), mask=inside)
    tl.store(degree_ptr + row, degree, mask=inside)


_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: None}
"""What a value is rounded to, if it is."""
_LEAST = 2.0**-126
"""The smallest normal number of fp32: a threshold below it would be none, and this and its inverse are fp32 numbers."""


def graph_flow(
    features: Tensor,
    cu_seqlens: Tensor,
    *,
    threshold: float,
    temperature: float,
    steps: int,
    rounded: bool,
    degree: str,
) -> tuple[Tensor, Tensor]:
    """See `glimpse_kernels.graph_flow`; arguments are checked there."""
    rows, dim = features.shape
    device, groups = features.device, cu_seqlens.shape[0] - 1
    chip = _triton.chip(device)
    parts = min(MOST_PARTS, _triton.power_of_2(chip.multiprocessors))
    scores = torch.empty(rows, dtype=torch.float32, device=device)
    degrees = torch.empty(rows, dtype=torch.int32, device=device)
    if rows == 0 or groups == 0:
        return scores.zero_(), degrees.zero_()
    unit = torch.empty(rows, dim, dtype=features.dtype if rounded else torch.float32, device=device)
    # Memory of their own each: where one begins may not depend on the number of rows, which would be other kernels.
    norm, top, total = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(3))
    one, other = torch.empty(2, parts, rows, dtype=torch.float32, device=device).unbind(0)
    counts = torch.empty(parts, rows, dtype=torch.int32, device=device)
    round_to = _TYPES[features.dtype] if rounded else None
    graph_flow_unit_kernel[(triton.cdiv(rows, UNIT_ROWS),)](
        features, cu_seqlens, unit, norm, rows, groups, dim, features.stride(0),
        LEAST_NORM=LEAST_NORM, ROUND=round_to, ROWS=UNIT_ROWS, DEPTH=UNIT_DEPTH, num_warps=4, num_stages=2,
    )  # fmt: skip
    tiles = CONFIGS.pick(chip.capability, unit.element_size())
    grid = triton.cdiv(rows, tiles.rows), parts
    temperature = min(max(float(temperature), _LEAST), 1 / _LEAST)
    values = rows, groups, dim, max(threshold, _LEAST), temperature, 1 / temperature
    shape = {
        "ROUND": round_to, "ROWS": tiles.rows, "COLUMNS": tiles.columns, "DEPTH": tiles.depth, "PARTS": parts,
        "SEARCH": SEARCH, "STAGES": tiles.stages, "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip
    graph_flow_sums_kernel[grid](unit, cu_seqlens, one, other, counts, *values, **shape)
    light = {"PARTS": parts, "ROWS": ROWS, "num_warps": 4, "num_stages": 1}
    wide = (triton.cdiv(rows, ROWS),)
    graph_flow_merge_kernel[wide](one, other, top, total, rows, **light)
    count = degree == "float16"
    flow = norm
    for step in range(max(steps, int(count))):
        graph_flow_step_kernel[grid](
            unit, cu_seqlens, top, total, flow, one, counts, *values,
            FIRST=step == 0, COUNT=count and step == 0, LEAST_HALF=LEAST_HALF, **shape,
        )  # fmt: skip
        flow, one, other = one, other, one
    graph_flow_finish_kernel[wide](
        norm, flow if steps else norm, counts, scores, degrees, rows, FIRST=steps == 0, **light
    )
    return scores, degrees

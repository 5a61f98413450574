# SPDX-License-Identifier: Apache-2.0
"""`compact` in Triton: one launch for all layers' keys and values and all pairs of rows.

Everything is a copy of the same kind: `outer` planes (layers, or the rows of a transposed buffer) of rows that are `inner` units
long, a unit being the widest of 16, 8, 4, 2 and 1 bytes that divides addresses, strides and sizes. A program moves one tile of one
plane. How many entries of the index are alive is known to the device alone, so the grid is made for all of them, and a
program of dead ones only reads its part of the index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from glimpse_kernels._triton import Configs, Launch, chip, power_of_2
from glimpse_kernels.compact.copies import Copy, copies

MAX_COPIES = 16
"""Copies in one launch, keys and values counted; more pairs take further launches."""


PROGRAMS = 12
"""Programs a multiprocessor is given, where there is work for as many."""

BLOCKS = 16
"""The most blocks of entries that a program has."""


@dataclass(frozen=True)
class TileLaunch(Launch):
    """rows x columns: the tile of a program, rows of the index and bytes of a row."""

    rows: int = 16
    columns: int = 1024


CONFIGS: Configs[TileLaunch] = Configs(
    "compact",
    {(80, "any"): TileLaunch(warps=4, stages=1, rows=16, columns=1024)},
    candidates=[
        TileLaunch(warps=warps, stages=1, rows=rows, columns=columns)
        for rows, columns, warps in (
            (8, 1024, 2), (8, 1024, 4), (16, 512, 4), (16, 1024, 4), (16, 1024, 8), (32, 1024, 4), (32, 1024, 8),
            (32, 2048, 8), (64, 1024, 8), (64, 512, 8),
        )
    ],
)  # fmt: skip

_ELEMENTS = {16: tl.int64, 8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}
"""What a unit of so many bytes is moved as; 16 bytes are two elements side by side."""

_INTS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_KNOWN = frozenset(
    (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool, torch.uint8, *_INTS.values())
)
"""dtypes that every Triton has; others go as integers of their size."""


@triton.jit
def _copy_tile(
    src,
    dst,
    size,
    task,
    to,
    rows,
    alive,
    ELEMENT: tl.constexpr,
    UNIT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    src = src.to(tl.pointer_type(ELEMENT))
    dst = dst.to(tl.pointer_type(ELEMENT))
    first, _, outer_src, outer_dst, row_src, row_dst, inner = size
    width = inner * UNIT
    tiles = tl.cdiv(width, COLUMNS)
    outer = ((task - first) // tiles).to(tl.int64)
    column = (task - first) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    # Strides count units: the factor behind them is what tells the compiler that whole units are aligned.
    base_src = outer * outer_src + rows.to(tl.int64) * row_src
    base_dst = outer * outer_dst + to.to(tl.int64) * row_dst
    mask = alive[:, None] & (column < width)[None, :]
    moved = tl.load(src + ((base_src * UNIT)[:, None] + column[None, :]), mask=mask, other=0)
    tl.store(dst + ((base_dst * UNIT)[:, None] + column[None, :]), moved, mask=mask)


@triton.jit(do_not_specialize=["count", "tasks", "stride", "sizes"])
def compact_kernel(
    index,
    slots,
    count,
    tasks,
    stride,
    sources,
    destinations,
    sizes,
    KINDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """sources, destinations: tuples of pointers. sizes: a tuple for each copy: its first task and the one behind its last,
    then outer and row strides and the row length in units. KINDS: (element to move, elements of a unit, columns of a tile,
    whether rows go to slots) of each.

    A task is one plane's stripe of columns; a program has every `stride`-th block of ROWS entries of one task.
    """
    task = tl.program_id(0) % tasks
    start = tl.program_id(0) // tasks
    # All its entries at once, to be done early with the dead ones, which lie behind the others as a rule.
    item = tl.arange(0, BLOCKS * ROWS)
    own = (start + item // ROWS * stride) * ROWS + item % ROWS
    found = tl.load(index + own, mask=own < count, other=-1)
    live = tl.max(tl.where(found >= 0, item // ROWS + 1, 0))
    for i in tl.static_range(len(sources)):
        if (task >= sizes[i][0]) & (task < sizes[i][1]):
            block = 0
            while block < live:
                entry = (start + block * stride) * ROWS + tl.arange(0, ROWS)
                rows = tl.load(index + entry, mask=entry < count, other=-1)
                if KINDS[i][3]:
                    to = tl.load(slots + entry, mask=entry < count, other=-1)
                    alive = (rows >= 0) & (to >= 0)
                else:
                    to = entry
                    alive = rows >= 0
                _copy_tile(
                    sources[i],
                    destinations[i],
                    sizes[i],
                    task,
                    to,
                    rows,
                    alive,
                    KINDS[i][0],
                    KINDS[i][1],
                    KINDS[i][2],
                )
                block += 1


def compact(
    index: Tensor,
    slots: Tensor | None,
    k_src: Tensor | None,
    v_src: Tensor | None,
    k_dst: Tensor | None,
    v_dst: Tensor | None,
    rows: Sequence[tuple[Tensor, Tensor]] = (),
) -> None:
    """See `glimpse_kernels.compact`; arguments are checked there. Indices and slots are not checked, but for being negative: that
    would make the host wait."""
    moved = [
        copy for copy in copies(k_src, v_src, k_dst, v_dst, rows) if copy.src.numel() and copy.dst.numel()
    ]
    if not index.shape[0]:
        return
    for begin in range(0, len(moved), MAX_COPIES):
        _launch(index, slots, moved[begin : begin + MAX_COPIES])


def _known(t: Tensor) -> Tensor:
    """The same memory in a dtype that Triton has."""
    if t.dtype in _KNOWN:
        return t
    return torch.view_as_real(t) if t.is_complex() else t.view(_INTS[t.element_size()])


def _launch(index: Tensor, slots: Tensor | None, given: Sequence[Copy]) -> None:
    found = chip(index.device)
    config = CONFIGS.pick(found.capability, "any")
    count = index.shape[0]
    sources, destinations, sizes, kinds = [], [], [], []
    task = 0
    for c in given:
        strides = (
            c.src_plane_stride if c.planes > 1 else 0,
            c.dst_plane_stride if c.planes > 1 else 0,
            c.src_row_stride,
            c.dst_row_stride,
        )
        unit = math.gcd(16, c.src.data_ptr(), c.dst.data_ptr(), c.row_bytes, *strides)
        element = _ELEMENTS[unit]
        elements = 2 if unit == 16 else 1
        columns = min(power_of_2(c.row_bytes // unit), config.columns // unit) * elements
        first, task = task, task + c.planes * triton.cdiv(c.row_bytes // unit * elements, columns)
        sources.append(_known(c.src))
        destinations.append(_known(c.dst))
        sizes.append((first, task, *(s // unit for s in strides), c.row_bytes // unit))
        kinds.append((element, elements, columns, c.to_slots))
    # Not more programs than keep the chip busy, but never more than BLOCKS blocks each.
    blocks = triton.cdiv(count, config.rows)
    busy = triton.cdiv(PROGRAMS * found.multiprocessors, max(task, 1))
    stride = max(min(blocks, busy), triton.cdiv(blocks, BLOCKS))
    compact_kernel[(task * stride,)](
        index, slots, count, task, stride, tuple(sources), tuple(destinations), tuple(sizes),
        KINDS=tuple(kinds), ROWS=config.rows, BLOCKS=BLOCKS, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip

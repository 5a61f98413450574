# SPDX-License-Identifier: Apache-2.0
"""`received_attention` in Triton: one sweep over tiles of k q^T, as the backward of FlashAttention-2 recomputes its weights.

A program owns a tile of keys and one query head. Its keys stay in shared memory as the left operand; the queries of their
segments stream through as the right one, so the sum over queries runs along the rows of a tile, inside a warp. What is left
is one float a key and head; a second, tiny kernel takes the mean over heads and groups and puts it in order. The sums of a
key run over the tiles of its own segment, from the segment's start: nothing depends on what else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from glimpse_kernels import _triton
from glimpse_kernels._triton_segments import SEARCH, count_up_to

REDUCE_TOKENS = 64


@dataclass(frozen=True)
class Tiles(_triton.Launch):
    """keys: rows of k that a program owns. queries: rows of q in a step."""

    keys: int = 128
    queries: int = 64


CONFIGS: _triton.Configs[Tiles] = _triton.Configs(
    "received_attention",
    {
        # By bytes of an element and the D it is good up to. fp32 products run outside the tensor cores.
        (80, (2, 96)): Tiles(warps=4, stages=3, keys=128, queries=32),
        (80, (2, 128)): Tiles(warps=8, stages=3, keys=128, queries=32),
        (80, (2, 256)): Tiles(warps=8, stages=2, keys=64, queries=32),
        (80, (4, 96)): Tiles(warps=8, stages=2, keys=32, queries=32),
        (80, (4, 128)): Tiles(warps=8, stages=1, keys=32, queries=16),
        (80, (4, 256)): Tiles(warps=8, stages=1, keys=32, queries=16),
        (90, (2, 96)): Tiles(warps=8, stages=3, keys=128, queries=64),
        (90, (2, 128)): Tiles(warps=8, stages=2, keys=128, queries=64),
        (90, (2, 256)): Tiles(warps=8, stages=2, keys=128, queries=64),
        (100, (2, 96)): Tiles(warps=4, stages=3, keys=128, queries=32),
        (100, (2, 128)): Tiles(warps=4, stages=3, keys=128, queries=32),
        (100, (2, 256)): Tiles(warps=4, stages=2, keys=128, queries=32),
    },
    candidates=(
        Tiles(warps=4, stages=3, keys=64, queries=128),
        Tiles(warps=4, stages=2, keys=64, queries=64),
        Tiles(warps=4, stages=3, keys=128, queries=32),
        Tiles(warps=4, stages=3, keys=128, queries=64),
        Tiles(warps=8, stages=2, keys=128, queries=128),
        Tiles(warps=8, stages=3, keys=128, queries=128),
        Tiles(warps=8, stages=2, keys=128, queries=64),
        Tiles(warps=8, stages=3, keys=128, queries=64),
        Tiles(warps=8, stages=3, keys=128, queries=32),
        Tiles(warps=8, stages=2, keys=256, queries=64),
    ),
)


@triton.jit
def _queries(
    q_ptr, q_desc, row, inside, start, column, q_stride_row,
    FROM: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A tile of queries, WIDTH dimensions from FROM on. Rows outside the segment are 0, or anything if read by descriptor."""
    if TMA:
        return q_desc.load([start, column + FROM])
    else:
        d = FROM + tl.arange(0, WIDTH)
        address = q_ptr + row[:, None] * q_stride_row + d[None, :]
        if MASKED:
            return tl.load(address, mask=inside[:, None] & (d[None, :] < DIM), other=0.0)
        elif FROM + WIDTH > DIM:
            return tl.load(address, mask=d[None, :] < DIM, other=0.0)
        else:
            return tl.load(address)


@triton.jit
def _received(
    k_first, k_second, q_ptr, q_first_desc, q_second_desc, lse_ptr, position_ptr, start, first, length, key, shift, column,
    q_stride_row, lse_stride_row, scale_log2,
    DIM: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, QUERIES: tl.constexpr, TMA: tl.constexpr,
    CAUSAL: tl.constexpr, POSITIONS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What the queries `first` to `first + QUERIES` of the segment that begins at row `start` give to each key."""
    query = first + tl.arange(0, QUERIES)
    inside = query < length
    row = (start + query).to(tl.int64)
    q_first = _queries(
        q_ptr, q_first_desc, row, inside, start + first, column, q_stride_row, 0, FIRST, DIM, TMA, MASKED,
    )  # fmt: skip
    if SECOND > 0:
        q_second = _queries(
            q_ptr, q_second_desc, row, inside, start + first, column, q_stride_row, FIRST, SECOND, DIM, TMA, MASKED,
        )  # fmt: skip
    logits = tl.dot(k_first, tl.trans(q_first), input_precision="ieee")
    if SECOND > 0:
        logits = tl.dot(k_second, tl.trans(q_second), logits, input_precision="ieee")
    if MASKED:
        lse = tl.load(lse_ptr + row * lse_stride_row, mask=inside, other=0.0)
    else:
        lse = tl.load(lse_ptr + row * lse_stride_row)
    lse = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
    weights = tl.exp2(logits * scale_log2 - lse[None, :])
    if MASKED:
        visible = inside[None, :]
        if POSITIONS:
            last = tl.load(position_ptr + row, mask=inside, other=-1)
            visible = visible & (key[:, None] <= last[None, :])
        elif CAUSAL:
            visible = visible & (key[:, None] <= (query + shift)[None, :])
        weights = tl.where(visible, weights, 0.0)
    return tl.sum(weights, axis=1)


@triton.jit(do_not_specialize=["segments", "k_rows"])
def received_attention_kernel(
    q_ptr, q_first_desc, q_second_desc, k_ptr, lse_ptr, position_ptr, cu_q_ptr, cu_k_ptr, sums_ptr, segments, k_rows,
    heads_per_key, q_stride_row, q_stride_head, k_stride_row, k_stride_head, lse_stride_row, lse_stride_head, scale_log2,
    DIM: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr,
    SEARCH: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr, CAUSAL: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """sums [Hq, Tk]: what each key receives from all queries of its segment, in one head. Grid (key tiles, Hq)."""
    top = tl.program_id(0) * KEYS
    head = tl.program_id(1)
    row = top + tl.arange(0, KEYS)
    k_ptr += (head // heads_per_key).to(tl.int64) * k_stride_head
    if not TMA:
        q_ptr += head.to(tl.int64) * q_stride_head
    lse_ptr += head.to(tl.int64) * lse_stride_head
    column = head * q_stride_head

    address = k_ptr + row.to(tl.int64)[:, None] * k_stride_row
    d = tl.arange(0, FIRST)
    k_first = tl.load(address + d[None, :], mask=(row[:, None] < k_rows) & (d[None, :] < DIM), other=0.0)
    k_second = k_first
    if SECOND > 0:
        d = FIRST + tl.arange(0, SECOND)
        k_second = tl.load(address + d[None, :], mask=(row[:, None] < k_rows) & (d[None, :] < DIM), other=0.0)

    total = tl.zeros([KEYS], tl.float32)
    # The segments that reach into the tile: those that end behind its first row and start before its last.
    first_segment = count_up_to(cu_k_ptr + 1, segments, top, SEARCH)
    last_segment = count_up_to(cu_k_ptr, segments, top + KEYS - 1, SEARCH)
    for segment in range(first_segment, last_segment):
        k_begin = tl.load(cu_k_ptr + segment)
        k_end = tl.load(cu_k_ptr + segment + 1)
        start = tl.load(cu_q_ptr + segment)
        length = tl.load(cu_q_ptr + segment + 1) - start
        key = row - k_begin
        shift = k_end - k_begin - length
        sums = tl.zeros([KEYS], tl.float32)
        if CAUSAL:
            # Queries before `begin` see no key of the tile. With positions of their own any of them may see any key.
            begin = 0 if POSITIONS else tl.maximum(top - k_begin - shift, 0) // QUERIES * QUERIES
            for first in tl.range(begin, length, QUERIES, num_stages=STAGES):
                sums += _received(
                    k_first, k_second, q_ptr, q_first_desc, q_second_desc, lse_ptr, position_ptr, start, first, length,
                    key, shift, column, q_stride_row, lse_stride_row, scale_log2,
                    DIM, FIRST, SECOND, QUERIES, TMA, True, POSITIONS, True,
                )  # fmt: skip
        else:
            whole = length // QUERIES * QUERIES
            for first in tl.range(0, whole, QUERIES, num_stages=STAGES):
                sums += _received(
                    k_first, k_second, q_ptr, q_first_desc, q_second_desc, lse_ptr, position_ptr, start, first, length,
                    key, shift, column, q_stride_row, lse_stride_row, scale_log2,
                    DIM, FIRST, SECOND, QUERIES, TMA, False, False, False,
                )  # fmt: skip
            if whole < length:
                sums += _received(
                    k_first, k_second, q_ptr, q_first_desc, q_second_desc, lse_ptr, position_ptr, start, whole, length,
                    key, shift, column, q_stride_row, lse_stride_row, scale_log2,
                    DIM, FIRST, SECOND, QUERIES, TMA, False, False, True,
                )  # fmt: skip
        total += tl.where((row >= k_begin) & (row < k_end), sums, 0.0)
    tl.store(sums_ptr + head.to(tl.int64) * k_rows + row, total, mask=row < k_rows)


@triton.jit(do_not_specialize=["tokens", "k_rows"])
def received_attention_reduce_kernel(
    sums_ptr, order_ptr, out_ptr, tokens, k_rows, factor,
    HEADS: tl.constexpr, HEADS_POW2: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """Mean of sums [Hq, Tk] over heads and groups of keys, each at its place. Grid (token tiles,)."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.arange(0, HEADS_POW2)
    mask = (head[:, None] < HEADS) & (token[None, :] < tokens)
    address = sums_ptr + head.to(tl.int64)[:, None] * k_rows + token[None, :] * GROUP
    total = tl.zeros([TOKENS], tl.float32)
    for member in range(GROUP):
        total += tl.sum(tl.load(address + member, mask=mask, other=0.0), axis=0)
    if ORDERED:
        place = tl.load(order_ptr + token, mask=token < tokens, other=0)
    else:
        place = token
    tl.store(out_ptr + place, total * factor, mask=token < tokens)


def _by_descriptor(q: Tensor, parts: tuple[int, int]) -> bool:
    """Whether the copy engine can fetch tiles of q: 16-byte steps, whole parts, rows that hold all their heads."""
    row, head, _ = q.stride()
    return (
        q.element_size() == 2
        and sum(parts) == q.shape[2]
        and row % 8 == 0
        and q.data_ptr() % 16 == 0
        and 0 < head * (q.shape[1] - 1) + q.shape[2] <= row
    )


def received_attention(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    q_positions: Tensor | None = None,
    scale: float | None = None,
    group: int = 1,
    order: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `glimpse_kernels.received_attention`; arguments are checked there."""
    q_rows, heads, dim = q.shape
    k_rows, kv_heads, _ = k.shape
    tokens, segments = k_rows // group, cu_seqlens_q.shape[0] - 1
    if out is None:
        out = torch.empty(tokens, dtype=torch.float32, device=q.device)
    if tokens == 0:
        return out
    if q_rows == 0 or segments == 0:
        return out.zero_()

    capability = _triton.chip(q.device).capability
    tiles = CONFIGS.pick(capability, (q.element_size(), 96 if dim <= 96 else 128 if dim <= 128 else 256))
    first, second = _triton.parts(dim)
    tma = capability >= _triton.HOPPER and _by_descriptor(q, (first, second))
    first_desc = second_desc = None
    if tma:
        row, head, _ = q.stride()
        shape, strides = [q_rows, head * (heads - 1) + dim], [row, 1]
        first_desc = TensorDescriptor(q, shape, strides, [tiles.queries, first])
        second_desc = TensorDescriptor(q, shape, strides, [tiles.queries, second]) if second else None
    sums = torch.empty(heads, k_rows, dtype=torch.float32, device=q.device)
    received_attention_kernel[(triton.cdiv(k_rows, tiles.keys), heads)](
        None if tma else q,
        first_desc,
        second_desc,
        k,
        lse,
        q_positions,
        cu_seqlens_q,
        cu_seqlens_k,
        sums,
        segments,
        k_rows,
        heads // kv_heads,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        lse.stride(0),
        lse.stride(1),
        _triton.LOG2E * (dim**-0.5 if scale is None else scale),
        DIM=dim,
        FIRST=first,
        SECOND=second,
        KEYS=tiles.keys,
        QUERIES=tiles.queries,
        SEARCH=SEARCH,
        STAGES=tiles.stages,
        TMA=tma,
        CAUSAL=causal,
        POSITIONS=q_positions is not None,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    received_attention_reduce_kernel[(triton.cdiv(tokens, REDUCE_TOKENS),)](
        sums,
        order,
        out,
        tokens,
        k_rows,
        1.0 / (heads * group),
        HEADS=heads,
        HEADS_POW2=_triton.power_of_2(heads),
        GROUP=group,
        TOKENS=REDUCE_TOKENS,
        ORDERED=order is not None,
        num_warps=4,
        num_stages=1,
    )
    return out

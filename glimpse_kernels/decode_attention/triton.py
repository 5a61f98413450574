# SPDX-License-Identifier: Apache-2.0
"""`decode_attention` in Triton: Flash-Decoding (Dao et al. 2023) over the paged pool, on a grid that no length changes.

A step is bound by the bytes of keys and values, so the kernel is built to keep reads in flight. A program takes one kv head
and one run of a row's keys; the query heads of that kv head are the lines of one small matrix product, so that keys and
values are read once for all of them. Tiles arrive through asynchronous copies of 16 bytes a thread, one tile complete and one
being issued while a third is worked on: 32 KiB each for 64 keys of 128 dimensions in 16 bits. Three programs fit on a
multiprocessor, so at least 96 KiB of it are under way; 4.8 TB/s at 1 us of latency take 36 KiB on each of the 132
multiprocessors of an H200. One query head a kv head uses a sixteenth of the product, which costs nothing here.

The number of runs follows from shapes, the capacity of the block table and the chip. A program finds its run from the length
on the device: every row is cut into equal runs, short rows into fewer of them, and programs without one leave at once. So a
CUDA graph recorded with short rows serves long ones. A second kernel joins the runs in ascending order. Rows of a batch do not
mix, but a batch of another size may cut them elsewhere: a row alone has the values of the row in the batch to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glimpse_kernels import _triton


@dataclass(frozen=True)
class DecodeLaunch(_triton.Launch):
    """keys: of a tile. resident: programs that a multiprocessor holds at once. runs: of a row; None: see `count_runs`."""

    keys: int = 64
    resident: int = 3
    runs: int | None = None


MIN_RUN = 128
"""Keys of a run of a row that fills its capacity, at least."""

MAX_RUNS = 128

UNIT = 32
"""Keys of every run but a row's last are a multiple of this."""

SATURATED = 2 / 3
"""Share of the resident programs that takes as long as all of them: fewer do not keep the memory busy."""

UNEVEN = 0.1
"""What rows of different lengths lose with one run a row, as a share of the time; more runs, smaller pieces, less loss."""

CONFIGS = _triton.Configs[DecodeLaunch](
    "decode_attention",
    # (bytes of an element, widest head dimension padded to a power of two)
    {
        (80, (2, 64)): DecodeLaunch(warps=4, stages=3, keys=64, resident=4),
        (80, (2, 128)): DecodeLaunch(warps=4, stages=3, keys=64, resident=2),
        (80, (2, 256)): DecodeLaunch(warps=4, stages=3, keys=32, resident=2),
        (80, (4, 64)): DecodeLaunch(warps=8, stages=2, keys=32, resident=3),
        (80, (4, 128)): DecodeLaunch(warps=8, stages=2, keys=32, resident=3),
        (80, (4, 256)): DecodeLaunch(warps=8, stages=2, keys=16, resident=2),
        (90, (2, 64)): DecodeLaunch(warps=4, stages=4, keys=64, resident=4),
        (90, (2, 128)): DecodeLaunch(warps=4, stages=3, keys=64, resident=3),
        (90, (2, 256)): DecodeLaunch(warps=4, stages=3, keys=32, resident=3),
    },
    candidates=[
        DecodeLaunch(warps=warps, stages=stages, keys=keys, resident=resident)
        for warps in (2, 4, 8)
        for stages, keys, resident in (
            (2, 64, 4),
            (3, 64, 3),
            (4, 64, 2),
            (3, 128, 1),
            (2, 128, 2),
            (3, 32, 6),
            (4, 32, 4),
            (6, 32, 2),
        )
    ],
)


@dataclass(frozen=True)
class JoinLaunch(_triton.Launch):
    """runs: of a tile. columns: of the output in a program."""

    runs: int = 64
    columns: int = 32


JOIN_CONFIGS = _triton.Configs[JoinLaunch](
    "decode_attention_join",
    {
        (80, "few"): JoinLaunch(warps=2, stages=1, runs=16),
        (80, "many"): JoinLaunch(warps=4, stages=1, runs=64),
    },
    candidates=[
        JoinLaunch(warps=warps, stages=stages, runs=runs, columns=columns)
        for warps in (2, 4)
        for stages in (1, 2, 3)
        for runs in (16, 32, 64, 128)
        for columns in (16, 32, 64)
    ],
)


@triton.jit
def _run_keys(length, runs, UNIT: tl.constexpr):
    """Keys of each run of a row."""
    return tl.cdiv(tl.cdiv(length, UNIT), runs) * UNIT


@triton.jit(do_not_specialize=["capacity", "runs", "lse_at", "table_row"])
def decode_attention_kernel(
    q, k, v, table, lengths, out, parts, scale, capacity, runs, lse_at, q_heads,
    q_row, q_head, k_block, k_slot, k_head, v_block, v_slot, v_head, table_row, out_row, out_head,
    GROUP: tl.constexpr, M: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, V_DIM: tl.constexpr,
    V_PAD: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, UNIT: tl.constexpr, SPLIT: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """Grid (Hkv, runs, B). SPLIT: write the run's result, normalised, and its log2-sum to `parts`, else the row's to `out`.
    ALIKE: keys and values have the same strides, so their rows the same offsets.

    parts: [B, Hq, runs, V_DIM] fp32, and behind it (at lse_at) [B, Hq, runs]. scale: of the logits, times log2(e).
    """
    kv_head = tl.program_id(0)
    run = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    length = tl.minimum(tl.load(lengths + b), capacity)
    begin = 0
    end = length
    if SPLIT:
        size = _run_keys(length, runs, UNIT)
        begin = run * size
        end = tl.minimum(begin + size, length)
        if begin >= end:
            return

    m = tl.arange(0, M)
    n = tl.arange(0, KEYS)
    i = tl.arange(0, D_PAD)
    j = tl.arange(0, V_PAD)
    head = kv_head * GROUP + m
    taken = m < tl.where(length > 0, GROUP, 0)
    queries = tl.load(
        q + (b * q_row + head.to(tl.int64) * q_head)[:, None] + i[None, :],
        mask=taken[:, None] & (i < D)[None, :],
        other=0.0,
    )
    k_base = k + kv_head.to(tl.int64) * k_head
    v_base = v + kv_head.to(tl.int64) * v_head
    row = table + b * table_row

    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M, KEYS], tl.float32)  # summed over its columns at the end only
    acc = tl.zeros([M, V_PAD], tl.float32)
    # One iteration ahead: the addresses of a tile never wait for the table.
    block = tl.load(row + (begin + n) // BLOCK, mask=begin + n < end, other=0)
    for start in range(begin, end, KEYS):
        key = start + n
        live = key < end
        slot = (key % BLOCK).to(tl.int64)
        place = block.to(tl.int64)
        at = place * k_block + slot * k_slot
        keys = tl.load(
            k_base + at[:, None] + i[None, :],
            mask=live[:, None] & (i < D)[None, :],
            other=0.0,
        )
        if not ALIKE:
            at = place * v_block + slot * v_slot
        values = tl.load(
            v_base + at[:, None] + j[None, :],
            mask=live[:, None] & (j < V_DIM)[None, :],
            other=0.0,
        )
        block = tl.load(row + (key + KEYS) // BLOCK, mask=key + KEYS < end, other=0)
        logits = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        logits = tl.where(live[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(logits - shift[:, None])
        fade = tl.exp2(top - shift)
        total = total * fade[:, None] + weights
        acc = acc * fade[:, None]
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")
        top = new_top

    sums = tl.sum(total, 1)
    acc = acc / tl.where(sums == 0.0, 1.0, sums)[:, None]
    inside = (m < GROUP)[:, None] & (j < V_DIM)[None, :]
    if SPLIT:
        part = (b * q_heads + head) * runs + run
        tl.store(parts + part[:, None] * V_DIM + j[None, :], acc, mask=inside)
        tl.store(parts + lse_at + part, top + tl.log2(sums), mask=m < GROUP)
    else:
        result = out + (b * out_row + head.to(tl.int64) * out_head)[:, None] + j[None, :]
        tl.store(result, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["capacity", "runs", "lse_at"])
def decode_attention_join_kernel(
    parts, lengths, out, capacity, runs, lse_at, q_heads, out_row, out_head,
    V_DIM: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (column blocks, Hq, B): the runs of a row, weighted by their share of its sum. Runs without keys are not read."""
    head = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    length = tl.minimum(tl.load(lengths + b), capacity)
    used = 0
    if length > 0:
        used = tl.cdiv(length, _run_keys(length, runs, UNIT))
    j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    at = (b * q_heads + head) * runs
    top = float("-inf")
    total = 0.0
    acc = tl.zeros([COLUMNS], tl.float32)
    for start in tl.range(0, used, TILE, num_stages=STAGES):
        r = start + tl.arange(0, TILE)
        lse = tl.load(parts + lse_at + at + r, mask=r < used, other=float("-inf"))
        part = tl.load(
            parts + (at + r)[:, None] * V_DIM + j[None, :],
            mask=(r < used)[:, None] & (j < V_DIM)[None, :],
            other=0.0,
        )
        new_top = tl.maximum(top, tl.max(lse, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(lse - shift)
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(weights, 0)
        acc = acc * fade + tl.sum(weights[:, None] * part, 0)
        top = new_top
    acc = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out + b * out_row + head * out_head + j, acc.to(out.dtype.element_ty), mask=j < V_DIM)


@lru_cache(maxsize=1024)
def count_runs(capacity: int, pairs: int, slots: int, cost: float) -> int:
    """Runs that a row of full length is cut into: those that should take the least time. No length has a say in it.

    capacity: keys of a row, at most. pairs: rows of the batch times kv heads. slots: programs that the chip holds at once.
    cost: bytes that one run's result takes to write and read, as a share of a row's keys and values.
    """

    def time(runs: int) -> float:
        full, rest = divmod(pairs * runs, slots)
        waves = full + (max(rest / slots, SATURATED) if rest else 0.0)
        joined = cost * runs if runs > 1 else 0.0
        return waves * slots / (pairs * runs) + joined + UNEVEN / runs

    return min(range(1, max(1, min(-(-capacity // MIN_RUN), MAX_RUNS)) + 1), key=time)


def decode_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `glimpse_kernels.decode_attention`; arguments are checked there. Head dimensions up to 256 (ValueError)."""
    batch, q_heads, dim = q.shape
    block_size, kv_heads, v_dim = v_pool.shape[1:]
    if out is None:
        out = torch.empty((batch, q_heads, v_dim), dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    capacity = block_table.shape[1] * block_size
    if not capacity or not k_pool.shape[0]:
        return out.zero_()
    chip = _triton.chip(q.device)
    d_pad, v_pad = max(16, _triton.power_of_2(dim)), max(16, _triton.power_of_2(v_dim))
    if max(d_pad, v_pad) > 256:
        raise ValueError(
            f"decode_attention: q, v_pool: expected head dimensions of at most 256, found {dim} and {v_dim}"
        )
    config = CONFIGS.pick(chip.capability, (q.element_size(), max(64, d_pad, v_pad)))
    group = q_heads // kv_heads
    runs = config.runs
    if runs is None:
        cost = 8 * group * v_dim / (capacity * (dim + v_dim) * q.element_size())
        runs = count_runs(capacity, batch * kv_heads, config.resident * chip.multiprocessors, cost)
    lse_at = batch * q_heads * runs * v_dim
    k_strides, v_strides = k_pool.stride()[:3], v_pool.stride()[:3]
    parts = out
    if runs > 1:
        parts = torch.empty(lse_at + batch * q_heads * runs, dtype=torch.float32, device=q.device)
    options: dict[str, Any] = {"num_warps": config.warps, "num_stages": config.stages}
    decode_attention_kernel[(kv_heads, runs, batch)](
        q, k_pool, v_pool, block_table, lengths, out, parts,
        (dim**-0.5 if scale is None else scale) * _triton.LOG2E, capacity, runs, lse_at, q_heads,
        *q.stride()[:2], *k_strides, *v_strides, block_table.stride(0), *out.stride()[:2],
        GROUP=group, M=max(16, _triton.power_of_2(group)), D=dim, D_PAD=d_pad, V_DIM=v_dim, V_PAD=v_pad,
        BLOCK=block_size, KEYS=config.keys, UNIT=UNIT, SPLIT=runs > 1, ALIKE=k_strides == v_strides,
        **options,
    )  # fmt: skip
    if runs > 1:
        join = JOIN_CONFIGS.pick(chip.capability, "few" if runs <= 16 else "many")
        columns = min(join.columns, v_pad)
        options = {"num_warps": join.warps}
        decode_attention_join_kernel[(-(-v_dim // columns), q_heads, batch)](
            parts, lengths, out, capacity, runs, lse_at, q_heads, *out.stride()[:2],
            V_DIM=v_dim, COLUMNS=columns, TILE=join.runs, UNIT=UNIT, STAGES=join.stages,
            **options,
        )  # fmt: skip
    return out

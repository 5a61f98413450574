# SPDX-License-Identifier: Apache-2.0
"""`last_row_attention` in Triton: log-sum-exp of the row by fixed chunks of keys, then the weights of the listed keys.

Both passes are bound by reading keys once. The chunks start where their sequence starts, so a row's sum does not depend on
what else is in the batch. A program of the second pass goes through all heads of its tokens and keeps only their sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from glimpse_kernels import _triton

CHUNKS = {2: 128, 4: 32}
"""Keys of one partial sum, by bytes of an element."""
PARTS = 64
"""Partial sums taken together at once."""


@dataclass(frozen=True)
class Tiles(_triton.Launch):
    """tokens: listed keys of a program."""

    tokens: int = 32


CHUNK_CONFIGS: _triton.Configs[_triton.Launch] = _triton.Configs(
    "last_row_attention_sum",
    # By bytes of an element and whether D is more than 128.
    {
        (80, (2, False)): _triton.Launch(warps=4, stages=1),
        (80, (2, True)): _triton.Launch(warps=8, stages=1),
        (80, (4, False)): _triton.Launch(warps=8, stages=1),
        (80, (4, True)): _triton.Launch(warps=8, stages=1),
    },
    candidates=(
        _triton.Launch(warps=2, stages=1),
        _triton.Launch(warps=4, stages=1),
        _triton.Launch(warps=8, stages=1),
    ),
)
CONFIGS: _triton.Configs[Tiles] = _triton.Configs(
    "last_row_attention",
    {
        (80, (2, False)): Tiles(warps=2, stages=3, tokens=16),
        (80, (2, True)): Tiles(warps=4, stages=2, tokens=16),
        (80, (4, False)): Tiles(warps=4, stages=2, tokens=16),
        (80, (4, True)): Tiles(warps=4, stages=1, tokens=16),
    },
    candidates=(
        Tiles(warps=1, stages=3, tokens=16),
        Tiles(warps=2, stages=3, tokens=16),
        Tiles(warps=4, stages=3, tokens=32),
        Tiles(warps=4, stages=3, tokens=64),
    ),
)


@triton.jit
def _dots(
    k_ptr, q_ptr, row, row_mask, heads_per_key, k_stride_row, q_stride_head,
    DIM: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """[rows, HEADS]: products of rows of one key head with its query heads; 0 where there is no row or no head."""
    head = tl.arange(0, HEADS)
    d = tl.arange(0, FIRST)
    k_address = k_ptr + row.to(tl.int64)[:, None] * k_stride_row
    q_address = q_ptr + head.to(tl.int64)[None, :] * q_stride_head
    head_mask = head[None, :] < heads_per_key
    k_tile = tl.load(k_address + d[None, :], mask=row_mask[:, None] & (d[None, :] < DIM), other=0.0)
    q_tile = tl.load(q_address + d[:, None], mask=head_mask & (d[:, None] < DIM), other=0.0)
    found = tl.dot(k_tile, q_tile, input_precision="ieee")
    if SECOND > 0:
        d = FIRST + tl.arange(0, SECOND)
        k_tile = tl.load(k_address + d[None, :], mask=row_mask[:, None] & (d[None, :] < DIM), other=0.0)
        q_tile = tl.load(q_address + d[:, None], mask=head_mask & (d[:, None] < DIM), other=0.0)
        found = tl.dot(k_tile, q_tile, found, input_precision="ieee")
    return found


@triton.jit(do_not_specialize=["sequences"])
def last_row_attention_chunk_kernel(
    q_ptr, k_ptr, cu_k_ptr, most_ptr, sums_ptr, sequences, heads, heads_per_key,
    q_stride_row, q_stride_head, k_stride_row, k_stride_head, scale_log2,
    DIM: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, HEADS: tl.constexpr, CHUNK: tl.constexpr,
    SEQUENCES: tl.constexpr,
):  # fmt: skip
    """most, sums [chunks, Hq]: largest exponent (base 2) and sum of powers over a chunk. Grid (chunks, Hkv)."""
    chunk = tl.program_id(0)
    kv_head = tl.program_id(1)
    # Chunks are numbered sequence by sequence; those behind the last one have nothing to do.
    s = tl.arange(0, SEQUENCES)
    begin = tl.load(cu_k_ptr + s, mask=s < sequences, other=0)
    end = tl.load(cu_k_ptr + s + 1, mask=s < sequences, other=0)
    upto = tl.cumsum(tl.cdiv(end - begin, CHUNK), axis=0)
    sequence = tl.sum((upto <= chunk).to(tl.int32), axis=0)
    if sequence < sequences:
        before = tl.max(tl.where(s < sequence, upto, 0), axis=0)
        row_end = tl.load(cu_k_ptr + sequence + 1)
        row = tl.load(cu_k_ptr + sequence) + (chunk - before) * CHUNK + tl.arange(0, CHUNK)
        head = kv_head * heads_per_key + tl.arange(0, HEADS)
        found = _dots(
            k_ptr + kv_head.to(tl.int64) * k_stride_head,
            q_ptr + sequence.to(tl.int64) * q_stride_row + kv_head.to(tl.int64) * heads_per_key * q_stride_head,
            row, row < row_end, heads_per_key, k_stride_row, q_stride_head, DIM, FIRST, SECOND, HEADS,
        )  # fmt: skip
        exponents = tl.where((row < row_end)[:, None], found * scale_log2, float("-inf"))
        most = tl.max(exponents, axis=0)
        sums = tl.sum(tl.exp2(exponents - most[None, :]), axis=0)
        where = chunk.to(tl.int64) * heads + head
        mask = tl.arange(0, HEADS) < heads_per_key
        tl.store(most_ptr + where, most, mask=mask)
        tl.store(sums_ptr + where, sums, mask=mask)


@triton.jit(do_not_specialize=["sequences"])
def last_row_attention_lse_kernel(
    most_ptr, sums_ptr, cu_k_ptr, lse_ptr, sequences, heads,
    HEADS: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """lse [B, Hq], natural. Grid (B, head tiles)."""
    sequence = tl.program_id(0)
    s = tl.arange(0, SEQUENCES)
    begin = tl.load(cu_k_ptr + s, mask=s < sequence, other=0)
    end = tl.load(cu_k_ptr + s + 1, mask=s < sequence, other=0)
    before = tl.sum(tl.cdiv(end - begin, CHUNK), axis=0)
    chunks = tl.cdiv(tl.load(cu_k_ptr + sequence + 1) - tl.load(cu_k_ptr + sequence), CHUNK)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    most = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    for start in range(0, chunks, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = (part[:, None] < chunks) & (head[None, :] < heads)
        where = (before + part).to(tl.int64)[:, None] * heads + head[None, :]
        exponents = tl.load(most_ptr + where, mask=mask, other=float("-inf"))
        sums = tl.load(sums_ptr + where, mask=mask, other=0.0)
        higher = tl.maximum(most, tl.max(exponents, axis=0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(most - base) + tl.sum(sums * tl.exp2(exponents - base[None, :]), axis=0)
        most = higher
    lse = tl.where(most == float("-inf"), float("-inf"), (most + tl.log2(total)) * 0.6931471805599453)
    tl.store(lse_ptr + sequence.to(tl.int64) * heads + head, lse, mask=head < heads)


@triton.jit(do_not_specialize=["tokens"])
def last_row_attention_kernel(
    q_ptr, k_ptr, index_ptr, seq_ptr, lse_ptr, out_ptr, tokens, kv_heads, heads_per_key,
    q_stride_row, q_stride_head, k_stride_row, k_stride_head, lse_stride_row, scale_log2, factor,
    DIM: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """out [N]: mean over heads of the weights of the listed keys. Grid (token tiles,)."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    listed = token < tokens
    row = tl.load(index_ptr + token, mask=listed, other=0)
    seq = tl.load(seq_ptr + token, mask=listed, other=0)
    head = tl.arange(0, HEADS)
    result = tl.zeros([TOKENS], tl.float32)
    lowest = tl.min(tl.where(listed, seq, 2147483647), axis=0)
    highest = tl.max(tl.where(listed, seq, -1), axis=0)
    # Tokens come sequence by sequence, so a tile knows one or a few of them; any other order is only slower.
    for sequence in range(lowest, highest + 1):
        mine = listed & (seq == sequence)
        total = tl.zeros([TOKENS], tl.float32)
        q_row = q_ptr + tl.cast(sequence, tl.int64) * q_stride_row
        lse_row = lse_ptr + tl.cast(sequence, tl.int64) * lse_stride_row
        for kv_head in tl.range(0, kv_heads, num_stages=STAGES):
            found = _dots(
                k_ptr + tl.cast(kv_head, tl.int64) * k_stride_head,
                q_row + tl.cast(kv_head, tl.int64) * heads_per_key * q_stride_head,
                row, mine, heads_per_key, k_stride_row, q_stride_head, DIM, FIRST, SECOND, HEADS,
            )  # fmt: skip
            lse = tl.load(
                lse_row + kv_head * heads_per_key + head, mask=head < heads_per_key, other=float("-inf")
            )
            lse = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
            total += tl.sum(tl.exp2(found * scale_log2 - lse[None, :]), axis=1)
        result = tl.where(mine, total, result)
    tl.store(out_ptr + token, result * factor, mask=listed)


def last_row_attention(
    q: Tensor,
    k: Tensor,
    cu_seqlens_k: Tensor,
    token_index: Tensor,
    token_seq: Tensor,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `glimpse_kernels.last_row_attention`; arguments are checked there."""
    sequences, heads, dim = q.shape
    k_rows, kv_heads, _ = k.shape
    count, per_key = token_index.shape[0], heads // kv_heads
    if out is None:
        out = torch.empty(count, dtype=torch.float32, device=q.device)
    if count == 0:
        return out
    capability = _triton.chip(q.device).capability
    key = (q.element_size(), dim > 128)
    first, second = _triton.parts(dim)
    padded = max(16, _triton.power_of_2(per_key))
    scale_log2 = _triton.LOG2E * (dim**-0.5 if scale is None else scale)
    if lse is None:
        chunk = CHUNKS[q.element_size()]
        chunks = triton.cdiv(k_rows, chunk) + sequences
        most, sums = torch.empty(2, chunks, heads, dtype=torch.float32, device=q.device).unbind()
        lse = torch.empty(sequences, heads, dtype=torch.float32, device=q.device)
        padded_sequences = _triton.power_of_2(sequences)
        launch = CHUNK_CONFIGS.pick(capability, key)
        last_row_attention_chunk_kernel[(chunks, kv_heads)](
            q, k, cu_seqlens_k, most, sums, sequences, heads, per_key,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), scale_log2,
            DIM=dim, FIRST=first, SECOND=second, HEADS=padded, CHUNK=chunk, SEQUENCES=padded_sequences,
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
        last_row_attention_lse_kernel[(sequences, triton.cdiv(heads, 16))](
            most, sums, cu_seqlens_k, lse, sequences, heads,
            HEADS=16, CHUNK=chunk, PARTS=PARTS, SEQUENCES=padded_sequences, num_warps=4, num_stages=1,
        )  # fmt: skip
    tiles = CONFIGS.pick(capability, key)
    last_row_attention_kernel[(triton.cdiv(count, tiles.tokens),)](
        q, k, token_index, token_seq, lse, out, count, kv_heads, per_key,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), lse.stride(0), scale_log2, 1.0 / heads,
        DIM=dim, FIRST=first, SECOND=second, HEADS=padded, TOKENS=tiles.tokens, STAGES=tiles.stages,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out

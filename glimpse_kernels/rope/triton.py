# SPDX-License-Identifier: Apache-2.0
"""`rope` in Triton: queries, keys and values in one launch.

A program takes a few rows and a few heads of them, as one tile with a line a head: both halves, cosines and sines lie in
the same threads, so nothing is exchanged, and all loads of a tile are in flight at once. The heads of a row are neighbours in
a warp, whose reads of the row's cosines then fall on the same addresses: one transfer serves them. Programs are numbered
head blocks first, so that those of one row run side by side: a fused qkv row is read as one run, and its cosines come from
memory once. The first head blocks of a row are queries, the next keys, the last values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from glimpse_kernels import _triton


@dataclass(frozen=True)
class RopeLaunch(_triton.Launch):
    """heads: of a row in a program, at most. pairs: pairs of elements a program rotates, which gives its rows."""

    heads: int = 4
    pairs: int = 2048


FEW_ROWS = 128
"""Up to here a launch lasts as long as one program: small programs of one row. Beyond it memory is what takes time."""

CONFIGS = _triton.Configs[RopeLaunch](
    "rope",
    {
        (80, "few"): RopeLaunch(warps=1, heads=4, pairs=256),
        (80, "many"): RopeLaunch(warps=4, heads=4, pairs=2048),
    },
    candidates=[
        RopeLaunch(warps=warps, heads=heads, pairs=pairs)
        for warps, pairs in ((1, 256), (2, 512), (2, 1024), (4, 1024), (4, 2048), (4, 4096), (8, 4096))
        for heads in (2, 4, 8)
    ],
)


@triton.jit
def _rotate(x, cos, sin, source, target, t, read, write, out, COS_ROW: tl.constexpr, SIN_ROW: tl.constexpr,
            HALF: tl.constexpr, PAD: tl.constexpr):  # fmt: skip
    """Rotate the heads that start at `source` (offsets from x, 64-bit) with row t of the tables, to `target` (from out).

    read, write: which heads to load, and which of them to store; loads need not wait for what is to be stored.
    """
    i = tl.arange(0, PAD)[None, :]
    mask = read[:, None] & (i < HALF)
    first = tl.load(x + source[:, None] + i, mask=mask, other=0.0)
    second = tl.load(x + source[:, None] + HALF + i, mask=mask, other=0.0)
    c = tl.load(cos + (t * COS_ROW)[:, None] + i, mask=mask, other=0.0)
    s = tl.load(sin + (t * SIN_ROW)[:, None] + i, mask=mask, other=0.0)
    first, second = first.to(tl.float32), second.to(tl.float32)
    to = out + target[:, None] + i
    mask = write[:, None] & (i < HALF)
    tl.store(to, (first * c - second * s).to(out.dtype.element_ty), mask=mask)
    tl.store(to + HALF, (second * c + first * s).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "cache_rows"])
def rope_kernel(
    q, k, v, k_out, v_out, cos, sin, slots,
    tokens, cache_rows, q_heads, kv_heads,
    q_row, q_head, k_row, k_head, v_row, v_head, k_out_row, k_out_head, v_out_row, v_out_head,
    COS_ROW: tl.constexpr, SIN_ROW: tl.constexpr,
    HALF: tl.constexpr, PAD: tl.constexpr, V_DIM: tl.constexpr, V_PAD: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr,
    Q_BLOCKS: tl.constexpr, KV_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks * BLOCKS): head block = program % BLOCKS, Q_BLOCKS of queries, KV_BLOCKS of keys, the others values."""
    program = tl.program_id(0)
    block = program % BLOCKS
    pair = tl.arange(0, ROWS * HEADS)
    row = (program // BLOCKS) * ROWS + pair // HEADS
    t = row.to(tl.int64)
    if block < Q_BLOCKS:
        head = (block * HEADS + pair % HEADS).to(tl.int64)
        at = t * q_row + head * q_head
        here = (row < tokens) & (head < q_heads)
        _rotate(q, cos, sin, at, at, t, here, here, q, COS_ROW, SIN_ROW, HALF, PAD)
    else:
        head = ((block - Q_BLOCKS) % KV_BLOCKS * HEADS + pair % HEADS).to(tl.int64)
        here = (row < tokens) & (head < kv_heads)
        wanted = here
        to = t
        if SLOTS:
            to = tl.load(slots + t, mask=here, other=-1).to(tl.int64)
            wanted = (to >= 0) & (to < cache_rows)
        if block < Q_BLOCKS + KV_BLOCKS:
            _rotate(k, cos, sin, t * k_row + head * k_head, to * k_out_row + head * k_out_head, t, here, wanted, k_out,
                    COS_ROW, SIN_ROW, HALF, PAD)  # fmt: skip
        else:
            i = tl.arange(0, V_PAD)[None, :]
            source = v + (t * v_row + head * v_head)[:, None] + i
            value = tl.load(source, mask=here[:, None] & (i < V_DIM), other=0.0)
            target = v_out + (to * v_out_row + head * v_out_head)[:, None] + i
            tl.store(target, value, mask=wanted[:, None] & (i < V_DIM))


def rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    v: Tensor | None = None,
    k_out: Tensor | None = None,
    v_out: Tensor | None = None,
    slots: Tensor | None = None,
) -> None:
    """See `glimpse_kernels.rope`; arguments are checked there."""
    tokens, q_heads, dim = q.shape
    if k is None:
        kv_heads, cache_rows, k = 0, 0, q
        k_out = v = v_out = q
        v_dim = 0
    else:
        kv_heads = k.shape[1]
        k_out = k if k_out is None else k_out
        cache_rows = k_out.shape[0]
        if v is None or v_out is None:
            v, v_out, v_dim = k, k, 0
        else:
            v_dim, cache_rows = v.shape[2], min(cache_rows, v_out.shape[0])
    if not tokens or not dim or not q_heads + kv_heads:
        return
    chip = _triton.chip(q.device)
    config = CONFIGS.pick(chip.capability, "few" if tokens <= FEW_ROWS else "many")
    half = dim // 2
    pad = _triton.power_of_2(half)
    heads = min(config.heads, _triton.power_of_2(max(q_heads, kv_heads)))
    rows = max(1, config.pairs // (heads * pad))
    q_blocks, kv_blocks = -(-q_heads // heads), -(-kv_heads // heads)
    blocks = q_blocks + (2 if v_dim else 1) * kv_blocks
    options: dict[str, Any] = {"num_warps": config.warps, "num_stages": config.stages}
    rope_kernel[(-(-tokens // rows) * blocks,)](
        q, k, v, k_out, v_out, cos, sin, cos if slots is None else slots,
        tokens, cache_rows, q_heads, kv_heads,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *k_out.stride()[:2], *v_out.stride()[:2],
        COS_ROW=cos.stride(0), SIN_ROW=sin.stride(0), HALF=half, PAD=pad, V_DIM=v_dim, V_PAD=_triton.power_of_2(max(v_dim, 1)),
        ROWS=rows, HEADS=heads, SLOTS=slots is not None,
        Q_BLOCKS=q_blocks, KV_BLOCKS=max(1, kv_blocks), BLOCKS=blocks,
        **options,
    )  # fmt: skip

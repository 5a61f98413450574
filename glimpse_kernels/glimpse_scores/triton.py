# SPDX-License-Identifier: Apache-2.0
"""`glimpse_scores` in Triton: one pass over the listed keys, all query heads of a key's head from one read of it.

Bound by the bytes of the keys and, at a picture's size, by the latency of one launch: small tiles, so that a few thousand
tokens are spread over all multiprocessors. The tensor cores do the products (16-bit operands, fp32 sums), the query heads
of one kv head padded to 16 columns. Tokens of a tile nearly always belong to one sequence: then its query tile is
read once; otherwise the tile runs over the sequences between its lowest and its highest, and each token takes its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from glimpse_kernels._triton import Configs, Launch, chip, power_of_2


@dataclass(frozen=True)
class Tile(Launch):
    """tokens: listed keys of one program."""

    tokens: int = 32


CONFIGS: Configs[Tile] = Configs(
    "glimpse_scores",
    {
        (80, 2): Tile(warps=4, stages=1, tokens=32),
        (90, 2): Tile(warps=2, stages=1, tokens=32),
        (80, 4): Tile(warps=4, stages=1, tokens=32),
    },
    candidates=[Tile(w, 1, t) for w, t in ((1, 16), (2, 16), (2, 32), (4, 32), (2, 64), (4, 64), (4, 128))],
)
"""Keyed by the bytes of an element."""


@triton.jit(do_not_specialize=["tokens", "sequences", "count"])
def glimpse_scores_kernel(
    q_ptr, k_ptr, index_ptr, seq_ptr, lse_ptr, out_ptr,
    q_row, q_head, k_row, k_head, lse_row, out_row,
    tokens, sequences, count, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (tile of tokens, kv head). HEADS and BLOCK_D are GROUP and DIM rounded up to what a dot takes."""
    n = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    kv_head = tl.program_id(1).to(tl.int64)
    listed = n < count
    index = tl.load(index_ptr + n, mask=listed, other=-1)
    seq = tl.load(seq_ptr + n, mask=listed, other=-1)
    known = (index >= 0) & (index < tokens) & (seq >= 0) & (seq < sequences)
    d = tl.arange(0, BLOCK_D)
    keys = tl.load(
        k_ptr + index.to(tl.int64)[:, None] * k_row + kv_head * k_head + d[None, :],
        mask=known[:, None] & (d[None, :] < DIM),
        other=0.0,
    )
    g = tl.arange(0, HEADS)
    heads = kv_head * GROUP + g
    # A row that does not exist cannot raise here: its scores are NaN, which no selection takes for a high one.
    found = tl.full((TOKENS, HEADS), float("nan"), tl.float32)
    first = tl.min(tl.where(known, seq, sequences), axis=0)
    last = tl.max(tl.where(known, seq, -1), axis=0)
    for b in range(first, last + 1):
        row = tl.full((), 0, tl.int64) + b
        query = tl.load(
            q_ptr + row * q_row + heads[None, :] * q_head + d[:, None],
            mask=(g[None, :] < GROUP) & (d[:, None] < DIM),
            other=0.0,
        )
        logits = tl.dot(keys, query, input_precision="ieee") * scale
        if lse_ptr is not None:
            logits -= tl.load(lse_ptr + row * lse_row + heads, mask=g < GROUP, other=0.0)[None, :]
        found = tl.where((known & (seq == b))[:, None], logits, found)
    tl.store(
        out_ptr + n[:, None] * out_row + heads[None, :], found, mask=listed[:, None] & (g[None, :] < GROUP)
    )


def glimpse_scores(
    q: Tensor,
    k: Tensor,
    token_index: Tensor,
    token_seq: Tensor,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `glimpse_kernels.glimpse_scores`; arguments are checked there. The scores of a row that does not exist (the
    device cannot raise) are NaN."""
    sequences, q_heads, dim = q.shape
    tokens, kv_heads, _ = k.shape
    count = token_index.shape[0]
    if out is None:
        out = torch.empty(count, q_heads, dtype=torch.float32, device=q.device)
    if count == 0 or q_heads == 0:
        return out
    group = q_heads // kv_heads
    config = CONFIGS.pick(chip(q.device).capability, q.element_size())
    glimpse_scores_kernel[(triton.cdiv(count, config.tokens), kv_heads)](
        q, k, token_index, token_seq, lse, out,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), 0 if lse is None else lse.stride(0), out.stride(0),
        tokens, sequences, count, dim**-0.5 if scale is None else scale,
        GROUP=group, DIM=dim,
        TOKENS=config.tokens, HEADS=max(16, power_of_2(group)),
        BLOCK_D=max(16, power_of_2(dim)),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out

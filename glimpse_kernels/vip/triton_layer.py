# SPDX-License-Identifier: Apache-2.0
"""The two Triton kernels between which attention stands in a layer of `vip`.

`vip_project_kernel`: queries, keys and values from a layer's normed input and its condition, rotated. A matrix product whose
tiles are spread over rows and columns: one program for a tile of rows would have to stream all weights of the layer through one
multiprocessor, and at a picture's size there would be fewer programs than multiprocessors. In the first layer the normed
input does not exist yet; each program makes it from the scores, a product so thin that doing it again costs less
than a launch.

`vip_mlp_kernel`: everything between attention and the next layer's projections, for a tile of whole rows: output projection,
residual, norm, gated MLP, residual, and the next layer's norm or the logit. The residual is the accumulator of all its products.
It is fp32 from the first layer to the last.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from glimpse_kernels._triton import Configs, Launch


@dataclass(frozen=True)
class ProjectTile(Launch):
    """rows: tokens, pairs: rotary pairs (two output columns each), depth: input columns at a time."""

    rows: int = 128
    pairs: int = 64
    depth: int = 64


@dataclass(frozen=True)
class MlpTile(Launch):
    """rows: tokens, depth: columns of the attention output at a time, inner: columns of the MLP's inner width at a time."""

    rows: int = 64
    depth: int = 64
    inner: int = 64


PROJECT: Configs[ProjectTile] = Configs(
    "vip_project",
    {
        (80, 2): ProjectTile(warps=8, stages=3, rows=128, pairs=64, depth=32),
        (90, 2): ProjectTile(warps=4, stages=3, rows=64, pairs=64, depth=64),
        (100, 2): ProjectTile(warps=8, stages=3, rows=128, pairs=64, depth=64),
        (80, 4): ProjectTile(warps=4, stages=2, rows=64, pairs=16, depth=16),
    },
    candidates=[
        ProjectTile(w, s, r, p, d)
        for w, r, p in ((4, 64, 64), (8, 128, 64), (4, 64, 32), (4, 128, 32), (8, 128, 128))
        for s in (2, 3, 4)
        for d in (32, 64)
    ],
)
"""Keyed by the bytes of an element of the weights."""

WIDE = 256
"""Working width up to which a tile of rows is held in registers at full size."""

MLP: Configs[MlpTile] = Configs(
    "vip_mlp",
    {
        (80, (2, False)): MlpTile(warps=8, stages=2, rows=32, depth=32, inner=16),
        (90, (2, False)): MlpTile(warps=8, stages=2, rows=32, depth=64, inner=64),
        (80, (2, True)): MlpTile(warps=8, stages=1, rows=16, depth=16, inner=16),
        (80, (4, False)): MlpTile(warps=8, stages=1, rows=16, depth=16, inner=16),
        (80, (4, True)): MlpTile(warps=8, stages=1, rows=16, depth=16, inner=16),
    },
    candidates=[
        MlpTile(w, s, r, d, i)
        for w, r in ((4, 32), (8, 32), (4, 64), (8, 64), (8, 128))
        for s in (1, 2, 3)
        for d in (32, 64)
        for i in (16, 32, 64)
    ],
)
"""Keyed by the bytes of an element of the weights, and whether the working width is above `WIDE`."""


@triton.jit
def _enter(
    scores_ptr, scores_row, scores_col, w_ptr, w_row, b_ptr, n, live, f,
    S: tl.constexpr, F: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Columns `f` of in_proj(scores) for rows `n`, fp32. Scores are fp32: what a 16-bit operand would lose of them goes in as a
    second operand."""
    x = tl.zeros((n.shape[0], f.shape[0]), tl.float32)
    for s0 in range(0, S, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        w = tl.load(
            w_ptr + f[None, :] * w_row + s[:, None], mask=(f < F)[None, :] & (s < S)[:, None], other=0.0
        )
        seen = tl.load(
            scores_ptr + n[:, None] * scores_row + s[None, :] * scores_col,
            mask=live[:, None] & (s < S)[None, :],
            other=0.0,
        ).to(tl.float32)
        high = seen.to(w.dtype)
        x = tl.dot(high, w, x, input_precision="ieee")
        if w.dtype != tl.float32:
            x = tl.dot((seen - high.to(tl.float32)).to(w.dtype), w, x)
    if b_ptr is not None:
        x += tl.load(b_ptr + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def _hidden(
    h_ptr, h_row,
    scores_ptr, scores_row, scores_col, in_w_ptr, in_w_row, in_b_ptr, norm_ptr, rstd,
    n, live, f, S: tl.constexpr, F: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Columns `f` of the layer's normed input: read, or made from the scores where there is none to read."""
    if h_ptr is not None:
        h = tl.load(h_ptr + n[:, None] * h_row + f[None, :], mask=live[:, None] & (f < F)[None, :], other=0.0)
    else:
        x = _enter(
            scores_ptr, scores_row, scores_col, in_w_ptr, in_w_row, in_b_ptr, n, live, f, S, F, BLOCK_S
        )
        norm = tl.load(norm_ptr + f, mask=f < F, other=0.0)
        h = (x * rstd[:, None] * norm.to(tl.float32)[None, :]).to(norm.dtype)
    return h


@triton.jit(do_not_specialize=["count"])
def vip_project_kernel(
    h_ptr, h_row, c_ptr, c_row,
    wq_ptr, wq_row, bq_ptr, wk_ptr, wk_row, bk_ptr, wv_ptr, wv_row, bv_ptr,
    q_share_ptr, k_share_ptr, share_row,
    cos_ptr, cos_row, sin_ptr, sin_row, q_ptr, k_ptr, v_ptr, q_row, k_row, v_row,
    scores_ptr, scores_row, scores_col, in_w_ptr, in_w_row, in_b_ptr, norm_ptr, x_ptr, x_row,
    count, eps,
    S: tl.constexpr, F: tl.constexpr, C: tl.constexpr, HALF: tl.constexpr, QK: tl.constexpr, V: tl.constexpr,
    ROWS: tl.constexpr, PAIRS: tl.constexpr, DEPTH: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """q, k [N, QK] from [h, c] and v [N, V] from h. Program: a tile of rows, and PAIRS pairs of columns of q, k or v.

    The condition comes as itself (c) or as what it adds to q and k before they are rotated (the shares), or there is none.

    A column of q or k is computed in the same program as the one it is rotated with, HALF further; the two are neighbours in the
    tile, so that a thread holds both. h_ptr None: the first layer, which also stores in_proj(scores) to x.
    """
    Q_TILES: tl.constexpr = (QK // 2 + PAIRS - 1) // PAIRS
    V_HALF: tl.constexpr = (V + 1) // 2
    TILES: tl.constexpr = 2 * Q_TILES + (V_HALF + PAIRS - 1) // PAIRS
    tile = tl.program_id(0) % TILES
    n = (tl.program_id(0) // TILES).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = n < count
    rstd = tl.zeros((ROWS,), tl.float32)
    if h_ptr is None:
        for f0 in range(0, F, DEPTH):
            f = f0 + tl.arange(0, DEPTH)
            x = _enter(
                scores_ptr, scores_row, scores_col, in_w_ptr, in_w_row, in_b_ptr, n, live, f, S, F, BLOCK_S
            )
            rstd += tl.sum(x * x, axis=1)
            if tile == 0:
                tl.store(x_ptr + n[:, None] * x_row + f[None, :], x, mask=live[:, None] & (f < F)[None, :])
        rstd = tl.rsqrt(rstd / F + eps)
    column = tl.arange(0, 2 * PAIRS)
    acc = tl.zeros((ROWS, 2 * PAIRS), tl.float32)
    if tile < 2 * Q_TILES:
        w_ptr = wq_ptr
        w_row = wq_row
        out_ptr = q_ptr
        out_row = q_row
        first = tile * PAIRS
        if tile >= Q_TILES:
            w_ptr = wk_ptr
            w_row = wk_row
            out_ptr = k_ptr
            out_row = k_row
            first = (tile - Q_TILES) * PAIRS
        both = first + column // 2
        source = both // HALF * (2 * HALF) + both % HALF + column % 2 * HALF
        there = both < QK // 2
        w_ptrs = w_ptr + source[None, :] * w_row
        for f0 in range(0, F, DEPTH):
            f = f0 + tl.arange(0, DEPTH)
            h = _hidden(
                h_ptr, h_row, scores_ptr, scores_row, scores_col, in_w_ptr, in_w_row, in_b_ptr, norm_ptr, rstd,
                n, live, f, S, F, BLOCK_S,
            )  # fmt: skip
            w = tl.load(w_ptrs + f[:, None], mask=there[None, :] & (f < F)[:, None], other=0.0)
            acc = tl.dot(h, w, acc, input_precision="ieee")
        if c_ptr is not None:
            for c0 in range(0, C, DEPTH):
                c = c0 + tl.arange(0, DEPTH)
                seen = tl.load(
                    c_ptr + n[:, None] * c_row + c[None, :], mask=live[:, None] & (c < C)[None, :], other=0.0
                )
                w = tl.load(w_ptrs + (F + c)[:, None], mask=there[None, :] & (c < C)[:, None], other=0.0)
                acc = tl.dot(seen, w, acc, input_precision="ieee")
        if bq_ptr is not None:
            bq = tl.load(bq_ptr + source, mask=tl.where(tile < Q_TILES, both, QK) < QK // 2, other=0.0)
            acc += bq.to(tl.float32)[None, :]
        if bk_ptr is not None:
            bk = tl.load(bk_ptr + source, mask=tl.where(tile < Q_TILES, QK, both) < QK // 2, other=0.0)
            acc += bk.to(tl.float32)[None, :]
        one, two = tl.split(tl.reshape(acc, (ROWS, PAIRS, 2)))
        pair = first + tl.arange(0, PAIRS)
        mask = live[:, None] & (pair < QK // 2)[None, :]
        angle = pair % HALF
        place = (pair // HALF * (2 * HALF) + angle)[None, :]
        if q_share_ptr is not None:
            share_ptr = q_share_ptr
            if tile >= Q_TILES:
                share_ptr = k_share_ptr
            share = share_ptr + n[:, None] * share_row + place
            one += tl.load(share, mask=mask, other=0.0).to(tl.float32)
            two += tl.load(share + HALF, mask=mask, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + n[:, None] * cos_row + angle[None, :], mask=mask, other=0.0)
        sin = tl.load(sin_ptr + n[:, None] * sin_row + angle[None, :], mask=mask, other=0.0)
        target = out_ptr + n[:, None] * out_row + place
        tl.store(target, (one * cos - two * sin).to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(target + HALF, (two * cos + one * sin).to(out_ptr.dtype.element_ty), mask=mask)
    else:
        plain = (tile - 2 * Q_TILES) * (2 * PAIRS) + column
        for f0 in range(0, F, DEPTH):
            f = f0 + tl.arange(0, DEPTH)
            h = _hidden(
                h_ptr, h_row, scores_ptr, scores_row, scores_col, in_w_ptr, in_w_row, in_b_ptr, norm_ptr, rstd,
                n, live, f, S, F, BLOCK_S,
            )  # fmt: skip
            wv = tl.load(
                wv_ptr + plain[None, :] * wv_row + f[:, None],
                mask=(plain < V)[None, :] & (f < F)[:, None],
                other=0.0,
            )
            acc = tl.dot(h, wv, acc, input_precision="ieee")
        if bv_ptr is not None:
            acc += tl.load(bv_ptr + plain, mask=plain < V, other=0.0).to(tl.float32)[None, :]
        values = v_ptr + n[:, None] * v_row + plain[None, :]
        tl.store(values, acc.to(v_ptr.dtype.element_ty), mask=live[:, None] & (plain < V)[None, :])


@triton.jit
def _norm(x, norm_ptr, f, eps, F: tl.constexpr):
    """RMS norm of whole rows; columns of `x` beyond F are zero. In the dtype of the norm's weights."""
    norm = tl.load(norm_ptr + f, mask=f < F, other=0.0)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / F + eps)
    return (x * rstd[:, None] * norm.to(tl.float32)[None, :]).to(norm.dtype)


@triton.jit(do_not_specialize=["count"])
def vip_mlp_kernel(
    x_ptr, x_row, attended_ptr, attended_row,
    wo_ptr, wo_row, bo_ptr, norm_ptr,
    gate_ptr, gate_row, gate_b_ptr, up_ptr, up_row, up_b_ptr, down_ptr, down_row, down_b_ptr,
    next_norm_ptr, h_ptr, h_row, head_ptr, head_b_ptr, logits_ptr,
    count, eps,
    F: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_F: tl.constexpr, DEPTH: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """x += o(attended); x += down(silu(gate(norm(x))) * up(norm(x))); then h = next_norm(x), or the logits if there is no next
    layer (next_norm_ptr None). Program: a tile of rows. x is fp32 and rewritten in place."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = n < count
    f = tl.arange(0, BLOCK_F)
    whole = live[:, None] & (f < F)[None, :]
    x_ptrs = x_ptr + n[:, None] * x_row + f[None, :]
    x = tl.load(x_ptrs, mask=whole, other=0.0)
    for v0 in range(0, V, DEPTH):
        v = v0 + tl.arange(0, DEPTH)
        seen = tl.load(
            attended_ptr + n[:, None] * attended_row + v[None, :],
            mask=live[:, None] & (v < V)[None, :],
            other=0.0,
        )
        w = tl.load(
            wo_ptr + f[None, :] * wo_row + v[:, None], mask=(f < F)[None, :] & (v < V)[:, None], other=0.0
        )
        x = tl.dot(seen, w, x, input_precision="ieee")
    if bo_ptr is not None:
        x += tl.load(bo_ptr + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    h = _norm(x, norm_ptr, f, eps, F)
    for i0 in range(0, WIDTH, INNER):
        i = i0 + tl.arange(0, INNER)
        mask = (f < F)[:, None] & (i < WIDTH)[None, :]
        w = tl.load(gate_ptr + i[None, :] * gate_row + f[:, None], mask=mask, other=0.0)
        gate = tl.dot(h, w, input_precision="ieee")
        if gate_b_ptr is not None:
            gate += tl.load(gate_b_ptr + i, mask=i < WIDTH, other=0.0).to(tl.float32)[None, :]
        w = tl.load(up_ptr + i[None, :] * up_row + f[:, None], mask=mask, other=0.0)
        up = tl.dot(h, w, input_precision="ieee")
        if up_b_ptr is not None:
            up += tl.load(up_b_ptr + i, mask=i < WIDTH, other=0.0).to(tl.float32)[None, :]
        gated = (gate / (1.0 + tl.exp(-gate)) * up).to(h.dtype)
        w = tl.load(
            down_ptr + f[None, :] * down_row + i[:, None],
            mask=(f < F)[None, :] & (i < WIDTH)[:, None],
            other=0.0,
        )
        x = tl.dot(gated, w, x, input_precision="ieee")
    if down_b_ptr is not None:
        x += tl.load(down_b_ptr + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    if next_norm_ptr is not None:
        tl.store(x_ptrs, x, mask=whole)
        h = _norm(x, next_norm_ptr, f, eps, F)
        tl.store(h_ptr + n[:, None] * h_row + f[None, :], h, mask=whole)
    else:
        # The head is fp32 whatever the dtype: rounding its result would make equals out of logits that are not.
        head = tl.load(head_ptr + f, mask=f < F, other=0.0).to(tl.float32)
        logits = tl.sum(x * head[None, :], axis=1)
        if head_b_ptr is not None:
            logits += tl.load(head_b_ptr).to(tl.float32)
        tl.store(logits_ptr + n, logits, mask=live)

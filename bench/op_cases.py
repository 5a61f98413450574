# SPDX-License-Identifier: Apache-2.0
"""The measured rows of the ops around attention: what is called, what plain torch does instead, what it must cost.

A new row is a function (sizes, dtype) -> Work under `@REGISTRY.add(op, what)`. `plain` is the fastest formulation in plain
torch we know of, on operands laid out as torch likes them best; ours gets the packed layout of the runtime.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import glimpse_kernels as kernels
from bench.op_registry import REGISTRY, Sizes, Work
from glimpse_kernels.attention.naive import attention as naive_attention
from glimpse_kernels.decode_attention.naive import decode_attention as naive_decode
from glimpse_kernels.glimpse_scores.naive import glimpse_scores as naive_scores
from glimpse_kernels.rope.naive import rope as naive_rope

BLOCK = 16  # slots of a cache block


def nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _matmul_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B, H, L, D] by two batched products, the query heads of a key head side by side. In bf16 often ahead of sdpa."""
    grouped = (q * q.shape[-1] ** -0.5).reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    logits = grouped @ k.transpose(-1, -2)
    if mask is not None:
        logits = (logits.unflatten(2, (-1, q.shape[2])) + mask).flatten(2, 3)
    return (logits.softmax(-1) @ v).view(*q.shape[:3], v.shape[-1])


def _grouped_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, H, D] from one query [B, H, 1, D]: the heads of a key head take the place of query rows."""
    grouped = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
    return F.scaled_dot_product_attention(grouped, k, v).flatten(1, 2)


def _attention(
    segments: int, queries: int, keys: int, heads: int, kv: int, dim: int, dtype: torch.dtype, *,
    causal: bool, lse: bool = False,
) -> Work:  # fmt: skip
    q = torch.randn(segments * queries, heads, dim).to(dtype)
    k, v = (torch.randn(segments * keys, kv, dim).to(dtype) for _ in range(2))
    cu_q, cu_k = (torch.arange(segments + 1, dtype=torch.int32) * n for n in (queries, keys))
    ql, kl, vl = (t.unflatten(0, (segments, -1)).transpose(1, 2).contiguous() for t in (q, k, v))
    out = torch.full_like(q, torch.nan)
    see_all = not causal or queries == 1

    def ours() -> tuple[Tensor]:
        kernels.attention(q, k, v, cu_q, cu_k, causal=causal, out=out, return_lse=lse)  # type: ignore[call-overload]
        return (out,)

    def plain() -> tuple[Tensor]:
        o = F.scaled_dot_product_attention(ql, kl, vl, is_causal=not see_all, enable_gqa=heads != kv)
        return (o.transpose(1, 2).flatten(0, 1),)

    hidden = None if see_all else torch.full((queries, keys), -torch.inf, dtype=dtype).triu(1)

    def matmul() -> tuple[Tensor]:
        return (_matmul_attention(ql, kl, vl, hidden).transpose(1, 2).flatten(0, 1),)

    def truth() -> tuple[Tensor]:
        o = naive_attention(q.float(), k.float(), v.float(), cu_q, cu_k, causal=causal)
        assert isinstance(o, Tensor)
        return (o,)

    pairs = queries * keys if see_all else queries * (queries + 1) // 2
    if queries == 1:
        others = {"matmul": matmul, "sdpa, grouped": lambda: (_grouped_sdpa(ql, kl, vl).flatten(0, 1),)}
        return Work(ours, plain, truth, nbytes(q, k, v, out), "byte", plain_name="sdpa", others=others)
    amount = 4 * dim * heads * segments * pairs
    return Work(ours, plain, truth, amount, "flop", plain_name="sdpa", others={"matmul": matmul})


@REGISTRY.add("attention", "causal, all rows")
def attention_prefill(s: Sizes, dtype: torch.dtype) -> Work:
    return _attention(1, s.rows, s.rows, s.heads, s.kv_heads, s.dim, dtype, causal=True)


@REGISTRY.add("attention", "causal, kept rows")
def attention_pruned(s: Sizes, dtype: torch.dtype) -> Work:
    return _attention(1, s.kept, s.kept, s.heads, s.kv_heads, s.dim, dtype, causal=True)


@REGISTRY.add("attention", "glimpse row + lse")
def attention_glimpse(s: Sizes, dtype: torch.dtype) -> Work:
    return _attention(1, 1, s.rows, s.heads, s.kv_heads, s.dim, dtype, causal=True, lse=True)


@REGISTRY.add("attention", "vision, windows")
def attention_windows(s: Sizes, dtype: torch.dtype) -> Work:
    heads, w = s.vision_heads, s.window
    return _attention(s.patches // w, w, w, heads, heads, s.vision_dim, dtype, causal=False)


@REGISTRY.add("attention", "vision, full")
def attention_full(s: Sizes, dtype: torch.dtype) -> Work:
    heads, n = s.vision_heads, s.patches
    return _attention(1, n, n, heads, heads, s.vision_dim, dtype, causal=False)


def _decode(s: Sizes, batch: int, length: int, dtype: torch.dtype) -> Work:
    per_row = -(-length // BLOCK)
    table = (
        torch.randperm(batch * per_row).view(batch, per_row).int()
    )  # blocks in no order, as after some requests
    k, v = (torch.randn(batch * per_row, BLOCK, s.kv_heads, s.dim).to(dtype) for _ in range(2))
    q = torch.randn(batch, s.heads, s.dim).to(dtype)
    lengths = torch.full((batch,), length, dtype=torch.int32)
    kl, vl = (p[table.long()].flatten(1, 2)[:, :length].transpose(1, 2).contiguous() for p in (k, v))
    query, gqa = q[:, :, None], s.heads != s.kv_heads
    return Work(
        lambda: (kernels.decode_attention(q, k, v, table, lengths),),
        lambda: (F.scaled_dot_product_attention(query, kl, vl, enable_gqa=gqa)[:, :, 0],),
        lambda: (naive_decode(q.float(), k.float(), v.float(), table, lengths),),
        nbytes(kl, vl) + 2 * nbytes(q),
        "byte",
        plain_name="sdpa",
        others={
            "matmul": lambda: (_matmul_attention(query, kl, vl)[:, :, 0],),
            "sdpa, grouped": lambda: (_grouped_sdpa(query, kl, vl),),
        },
    )


@REGISTRY.add("decode_attention", "1 row, all tokens")
def decode_all(s: Sizes, dtype: torch.dtype) -> Work:
    return _decode(s, 1, s.rows, dtype)


@REGISTRY.add("decode_attention", "1 row, kept tokens")
def decode_kept(s: Sizes, dtype: torch.dtype) -> Work:
    return _decode(s, 1, s.kept, dtype)


@REGISTRY.add("decode_attention", "8 rows, all tokens")
def decode_batch(s: Sizes, dtype: torch.dtype) -> Work:
    return _decode(s, 8, s.rows, dtype)


@REGISTRY.add("glimpse_scores", "1 picture")
def scores(s: Sizes, dtype: torch.dtype) -> Work:
    q = torch.randn(1, s.heads, s.dim).to(dtype)
    k = torch.randn(s.rows, s.kv_heads, s.dim).to(dtype)
    first, scale = s.text // 4, s.dim**-0.5
    index = torch.arange(first, first + s.image, dtype=torch.int32)
    seq, long = torch.zeros_like(index), index.long()
    grouped = q.view(s.kv_heads, -1, s.dim).transpose(1, 2)

    def plain() -> tuple[Tensor]:
        logits = (
            k.index_select(0, long).transpose(0, 1) @ grouped
        )  # in the dtype of the model, as attention has them
        return (logits.transpose(0, 1).flatten(1).float() * scale,)

    # Ours accumulates in fp32 and does not round to the dtype: held to that.
    amount = nbytes(q, index, seq) + s.image * (nbytes(k) // s.rows + 4 * s.heads)
    return Work(
        lambda: (kernels.glimpse_scores(q, k, index, seq),),
        plain,
        lambda: (naive_scores(q.float(), k.float(), index, seq),),
        amount,
        "byte",
        tolerance=1e-5,
    )


def _plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """cos, sin [T, 1, D/2] in x's dtype. Faster than the usual cat(-x2, x1): it moves each half once."""
    out = torch.empty_like(x)
    (x1, x2), (y1, y2) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin)
    return out


def _rope(rows: int, heads: int, kv: int, dim: int, dtype: torch.dtype, *, cache: bool) -> Work:
    wide = torch.randn(rows, (heads + 2 * kv) * dim).to(dtype)  # one fused product, three views
    q, k, v = (t.unflatten(-1, (-1, dim)) for t in wide.split([heads * dim, kv * dim, kv * dim], -1))
    q0, k0 = q.clone(), k.clone()
    angles = torch.rand(rows, dim // 2)
    cos, sin = angles.cos(), angles.sin()
    c, s = cos[:, None].to(dtype), sin[:, None].to(dtype)
    pools = [torch.zeros(rows + 8, kv, dim, dtype=dtype) for _ in range(4)]
    slots = torch.arange(4, rows + 4)
    slots32 = slots.int()

    def ours() -> tuple[Tensor, ...]:
        if not cache:
            kernels.rope(q, k, cos, sin)
            return q, k
        kernels.rope(q, k, cos, sin, v=v, k_out=pools[0], v_out=pools[1], slots=slots32)
        return q, pools[0], pools[1]

    def plain() -> tuple[Tensor, ...]:
        rotated_q, rotated_k = _plain_rotate(q0, c, s), _plain_rotate(k0, c, s)
        if not cache:
            return rotated_q, rotated_k
        return rotated_q, pools[2].index_copy_(0, slots, rotated_k), pools[3].index_copy_(0, slots, v)

    def truth() -> tuple[Tensor, ...]:
        tq, tk, tv = q0.float(), k0.float(), v.float()
        if not cache:
            tq, tk = tq.clone(), tk.clone()
            naive_rope(tq, tk, cos, sin)
            return tq, tk
        k_out, v_out = (torch.zeros(rows + 8, kv, dim, dtype=tk.dtype) for _ in range(2))
        tq = tq.clone()
        naive_rope(tq, tk, cos, sin, v=tv, k_out=k_out, v_out=v_out, slots=slots32)
        return tq, k_out, v_out

    moved = nbytes(q0, k0) + (nbytes(v) if cache else 0)
    return Work(ours, plain, truth, 2 * moved + nbytes(cos, sin) + (nbytes(slots32) if cache else 0), "byte")


@REGISTRY.add("rope", "all rows, to cache")
def rope_prefill(s: Sizes, dtype: torch.dtype) -> Work:
    return _rope(s.rows, s.heads, s.kv_heads, s.dim, dtype, cache=True)


@REGISTRY.add("rope", "1 row, to cache")
def rope_decode(s: Sizes, dtype: torch.dtype) -> Work:
    return _rope(1, s.heads, s.kv_heads, s.dim, dtype, cache=True)


@REGISTRY.add("rope", "vision, in place")
def rope_vision(s: Sizes, dtype: torch.dtype) -> Work:
    return _rope(s.patches, s.vision_heads, s.vision_heads, s.vision_dim, dtype, cache=False)

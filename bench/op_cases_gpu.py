# SPDX-License-Identifier: Apache-2.0
"""Rows of the GPU benchmark alone, most of them behind a target (`bench.gpu_targets`): torch's own FlashAttention-2 beside
ours, a loop of windows beside one launch, selection and compaction together, decoding that fills the chip; see `bench.op_cases`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import glimpse_kernels as kernels
from bench.gpu_targets import BOOLEAN, CAUSAL, DECODE, FA2, FULL, LOOP, TOGETHER, WINDOWS
from bench.op_cases import _decode, nbytes
from bench.op_registry import REGISTRY, Results, Sizes, Work
from glimpse_kernels.attention.naive import attention as naive_attention
from glimpse_kernels.compact.naive import compact as naive_compact
from glimpse_kernels.select_tokens.naive import select_tokens as naive_select

TINY_ROWS = 96  # instead of thousands, where a shape is tiny: rehearsals
WINDOW = 64  # patches of a window of the vision tower


def _length(s: Sizes, rows: int) -> int:
    return rows if s.hidden >= 1024 else min(rows, TINY_ROWS)


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, backend: SDPBackend) -> Tensor:
    """[B, H, L, D] by one backend of torch's, or an error."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, causal: bool) -> Tensor:
    """torch's packed FlashAttention-2, [T, H, D], by the operator below `torch.nn.attention.varlen`."""
    found = torch.ops.aten._flash_attention_forward(
        q, k, v, bounds, bounds, longest, longest, 0.0, causal, False
    )
    return found[0]  # type: ignore[no-any-return]


def public_varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, causal: bool) -> Tensor:
    """The public function, whose arguments changed between versions of torch."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, object] = {}
    if "is_causal" in known:
        options["is_causal"] = causal
    elif causal:
        options["window_size"] = (-1, 0)
    if "enable_gqa" in known and q.shape[1] != k.shape[1]:
        options["enable_gqa"] = True
    return varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)  # type: ignore[no-any-return, arg-type]


def _attention(
    segments: int, length: int, heads: int, kv: int, dim: int, dtype: torch.dtype, *, causal: bool, loop: bool = False
) -> Work:  # fmt: skip
    """Equal segments; plain torch gets them as a batch, as packed rows, and (loop) one call after the other."""
    wide = torch.randn(segments * length, (heads + 2 * kv) * dim).to(dtype)  # one fused product, three views
    q, k, v = (t.unflatten(-1, (-1, dim)) for t in wide.split([heads * dim, kv * dim, kv * dim], -1))
    bounds = torch.arange(segments + 1, dtype=torch.int32) * length
    out = torch.full((segments * length, heads, dim), torch.nan, dtype=dtype)
    apart = [t.contiguous() for t in (q, k, v)]
    batch = [t.unflatten(0, (segments, -1)).transpose(1, 2).contiguous() for t in apart]

    def packed(o: Tensor) -> Results:
        return (o.transpose(1, 2).flatten(0, 1),)

    def ours() -> Results:
        kernels.attention(q, k, v, bounds, bounds, causal=causal, max_seqlen_q=length, out=out)
        return (out,)

    def by(backend: SDPBackend) -> Callable[[], Results]:
        return lambda: packed(sdpa(batch[0], batch[1], batch[2], causal, backend))

    def looped() -> Results:
        parts = (
            sdpa(
                batch[0][i : i + 1],
                batch[1][i : i + 1],
                batch[2][i : i + 1],
                causal,
                SDPBackend.FLASH_ATTENTION,
            )
            for i in range(segments)
        )
        return (torch.cat([o.transpose(1, 2) for o in parts]).flatten(0, 1),)

    def truth() -> Results:
        o = naive_attention(q.float(), k.float(), v.float(), bounds, bounds, causal=causal)
        assert isinstance(o, Tensor)
        return (o,)

    others: dict[str, Callable[[], Results]] = {
        f"{FA2}, varlen": lambda: (varlen(*apart, bounds, length, causal),),
        f"{FA2}, varlen_attn": lambda: (public_varlen(*apart, bounds, length, causal),),
        "cuDNN": by(SDPBackend.CUDNN_ATTENTION),
        "sdpa, torch's choice": lambda: packed(
            F.scaled_dot_product_attention(*batch, is_causal=causal, enable_gqa=heads != kv)
        ),
    }
    if loop:
        others[LOOP] = looped
    pairs = length * (length + 1) // 2 if causal else length * length
    return Work(
        ours, by(SDPBackend.FLASH_ATTENTION), truth, 4.0 * dim * heads * segments * pairs, "flop",
        plain_name=f"{FA2}, sdpa", others=others,
    )  # fmt: skip


def _add_causal(rows: int, what: str) -> None:
    @REGISTRY.add("attention", what, per_model=True, where="gpu")
    def build(s: Sizes, dtype: torch.dtype) -> Work:
        return _attention(1, _length(s, rows), s.heads, s.kv_heads, s.dim, dtype, causal=True)


for _rows, _what in CAUSAL.items():
    _add_causal(_rows, _what)


@REGISTRY.add("attention", WINDOWS, per_model=True, where="gpu")
def windows_beside_a_loop(s: Sizes, dtype: torch.dtype) -> Work:
    count = _length(s, 16384) // WINDOW or 1
    heads = s.vision_heads
    return _attention(count, WINDOW, heads, heads, s.vision_dim, dtype, causal=False, loop=True)


@REGISTRY.add("attention", FULL, per_model=True, where="gpu")
def full_vision(s: Sizes, dtype: torch.dtype) -> Work:
    heads = s.vision_heads
    return _attention(1, _length(s, 16384), heads, heads, s.vision_dim, dtype, causal=False)


@REGISTRY.add("attention", "kept rows in all keys", where="gpu")
def gathered(s: Sizes, dtype: torch.dtype) -> Work:
    """The layer that prunes: the queries that stay, at their places, against the keys of all rows."""
    places = torch.arange(s.kept, dtype=torch.int32) * (s.rows // s.kept)
    q = torch.randn(s.kept, s.heads, s.dim).to(dtype)
    k, v = (torch.randn(s.rows, s.kv_heads, s.dim).to(dtype) for _ in range(2))
    cu_q, cu_k = (torch.arange(2, dtype=torch.int32) * n for n in (s.kept, s.rows))
    out = torch.full_like(q, torch.nan)
    ql, kl, vl = (t.transpose(0, 1)[None].contiguous() for t in (q, k, v))
    seen = torch.arange(s.rows)[None] <= places[:, None]

    def ours() -> Results:
        kernels.attention(q, k, v, cu_q, cu_k, causal=True, q_positions=places, max_seqlen_q=s.kept, out=out)
        return (out,)

    def plain() -> Results:
        o = F.scaled_dot_product_attention(ql, kl, vl, attn_mask=seen, enable_gqa=s.heads != s.kv_heads)
        return (o[0].transpose(0, 1),)

    def truth() -> Results:
        o = naive_attention(q.float(), k.float(), v.float(), cu_q, cu_k, causal=True, q_positions=places)
        assert isinstance(o, Tensor)
        return (o,)

    step = s.rows // s.kept
    pairs = s.kept + step * s.kept * (s.kept - 1) // 2
    return Work(ours, plain, truth, 4.0 * s.dim * s.heads * pairs, "flop", plain_name="sdpa, mask")


@REGISTRY.add("decode_attention", DECODE, per_model=True, where="gpu")
def decode_full_chip(s: Sizes, dtype: torch.dtype) -> Work:
    return _decode(s, 64 if s.hidden >= 1024 else 2, _length(s, 8192), dtype)


@REGISTRY.add("select_tokens", TOGETHER, where="gpu")
def select_and_compact(s: Sizes, dtype: torch.dtype) -> Work:
    """From the scores of one picture to the cache of what stays, with nothing read by the host in between."""
    n, rows = s.image, torch.arange(s.image, dtype=torch.int32) + s.text // 4
    logits = torch.randn(n)
    groups, bounds = (torch.arange(2, dtype=torch.int32) * size for size in (n, s.rows))
    caps = torch.full((1,), s.kept_image, dtype=torch.int32)
    keep_row = torch.ones(s.rows, dtype=torch.bool)
    keep_row[s.text // 4 : s.text // 4 + n] = False
    capacity = s.kept
    options = {
        "threshold": 0.0, "caps": caps, "floors": torch.ones_like(caps), "forced": None, "token_rows": rows,
        "row_keep": keep_row, "cu_seqlens": bounds, "capacity": capacity,
    }  # fmt: skip
    k, v = (torch.randn(s.cached, s.rows, s.kv_heads, s.dim).to(dtype) for _ in range(2))
    hidden = torch.randn(s.rows, s.hidden).to(dtype)
    slots = torch.arange(5, 5 + capacity, dtype=torch.int32)
    long_slots = slots.long()

    def destinations() -> tuple[Tensor, ...]:
        pools = (torch.zeros(s.cached, capacity + 16, s.kv_heads, s.dim, dtype=dtype) for _ in range(2))
        return (*pools, torch.zeros(capacity, s.hidden, dtype=dtype))

    mine, theirs, right = destinations(), destinations(), destinations()

    def ours() -> Results:
        found = kernels.select_tokens(logits, groups, **options)  # type: ignore[arg-type]
        kernels.compact(found.index, slots, k, v, mine[0], mine[1], [(hidden, mine[2])])
        return (found.keep, found.index, *mine)

    def plain() -> Results:
        # More than the cap pass the threshold here, so exactly `capacity` rows stay and torch needs no count.
        best = logits.topk(s.kept_image).indices
        keep = torch.zeros(n, dtype=torch.bool).scatter_(0, best, True)
        stays = keep_row.clone()
        stays[s.text // 4 : s.text // 4 + n] = keep
        index = torch.topk(stays.int() * s.rows - torch.arange(s.rows), capacity, sorted=True).indices
        for layer in range(s.cached):
            theirs[0][layer].index_copy_(0, long_slots, k[layer].index_select(0, index))
            theirs[1][layer].index_copy_(0, long_slots, v[layer].index_select(0, index))
        torch.index_select(hidden, 0, index, out=theirs[2])
        return (keep, index.int(), *theirs)

    def boolean() -> Results:
        best = logits.topk(s.kept_image).indices
        keep = torch.zeros(n, dtype=torch.bool).scatter_(0, best, True)
        stays = keep_row.clone()
        stays[s.text // 4 : s.text // 4 + n] = keep
        for layer in range(s.cached):
            theirs[0][layer].index_copy_(0, long_slots, k[layer][stays])
            theirs[1][layer].index_copy_(0, long_slots, v[layer][stays])
        return (keep, stays.nonzero()[:, 0].int(), theirs[0], theirs[1], hidden[stays])

    def truth() -> Results:
        found = naive_select(logits, groups, **options)  # type: ignore[arg-type]
        naive_compact(found.index, slots, k, v, right[0], right[1], [(hidden, right[2])])
        return (found.keep, found.index, *right)

    moved = 2 * capacity * (2 * nbytes(k) // s.rows + nbytes(hidden) // s.rows)
    amount = moved + nbytes(logits, rows, keep_row, slots) + n + 4 * capacity
    return Work(
        ours, plain, truth, amount, "byte", tolerance=0.0, plain_name="topk, index_select a layer",
        others={f"{BOOLEAN}, a layer at a time": boolean},
    )  # fmt: skip

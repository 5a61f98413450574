# SPDX-License-Identifier: Apache-2.0
"""The ops as `torch.ops.glimpse.*`, for `torch.compile` and `torch.library.opcheck`. Importing this module registers them.

Runtime code calls the functions of `glimpse_kernels` directly: that is one Python call, with no dispatcher between.
A registered op calls the same function, so backends and checks are the same. What writes to its arguments says so in its
schema; where an op can do both (`rope`, `rms_norm`), each way has its own name,
as has `linear` with an 8-bit weight. `vip` has no entry: it takes a structure of
weights, and its parts are here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import glimpse_kernels as gk

__all__ = ["OPS"]

_library = torch.library.Library("glimpse", "DEF")
DEVICES = ("CPU", "CUDA")

OPS: list[str] = []
"""Names under `torch.ops.glimpse`."""


def _register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in DEVICES:
        _library.impl(name, run, device)
    torch.library.register_fake(f"glimpse::{name}", fake, lib=_library)
    OPS.append(name)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    q_positions: Tensor | None = None,
    max_seqlen_q: int | None = None,
) -> tuple[Tensor, Tensor]:
    found = gk.attention(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        causal=causal,
        scale=scale,
        q_positions=q_positions,
        max_seqlen_q=max_seqlen_q,
        return_lse=True,
    )
    assert isinstance(found, tuple)
    return found


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    tokens, heads, _dim = q.shape
    return q.new_empty(tokens, heads, v.shape[2]), q.new_empty(tokens, heads, dtype=torch.float32)


def _decode_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    return gk.decode_attention(q, k_pool, v_pool, block_table, lengths, scale=scale)


def _decode_attention_fake(q: Tensor, k_pool: Tensor, v_pool: Tensor, *_: Any, **__: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v_pool.shape[3])


def _glimpse_scores(
    q: Tensor,
    k: Tensor,
    token_index: Tensor,
    token_seq: Tensor,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    return gk.glimpse_scores(q, k, token_index, token_seq, scale=scale, lse=lse)


def _glimpse_scores_fake(q: Tensor, k: Tensor, token_index: Tensor, *_: Any, **__: Any) -> Tensor:
    return q.new_empty(token_index.shape[0], q.shape[1], dtype=torch.float32)


def _received_attention(
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
) -> Tensor:
    return gk.received_attention(
        q,
        k,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        causal=causal,
        q_positions=q_positions,
        scale=scale,
        group=group,
        order=order,
    )


def _received_attention_fake(q: Tensor, k: Tensor, *_: Any, group: int = 1, **__: Any) -> Tensor:
    return k.new_empty(k.shape[0] // group, dtype=torch.float32)


def _last_row_attention(
    q: Tensor,
    k: Tensor,
    cu_seqlens_k: Tensor,
    token_index: Tensor,
    token_seq: Tensor,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    return gk.last_row_attention(q, k, cu_seqlens_k, token_index, token_seq, scale=scale, lse=lse)


def _last_row_attention_fake(
    q: Tensor, k: Tensor, cu_seqlens_k: Tensor, token_index: Tensor, *_: Any, **__: Any
) -> Tensor:
    return q.new_empty(token_index.shape[0], dtype=torch.float32)


def _select_tokens(
    logits: Tensor,
    cu_groups: Tensor,
    *,
    threshold: float,
    caps: Tensor,
    floors: Tensor,
    forced: Tensor | None = None,
    token_rows: Tensor,
    row_keep: Tensor,
    cu_seqlens: Tensor,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = gk.select_tokens(
        logits,
        cu_groups,
        threshold=threshold,
        caps=caps,
        floors=floors,
        forced=forced,
        token_rows=token_rows,
        row_keep=row_keep,
        cu_seqlens=cu_seqlens,
        capacity=capacity,
    )
    return found.keep, found.counts, found.index, found.cu_seqlens


def _select_tokens_fake(
    logits: Tensor, cu_groups: Tensor, *, cu_seqlens: Tensor, capacity: int, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        logits.new_empty(logits.shape[0], dtype=torch.bool),
        logits.new_empty(cu_groups.shape[0] - 1, dtype=torch.int32),
        logits.new_empty(capacity, dtype=torch.int32),
        logits.new_empty(cu_seqlens.shape[0], dtype=torch.int32),
    )


def _farthest_points(
    similarity: Tensor,
    cu_seqlens: Tensor,
    cu_picks: Tensor,
    *,
    tokens: int,
    capacity: int,
    repeat: bool = True,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    return gk.farthest_points(
        similarity,
        cu_seqlens,
        cu_picks,
        tokens=tokens,
        capacity=capacity,
        repeat=repeat,
        max_seqlen=max_seqlen,
    )


def _farthest_points_fake(
    similarity: Tensor, *_: Any, tokens: int, capacity: int, **__: Any
) -> tuple[Tensor, Tensor]:
    return similarity.new_empty(capacity, dtype=torch.int32), similarity.new_empty(tokens, dtype=torch.bool)


def _greedy_dpp(
    similarity: Tensor,
    relevance: Tensor,
    cu_seqlens: Tensor,
    cu_picks: Tensor,
    *,
    capacity: int,
    eps: float = 1e-5,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    return gk.greedy_dpp(
        similarity, relevance, cu_seqlens, cu_picks, capacity=capacity, eps=eps, max_seqlen=max_seqlen
    )


def _greedy_dpp_fake(
    similarity: Tensor, relevance: Tensor, *_: Any, capacity: int, **__: Any
) -> tuple[Tensor, Tensor]:
    return (
        similarity.new_empty(capacity, dtype=torch.int32),
        similarity.new_empty(relevance.shape[0], dtype=torch.bool),
    )


def _drop_duplicates(
    similarity: Tensor,
    cu_seqlens: Tensor,
    order: Tensor,
    cu_order: Tensor,
    targets: Tensor,
    *,
    tokens: int,
    per_round: int = 8,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    return gk.drop_duplicates(
        similarity,
        cu_seqlens,
        order,
        cu_order,
        targets,
        tokens=tokens,
        per_round=per_round,
        max_seqlen=max_seqlen,
    )


def _drop_duplicates_fake(
    similarity: Tensor, cu_seqlens: Tensor, order: Tensor, *_: Any, tokens: int, **__: Any
) -> tuple[Tensor, Tensor]:
    return order.new_empty(order.shape[0]), order.new_empty(tokens, dtype=torch.bool)


def _compact(
    index: Tensor,
    slots: Tensor | None,
    k_src: Tensor | None,
    v_src: Tensor | None,
    k_dst: Tensor | None,
    v_dst: Tensor | None,
    row_src: Sequence[Tensor],
    row_dst: Sequence[Tensor],
) -> None:
    if len(row_src) != len(row_dst):
        raise ValueError(
            f"compact: row_dst: expected {len(row_src)} tensors, one per row_src, found {len(row_dst)}"
        )
    gk.compact(index, slots, k_src, v_src, k_dst, v_dst, list(zip(row_src, row_dst, strict=True)))


def _rope(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor) -> None:
    gk.rope(q, k, cos, sin)


def _rope_write(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_out: Tensor,
    *,
    v: Tensor | None = None,
    v_out: Tensor | None = None,
    slots: Tensor | None = None,
) -> None:
    gk.rope(q, k, cos, sin, v=v, k_out=k_out, v_out=v_out, slots=slots)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return gk.rms_norm(x, weight, eps)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return gk.rms_norm(x, weight, eps, residual=residual)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gk.swiglu(gate, up)


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    return gk.linear(x, weight, bias, activation=activation)


def _linear_int8(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    group: int = 128,
    activation: str | None = None,
) -> Tensor:
    return gk.linear(x, gk.Int8Weight(values, scales, group), bias, activation=activation)


def _linear_group(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    return list(gk.linear_group(x, weights, biases or None))


def _gated_linear(
    x: Tensor, gate: Tensor, up: Tensor, gate_bias: Tensor | None = None, up_bias: Tensor | None = None
) -> Tensor:
    return gk.gated_linear(x, gate, up, gate_bias, up_bias)


def _linear_fake(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _linear_group_fake(x: Tensor, weights: Sequence[Tensor], _biases: Sequence[Tensor]) -> list[Tensor]:
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]


def _patchify(
    image: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    patch_size: int = 14,
    temporal_patch_size: int = 2,
    merge_size: int = 2,
    rescale: float = 1 / 255,
    *,
    size: Sequence[int] | None = None,
    resample: str = "bicubic",
    down_first: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return gk.patchify(
        image,
        mean=mean,
        std=std,
        size=None if size is None else (size[0], size[1]),
        resample=resample,
        down_first=down_first,
        patch_size=patch_size,
        temporal_patch_size=temporal_patch_size,
        merge_size=merge_size,
        rescale=rescale,
        dtype=dtype,
    )


def _patchify_fake(
    image: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    patch_size: int = 14,
    temporal_patch_size: int = 2,
    *_: Any,
    size: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    **__: Any,
) -> Tensor:
    height, width = image.shape[:2] if size is None else size
    patches = (height // patch_size) * (width // patch_size)
    columns = image.shape[2] * temporal_patch_size * patch_size**2
    return image.new_empty(patches, columns, dtype=dtype or torch.float32)


def _like_first(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_empty(x.shape)


def _nothing(*_: Any, **__: Any) -> None:
    return None


_register(
    "attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, *, bool causal, "
    "float? scale=None, Tensor? q_positions=None, SymInt? max_seqlen_q=None) -> (Tensor, Tensor)",
    _attention,
    _attention_fake,
)
_register(
    "decode_attention(Tensor q, Tensor k_pool, Tensor v_pool, Tensor block_table, Tensor lengths, *, "
    "float? scale=None) -> Tensor",
    _decode_attention,
    _decode_attention_fake,
)
_register(
    "glimpse_scores(Tensor q, Tensor k, Tensor token_index, Tensor token_seq, *, "
    "float? scale=None, Tensor? lse=None) -> Tensor",
    _glimpse_scores,
    _glimpse_scores_fake,
)
_register(
    "received_attention(Tensor q, Tensor k, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, *, "
    "bool causal=False, Tensor? q_positions=None, float? scale=None, SymInt group=1, Tensor? order=None) -> Tensor",
    _received_attention,
    _received_attention_fake,
)
_register(
    "last_row_attention(Tensor q, Tensor k, Tensor cu_seqlens_k, Tensor token_index, Tensor token_seq, *, "
    "float? scale=None, Tensor? lse=None) -> Tensor",
    _last_row_attention,
    _last_row_attention_fake,
)
_register(
    "select_tokens(Tensor logits, Tensor cu_groups, *, float threshold, Tensor caps, Tensor floors, "
    "Tensor? forced=None, Tensor token_rows, Tensor row_keep, Tensor cu_seqlens, SymInt capacity) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _select_tokens,
    _select_tokens_fake,
)
_register(
    "farthest_points(Tensor similarity, Tensor cu_seqlens, Tensor cu_picks, *, SymInt tokens, SymInt capacity, "
    "bool repeat=True, SymInt? max_seqlen=None) -> (Tensor, Tensor)",
    _farthest_points,
    _farthest_points_fake,
)
_register(
    "greedy_dpp(Tensor similarity, Tensor relevance, Tensor cu_seqlens, Tensor cu_picks, *, SymInt capacity, "
    "float eps=1e-5, SymInt? max_seqlen=None) -> (Tensor, Tensor)",
    _greedy_dpp,
    _greedy_dpp_fake,
)
_register(
    "drop_duplicates(Tensor similarity, Tensor cu_seqlens, Tensor order, Tensor cu_order, Tensor targets, *, "
    "SymInt tokens, SymInt per_round=8, SymInt? max_seqlen=None) -> (Tensor, Tensor)",
    _drop_duplicates,
    _drop_duplicates_fake,
)
_register(
    "compact(Tensor index, Tensor? slots, Tensor? k_src, Tensor? v_src, Tensor(a!)? k_dst, Tensor(b!)? v_dst, "
    "Tensor[] row_src, Tensor(c!)[] row_dst) -> ()",
    _compact,
    _nothing,
)
_register("rope(Tensor(a!) q, Tensor(b!)? k, Tensor cos, Tensor sin) -> ()", _rope, _nothing)
_register(
    "rope_write(Tensor(a!) q, Tensor k, Tensor cos, Tensor sin, Tensor(b!) k_out, *, "
    "Tensor? v=None, Tensor(c!)? v_out=None, Tensor? slots=None) -> ()",
    _rope_write,
    _nothing,
)
_register("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _rms_norm, _like_first)
_register(
    "add_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float eps) -> Tensor",
    _add_rms_norm,
    _like_first,
)
_register("swiglu(Tensor gate, Tensor up) -> Tensor", _swiglu, _like_first)
_register(
    "linear(Tensor x, Tensor weight, Tensor? bias=None, *, str? activation=None) -> Tensor",
    _linear,
    _linear_fake,
)
_register(
    "linear_int8(Tensor x, Tensor values, Tensor scales, Tensor? bias=None, *, int group=128, str? activation=None) "
    "-> Tensor",
    _linear_int8,
    _linear_fake,
)
_register(
    "linear_group(Tensor x, Tensor[] weights, Tensor[] biases) -> Tensor[]", _linear_group, _linear_group_fake
)
_register(
    "gated_linear(Tensor x, Tensor gate, Tensor up, Tensor? gate_bias=None, Tensor? up_bias=None) -> Tensor",
    _gated_linear,
    _linear_fake,
)
_register(
    "patchify(Tensor image, float[] mean, float[] std, int patch_size=14, int temporal_patch_size=2, int merge_size=2, "
    f"float rescale={1 / 255!r}, *, SymInt[]? size=None, str resample='bicubic', bool down_first=False, "
    "ScalarType? dtype=None) -> Tensor",
    _patchify,
    _patchify_fake,
)

# SPDX-License-Identifier: Apache-2.0
"""Attention over packed sequences and over the paged pool."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import glimpse_kernels as gk
from glimpse_kernels.library.registry import register


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


register(
    "attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, *, bool causal, "
    "float? scale=None, Tensor? q_positions=None, SymInt? max_seqlen_q=None) -> (Tensor, Tensor)",
    _attention,
    _attention_fake,
)
register(
    "decode_attention(Tensor q, Tensor k_pool, Tensor v_pool, Tensor block_table, Tensor lengths, *, "
    "float? scale=None) -> Tensor",
    _decode_attention,
    _decode_attention_fake,
)

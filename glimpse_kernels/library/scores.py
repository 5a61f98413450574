# SPDX-License-Identifier: Apache-2.0
"""What tokens are judged by: queries and keys, or their likeness to each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import glimpse_kernels as gk
from glimpse_kernels.library.registry import register


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


def _graph_flow(
    features: Tensor,
    cu_seqlens: Tensor,
    *,
    threshold: float = 0.5,
    temperature: float = 0.03,
    steps: int = 5,
    rounded: bool = True,
    degree: str = "edges",
) -> tuple[Tensor, Tensor]:
    return gk.graph_flow(
        features,
        cu_seqlens,
        threshold=threshold,
        temperature=temperature,
        steps=steps,
        rounded=rounded,
        degree=degree,
    )


def _graph_flow_fake(features: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    rows = features.shape[0]
    return features.new_empty(rows, dtype=torch.float32), features.new_empty(rows, dtype=torch.int32)


register(
    "glimpse_scores(Tensor q, Tensor k, Tensor token_index, Tensor token_seq, *, "
    "float? scale=None, Tensor? lse=None) -> Tensor",
    _glimpse_scores,
    _glimpse_scores_fake,
)
register(
    "received_attention(Tensor q, Tensor k, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, *, "
    "bool causal=False, Tensor? q_positions=None, float? scale=None, SymInt group=1, Tensor? order=None) -> Tensor",
    _received_attention,
    _received_attention_fake,
)
register(
    "last_row_attention(Tensor q, Tensor k, Tensor cu_seqlens_k, Tensor token_index, Tensor token_seq, *, "
    "float? scale=None, Tensor? lse=None) -> Tensor",
    _last_row_attention,
    _last_row_attention_fake,
)
register(
    "graph_flow(Tensor features, Tensor cu_seqlens, *, float threshold=0.5, float temperature=0.03, SymInt steps=5, "
    "bool rounded=True, str degree='edges') -> (Tensor, Tensor)",
    _graph_flow,
    _graph_flow_fake,
)

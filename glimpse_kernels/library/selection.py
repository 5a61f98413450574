# SPDX-License-Identifier: Apache-2.0
"""Which tokens stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import glimpse_kernels as gk
from glimpse_kernels.library.registry import register


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


def _window_topk(
    scores: Tensor,
    cu_seqlens: Tensor,
    grids: Tensor,
    cu_picks: Tensor,
    *,
    window: int,
    capacity: int,
    share: str = "up",
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    return gk.window_topk(
        scores,
        cu_seqlens,
        grids,
        cu_picks,
        window=window,
        capacity=capacity,
        share=share,
        max_seqlen=max_seqlen,
    )


def _window_topk_fake(scores: Tensor, *_: Any, capacity: int, **__: Any) -> tuple[Tensor, Tensor]:
    return (
        scores.new_empty(capacity, dtype=torch.int32),
        scores.new_empty(scores.shape[0], dtype=torch.bool),
    )


register(
    "select_tokens(Tensor logits, Tensor cu_groups, *, float threshold, Tensor caps, Tensor floors, "
    "Tensor? forced=None, Tensor token_rows, Tensor row_keep, Tensor cu_seqlens, SymInt capacity) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _select_tokens,
    _select_tokens_fake,
)
register(
    "farthest_points(Tensor similarity, Tensor cu_seqlens, Tensor cu_picks, *, SymInt tokens, SymInt capacity, "
    "bool repeat=True, SymInt? max_seqlen=None) -> (Tensor, Tensor)",
    _farthest_points,
    _farthest_points_fake,
)
register(
    "greedy_dpp(Tensor similarity, Tensor relevance, Tensor cu_seqlens, Tensor cu_picks, *, SymInt capacity, "
    "float eps=1e-5, SymInt? max_seqlen=None) -> (Tensor, Tensor)",
    _greedy_dpp,
    _greedy_dpp_fake,
)
register(
    "drop_duplicates(Tensor similarity, Tensor cu_seqlens, Tensor order, Tensor cu_order, Tensor targets, *, "
    "SymInt tokens, SymInt per_round=8, SymInt? max_seqlen=None) -> (Tensor, Tensor)",
    _drop_duplicates,
    _drop_duplicates_fake,
)
register(
    "window_topk(Tensor scores, Tensor cu_seqlens, Tensor grids, Tensor cu_picks, *, SymInt window, SymInt capacity, "
    "str share='up', SymInt? max_seqlen=None) -> (Tensor, Tensor)",
    _window_topk,
    _window_topk_fake,
)

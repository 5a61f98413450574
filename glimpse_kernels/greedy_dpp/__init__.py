# SPDX-License-Identifier: Apache-2.0
"""Tokens that are relevant and unlike each other: the greedy mode of a determinantal point process, CDPruner's choice."""

from __future__ import annotations

import torch
from torch import Tensor

from glimpse_kernels import _tensors as check
from glimpse_kernels import dispatch

__all__ = ["greedy_dpp"]


def greedy_dpp(
    similarity: Tensor,
    relevance: Tensor,
    cu_seqlens: Tensor,
    cu_picks: Tensor,
    *,
    capacity: int,
    eps: float = 1e-5,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Greedy MAP inference in every group by an incremental Cholesky factor (Chen et al., arXiv:1709.05135, algorithm 1; as in
    CDPruner, arXiv:2506.10967, section 3).

    The kernel of a group is K[i, j] = (relevance[i] * similarity[i, j]) * relevance[j]. Each step picks the token j
    with the largest gain d[j], the first of the largest; d starts as the diagonal of K. Then, with the vectors c of
    the picks before, e = (K[j] - sum of c[j] * c) / sqrt(d[j]) is the next c, and d loses e * e. All in float32.

    A gain of at most eps * K[j, j] is rounding: the token is a combination of those picked already, and is not
    picked. Where no other is left, the group has no more picks. (The original goes on, and its square roots of
    rounding errors become NaN as soon as more tokens are asked for than the features have independent directions.)

    similarity: [sum of n_g * n_g] float32, contiguous: the groups' matrices one after the other (`cosine_similarity`
        with dtype=torch.float32).
    relevance: [N] float32, contiguous; of either sign. A NaN in it or in the diagonal of the similarity makes a token
        that is never picked; elsewhere in the similarity, a NaN does so from the pick on that meets it.
    cu_seqlens: [G+1] int32, where the rows of each group start; starts at 0, the last entry is N.
    cu_picks: [G+1] int32, where the picks of each group start: at most cu_picks[g+1] - cu_picks[g] tokens of group g
        are picked.
    capacity: length of the result; no more picks than this are ever written. A launch
        keeps one number for each pick and token of a group, and makes room for capacity * max_seqlen of them.
    eps: at least 0, below 1.
    max_seqlen: the length of the longest group where the host knows it; it bounds the memory of a launch. A group
        that is longer than it has no picks. None: what the shapes allow.

    Returns picks [capacity] int32, packed rows in the order in which they were picked, those of group g from
    cu_picks[g] on, with -1 wherever there is none, and keep [N] bool, True where a row is picked.

    Raises TypeError / ValueError for a wrong dtype / shape, UnsupportedError if no backend serves the device.
    """
    op = "greedy_dpp"
    check.expect_tensors(
        op, similarity=similarity, relevance=relevance, cu_seqlens=cu_seqlens, cu_picks=cu_picks
    )
    check.expect_shape(op, "similarity", similarity, (None,), "[sum of n * n]")
    check.expect_contiguous(op, "similarity", similarity)
    check.expect_dtype(op, "relevance", relevance, torch.float32)
    check.expect_shape(op, "relevance", relevance, (None,), "[N]")
    check.expect_contiguous(op, "relevance", relevance)
    check.expect_cu_seqlens(op, "cu_seqlens", cu_seqlens)
    check.expect_cu_seqlens(op, "cu_picks", cu_picks, cu_seqlens.shape[0] - 1)
    check.expect_count(op, "capacity", capacity)
    check.expect_count(op, "max_seqlen", max_seqlen or 0)
    if not 0 <= eps < 1:
        raise ValueError(f"{op}: eps: expected at least 0 and below 1, found {eps}")
    check.expect_same_device(
        op, similarity.device, relevance=relevance, cu_seqlens=cu_seqlens, cu_picks=cu_picks
    )
    size = (cu_seqlens.shape[0] - 1, relevance.shape[0], capacity) if similarity.is_cuda else ()
    serve = dispatch.select(op, similarity.device, similarity.dtype, size=size)
    result: tuple[Tensor, Tensor] = serve(
        similarity, relevance, cu_seqlens, cu_picks, capacity=capacity, eps=eps, max_seqlen=max_seqlen
    )
    return result

# SPDX-License-Identifier: Apache-2.0
"""Tokens that are as far from each other as can be had: DivPrune's choice."""

from __future__ import annotations

from torch import Tensor

from glimpse_kernels import _tensors as check
from glimpse_kernels import dispatch

__all__ = ["farthest_points"]


def farthest_points(
    similarity: Tensor,
    cu_seqlens: Tensor,
    cu_picks: Tensor,
    *,
    tokens: int,
    capacity: int,
    repeat: bool = True,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Greedy max-min selection in every group (DivPrune, arXiv:2503.02175, section 3.3).

    With the distance 1 - s, rounded to the dtype of the similarity: first the token whose nearest other token is
    farthest, that is the one with the largest second-smallest entry of its column; then again and again the token
    whose nearest picked one is farthest. Ties go to the lower index. A running minimum makes that O(picks * n) where
    the original takes O(picks^2 * n), with the same result.

    similarity: [sum of n_g * n_g] float32, bfloat16 or float16, contiguous: the groups' matrices one after the other
        (`cosine_similarity`). A NaN counts as the smallest distance there is, so that a token full of them is picked
        last.
    cu_seqlens: [G+1] int32, where the rows of each group start; starts at 0, the last entry is `tokens`.
    cu_picks: [G+1] int32, where the picks of each group start: cu_picks[g+1] - cu_picks[g] tokens of group g are
        picked.
    tokens: N, rows of all groups. capacity: length of the result; no more picks than this are ever written.
    repeat: what the original does: tokens that are picked already stay in the race, at a distance of about 0. Where a
        group has fewer distinct tokens than picks, one is picked several times. False leaves them out: all picks of a
        group differ.
    max_seqlen: the length of the longest group where the host knows it; it bounds the memory of a launch. A group
        that is longer than it has no picks. None: what the shapes allow.

    Returns picks [capacity] int32, packed rows in the order in which they were picked, those of group g from
    cu_picks[g] on, and keep [N] bool, True where a row is picked. -1 stands where there is nothing to pick: in an
    empty group, with repeat=False behind the n_g-th pick of a group, and behind cu_picks[G]. The only token of a
    group is its first pick.

    Raises TypeError / ValueError for a wrong dtype / shape, UnsupportedError if no backend serves the dtype or
    device.
    """
    op = "farthest_points"
    check.expect_tensors(op, similarity=similarity, cu_seqlens=cu_seqlens, cu_picks=cu_picks)
    check.expect_shape(op, "similarity", similarity, (None,), "[sum of n * n]")
    check.expect_contiguous(op, "similarity", similarity)
    check.expect_cu_seqlens(op, "cu_seqlens", cu_seqlens)
    check.expect_cu_seqlens(op, "cu_picks", cu_picks, cu_seqlens.shape[0] - 1)
    check.expect_count(op, "tokens", tokens)
    check.expect_count(op, "capacity", capacity)
    check.expect_count(op, "max_seqlen", max_seqlen or 0)
    check.expect_same_device(op, similarity.device, cu_seqlens=cu_seqlens, cu_picks=cu_picks)
    size = (cu_seqlens.shape[0] - 1, tokens, capacity) if similarity.is_cuda else ()
    serve = dispatch.select(op, similarity.device, similarity.dtype, size=size)
    result: tuple[Tensor, Tensor] = serve(
        similarity,
        cu_seqlens,
        cu_picks,
        tokens=tokens,
        capacity=capacity,
        repeat=repeat,
        max_seqlen=max_seqlen,
    )
    return result

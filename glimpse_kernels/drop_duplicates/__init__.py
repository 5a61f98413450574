# SPDX-License-Identifier: Apache-2.0
"""Thinning a list of tokens, in rounds, of those that have a close double: VisPruner's second half."""

from __future__ import annotations

import torch
from torch import Tensor

from glimpse_kernels import _tensors as check
from glimpse_kernels import dispatch

__all__ = ["drop_duplicates"]


def drop_duplicates(
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
    """Rounds of bipartite matching that delete the most redundant tokens (VisPruner, arXiv:2412.01818, section 3.3; the matching
    of ToMe, arXiv:2210.09461, without the merging).

    A round splits a group's list by position: A = places 0, 2, 4, .., B = places 1, 3, 5, .. . The redundancy of a
    token of A is its highest similarity with a token of B. The min(per_round, m - target, |A|) most redundant of A
    are deleted, where m is the length of the list, and the new list is the rest of A by falling redundancy, ties by
    their place in A, followed by B as it was. Rounds go on until the list has `target` tokens. (The original fails
    where m is odd or the second bound exceeds the third; everywhere else the result is the same.)

    similarity: [sum of n_g * n_g] float32, bfloat16 or float16, contiguous: the groups' matrices one after the other
        (`cosine_similarity`). A NaN is below everything: a token of A that has nothing else, as the last one where B
        is empty, comes last.
    cu_seqlens: [G+1] int32, where the rows of each group start; starts at 0, the last entry is `tokens`.
    order: [M] int32, packed rows, the list of each group in its order (VisPruner: by falling importance). A row
        outside its group is similar to nothing: all its similarities count as NaN.
    cu_order: [G+1] int32, where each group's list starts. A list is at most as long as its group: what is behind that
        is not looked at.
    targets: [G] int32, the lengths at which to stop.
    tokens: N, rows of all groups. per_round: at least 1.
    max_seqlen: the length of the longest group where the host knows it; it bounds the memory of a launch. A group
        that is longer than it has no survivors. None: what the shapes allow.

    Returns survivors [M] int32, what is left of each group's list in its final order, from cu_order[g] on, with -1
    behind it, and keep [N] bool, True where a row is left.

    Raises TypeError / ValueError for a wrong dtype / shape, UnsupportedError if no backend serves the dtype or
    device.
    """
    op = "drop_duplicates"
    check.expect_tensors(
        op, similarity=similarity, cu_seqlens=cu_seqlens, order=order, cu_order=cu_order, targets=targets
    )
    check.expect_shape(op, "similarity", similarity, (None,), "[sum of n * n]")
    check.expect_cu_seqlens(op, "cu_seqlens", cu_seqlens)
    groups = cu_seqlens.shape[0] - 1
    check.expect_cu_seqlens(op, "cu_order", cu_order, groups)
    check.expect_dtype(op, "order", order, torch.int32)
    check.expect_shape(op, "order", order, (None,), "[M]")
    check.expect_dtype(op, "targets", targets, torch.int32)
    check.expect_shape(op, "targets", targets, (groups,), "[G]")
    for name, t in (("similarity", similarity), ("order", order), ("targets", targets)):
        check.expect_contiguous(op, name, t)
    check.expect_count(op, "tokens", tokens)
    check.expect_count(op, "per_round", per_round, least=1)
    check.expect_count(op, "max_seqlen", max_seqlen or 0)
    check.expect_same_device(
        op, similarity.device, cu_seqlens=cu_seqlens, order=order, cu_order=cu_order, targets=targets
    )
    size = (groups, tokens, order.shape[0]) if similarity.is_cuda else ()
    serve = dispatch.select(op, similarity.device, similarity.dtype, size=size)
    result: tuple[Tensor, Tensor] = serve(
        similarity,
        cu_seqlens,
        order,
        cu_order,
        targets,
        tokens=tokens,
        per_round=per_round,
        max_seqlen=max_seqlen,
    )
    return result

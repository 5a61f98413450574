# SPDX-License-Identifier: Apache-2.0
"""How much flows to each token along the similarities of an image: G-Prune's score."""

from __future__ import annotations

from torch import Tensor

from glimpse_kernels import _tensors as check
from glimpse_kernels import dispatch

__all__ = ["DEGREES", "graph_flow"]

DEGREES = ("edges", "float16")
"""What counts as an edge when a score is divided by the number of them."""


def graph_flow(
    features: Tensor,
    cu_seqlens: Tensor,
    *,
    threshold: float = 0.5,
    temperature: float = 0.03,
    steps: int = 5,
    rounded: bool = True,
    degree: str = "edges",
) -> tuple[Tensor, Tensor]:
    """Flow over the graph of similar tokens, in every group by itself (G-Prune, arXiv:2501.02268, information propagation).

    There is an edge from i to j, and one from a token to itself, where the cosine s_ij of two rows of a group is at least
    `threshold`. A token passes on what it has in shares: p_ij = exp(s_ij / temperature) over the sum of these over the edges
    of i, 0 without an edge. At the start each has the norm of its row; after `steps` steps v_j <- sum_i v_i p_ij the score of
    a token is what it has then, divided by its degree, the number of its edges.

    These are vector-matrix products, where the original raises the matrix to the power and multiplies once: the same up to
    rounding, and n^2 * steps in place of 3 n^3. The matrix need not exist as a whole: shares are made tile by tile, anew in each
    step but for what fits a fixed size (C++: 64 MiB, all shares of 4096 tokens; Triton: nothing).

    features: [N, D] float32, bfloat16 or float16, the groups one after the other; the last dimension contiguous. G-Prune: the rows
        that the decoder is given, without those of newlines.
    cu_seqlens: [G+1] int32, where the rows of each group start; starts at 0. Rows behind the last entry score 0 and are not read.
    threshold: above 0 and below 1. temperature: above 0. steps: at least 0.
    rounded: what the original does, which stays in the dtype of the model: norm, unit row, s, s / temperature and p are each rounded
        to the features' dtype (in bfloat16 that moves a share by up to a fifth). False, the sound choice: features are widened, all
        is fp32. No difference for float32. Sums and v are fp32 in any case.
    degree: "edges", what the original comes to in float32 and bfloat16; or "float16", what it comes to in that dtype, where a share of
        2^-25 or less becomes zero: an edge that has one is not counted, whatever the features' dtype. The sound choice is "edges".

    Returns scores [N] float32 and degrees [N] int32.

    A row of zeros has no edge (its degree is 0), passes nothing on, receives nothing and scores 0, as in the original (norms are
    divided by at least 1e-12, so that a row next to zero is one, too). A row whose norm is not finite has no edge either: its score
    is NaN, and no other row sees it. The only token of a group scores its norm.

    Raises TypeError / ValueError for a wrong dtype / shape / value, UnsupportedError if no backend serves the dtype or
    device.
    """
    op = "graph_flow"
    check.expect_tensors(op, features=features, cu_seqlens=cu_seqlens)
    check.expect_shape(op, "features", features, (None, None), "[N, D]")
    check.expect_last_contiguous(op, features=features)
    check.expect_cu_seqlens(op, "cu_seqlens", cu_seqlens)
    if not 0 < threshold < 1:
        raise ValueError(f"{op}: threshold: expected a number above 0 and below 1, found {threshold}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"{op}: temperature: expected a finite number above 0, found {temperature}")
    check.expect_count(op, "steps", steps)
    if degree not in DEGREES:
        raise ValueError(f"{op}: degree: expected one of {', '.join(DEGREES)}; found {degree!r}")
    check.expect_same_device(op, features.device, cu_seqlens=cu_seqlens)
    serve = dispatch.select(op, features.device, features.dtype)
    result: tuple[Tensor, Tensor] = serve(
        features,
        cu_seqlens,
        threshold=threshold,
        temperature=temperature,
        steps=steps,
        rounded=rounded,
        degree=degree,
    )
    return result

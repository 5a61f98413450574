# SPDX-License-Identifier: Apache-2.0
"""The matrices that `farthest_points`, `greedy_dpp` and `drop_duplicates` choose from: cosines inside each group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glimpse_kernels import _tensors as check


@torch.no_grad()
def cosine_similarity(
    features: Tensor, lengths: Sequence[int], *, dtype: torch.dtype | None = None
) -> Tensor:
    """Cosine of every two rows of a group; one matrix product a group.

    features: [N, D] floating point, the groups one after the other. lengths: the number of rows of each group (known
        to the host: the shapes of the products are made of it).
    dtype: of the products and of the result, that of the features if None. Norm and quotient are rounded to the
        features' dtype in any case, as the originals have it: DivPrune stays in the model's dtype throughout,
        VisPruner in that of its features, CDPruner normalises in the model's dtype and multiplies in float32.

    Returns [sum of n_g * n_g], the groups' matrices one after the other, each in row-major order. A row of zeros,
    whose cosine does not exist,
    has similarity 0 with all others and 1 with itself: it is unlike everything, and a second pick of it would bring
        nothing new.

    Raises TypeError / ValueError for a wrong dtype / shape.
    """
    op = "cosine_similarity"
    check.expect_tensors(op, features=features)
    check.expect_dtype(op, "features", features, torch.float32, torch.bfloat16, torch.float16, torch.float64)
    check.expect_shape(op, "features", features, (None, None), "[N, D]")
    if any(n < 0 for n in lengths) or sum(lengths) != features.shape[0]:
        raise ValueError(
            f"{op}: lengths: expected numbers of rows that add up to {features.shape[0]}, found {list(lengths)}"
        )
    norms = features.norm(dim=1, keepdim=True)
    zero = norms == 0
    unit = (features / norms.masked_fill(zero, 1.0)).to(dtype or features.dtype)
    packed = torch.empty(sum(n * n for n in lengths), dtype=unit.dtype, device=unit.device)
    row, offset = 0, 0
    for n in lengths:
        matrix = packed[offset : offset + n * n].view(n, n)
        torch.mm(unit[row : row + n], unit[row : row + n].T, out=matrix)
        matrix.diagonal().masked_fill_(zero[row : row + n, 0], 1.0)
        row, offset = row + n, offset + n * n
    return packed

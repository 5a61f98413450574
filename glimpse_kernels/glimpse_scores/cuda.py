# SPDX-License-Identifier: Apache-2.0
"""`glimpse_scores` in CUDA C++ (csrc/cuda/glimpse_scores.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from glimpse_kernels import _cuda
from glimpse_kernels.glimpse_scores.arguments import arguments


def glimpse_scores(
    q: Tensor,
    k: Tensor,
    token_index: Tensor,
    token_seq: Tensor,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `glimpse_kernels.glimpse_scores`; arguments are checked there. The scores of a row that does not exist (the
    device cannot raise) are NaN."""
    if out is None:
        out = torch.empty(token_index.shape[0], q.shape[1], dtype=torch.float32, device=q.device)
    given = arguments(q, k, token_index, token_seq, scale, lse, out)
    _cuda.module().glimpse_scores(_cuda.stream(q), 0, 0, *given)
    return out

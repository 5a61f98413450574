# SPDX-License-Identifier: Apache-2.0
"""`glimpse_scores` in C++ (csrc/cpu/glimpse_scores.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from glimpse_kernels._ext import extension
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
    """See `glimpse_kernels.glimpse_scores`; arguments are checked there."""
    if out is None:
        out = torch.empty(token_index.shape[0], q.shape[1], dtype=torch.float32)
    extension().glimpse_scores(*arguments(q, k, token_index, token_seq, scale, lse, out))
    return out

# SPDX-License-Identifier: Apache-2.0
"""Definition of `graph_flow` in plain PyTorch. It stores the matrix of a group, of which other backends keep a fixed size at most."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_HALF = 2.0**-25
"""This and less is zero in float16: half of its smallest number, which rounds to even."""
LEAST_NORM = 1e-12
"""What the original divides by at least."""


def graph_flow(
    features: Tensor,
    cu_seqlens: Tensor,
    *,
    threshold: float,
    temperature: float,
    steps: int,
    rounded: bool,
    degree: str,
) -> tuple[Tensor, Tensor]:
    """See `glimpse_kernels.graph_flow`. Reads the lengths on the host, and nothing else."""
    dtype = features.dtype if rounded else torch.float32

    def to_dtype(x: Tensor) -> Tensor:
        return x.to(dtype).float()

    scores = torch.zeros(features.shape[0], device=features.device)
    degrees = torch.zeros(features.shape[0], dtype=torch.int32, device=features.device)
    rows = cu_seqlens.tolist()
    for row, end in zip(rows[:-1], rows[1:], strict=True):
        x = features[row:end].float()
        norms = to_dtype(x.norm(dim=1))
        fine = norms.isfinite()
        unit = to_dtype(torch.where(fine[:, None], x / norms.clamp(min=LEAST_NORM)[:, None], 0.0))
        similar = to_dtype(unit @ unit.T)
        edge = similar >= threshold
        # Of no edges at all a softmax makes NaN; such a row passes nothing on.
        logits = to_dtype(similar / temperature).masked_fill(~edge, float("-inf"))
        share = logits.softmax(dim=1).masked_fill(~edge, 0.0)
        counted = edge & (share > LEAST_HALF) if degree == "float16" else edge
        counts = counted.sum(dim=1)
        share = to_dtype(share)
        flow = norms.masked_fill(~fine, 0.0)
        for _ in range(steps):
            flow = flow @ share
        scores[row:end] = (flow / counts.clamp(min=1)).masked_fill(~fine, float("nan"))
        degrees[row:end] = counts
    return scores, degrees

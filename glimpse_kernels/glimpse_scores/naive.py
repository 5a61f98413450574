# SPDX-License-Identifier: Apache-2.0
"""Definition of `glimpse_scores` in plain PyTorch, in fp32."""

from __future__ import annotations

from torch import Tensor


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
    """scale * q·k of each listed token and head; see `glimpse_kernels.glimpse_scores`. Differentiable."""
    group = q.shape[1] // k.shape[1]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    seq = token_seq.long()
    keys = k[token_index.long()].float().repeat_interleave(group, dim=1)  # [N, Hq, D]
    scores = scale * (q.float()[seq] * keys).sum(-1)
    if lse is not None:
        scores = scores - lse[seq]
    return scores if out is None else out.copy_(scores)

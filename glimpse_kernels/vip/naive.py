# SPDX-License-Identifier: Apache-2.0
"""Definition of `vip` and `vip_conditions` in plain PyTorch: fp32 throughout, differentiable."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from glimpse_kernels.rope.naive import rotate
from glimpse_kernels.vip.weights import Linear, VipLayer, VipWeights

DUMMY_EPS = 1e-6
"""Keeps the stretch of `dummy` finite where all scores of a segment are equal."""


def vip_conditions(taps: Sequence[Tensor], weights: VipWeights) -> list[Tensor]:
    """See `glimpse_kernels.vip_conditions`."""
    return [
        _linear(tap.float(), proj).to(tap.dtype) for tap, proj in zip(taps, weights.cond_projs, strict=True)
    ]


def vip(
    scores: Tensor,
    conditions: Sequence[Tensor] | None,
    weights: VipWeights,
    cu_seqlens: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """See `glimpse_kernels.vip`."""
    if weights.kind == "dummy":
        return dummy(scores, cu_seqlens)
    assert (
        weights.in_proj is not None and weights.out_proj is not None and cos is not None and sin is not None
    )
    bounds = cu_seqlens.tolist()
    x = _linear(scores.float(), weights.in_proj)
    for i, layer in enumerate(weights.layers):
        h = _norm(x, layer.norm1, weights.eps)
        hc = h if conditions is None else torch.cat((h, conditions[i].float()), dim=-1)
        x = x + _attend(h, hc, layer, weights.num_heads, bounds, cos, sin)
        h = _norm(x, layer.norm2, weights.eps)
        x = x + _linear(F.silu(_linear(h, layer.gate)) * _linear(h, layer.up), layer.down)
    return _linear(x, weights.out_proj).squeeze(-1)


def dummy(scores: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The predictor without weights: softmax of the mean score, stretched to 0 .. 1, segment by segment."""
    mean = scores.float().mean(-1)
    parts = []
    for begin, end in pairwise(cu_seqlens.tolist()):
        p = mean[begin:end].softmax(0)
        if end > begin:
            p = (p - p.min()) / (p.max() - p.min() + DUMMY_EPS)
        parts.append(p)
    return torch.cat(parts) if parts else mean


def _attend(
    h: Tensor, hc: Tensor, layer: VipLayer, heads: int, bounds: list[int], cos: Tensor, sin: Tensor
) -> Tensor:
    """Attention of one layer, full inside each segment. Queries and keys see the condition, values do not."""
    q = rotate(_linear(hc, layer.q).unflatten(-1, (heads, -1)), cos, sin)
    k = rotate(_linear(hc, layer.k).unflatten(-1, (heads, -1)), cos, sin)
    v = _linear(h, layer.v).unflatten(-1, (heads, -1))
    parts = []
    for begin, end in pairwise(bounds):
        s = slice(begin, end)
        weights = (torch.einsum("qhd,khd->hqk", q[s], k[s]) * q.shape[-1] ** -0.5).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, v[s]).flatten(1))
    out = torch.cat(parts) if parts else v.flatten(1)
    return _linear(out, layer.o)


def _linear(x: Tensor, proj: Linear) -> Tensor:
    return F.linear(x, proj.weight.float(), None if proj.bias is None else proj.bias.float())


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()

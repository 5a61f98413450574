# SPDX-License-Identifier: Apache-2.0
"""`vip` and `vip_conditions` on the CPU, made of this package's other ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from glimpse_kernels.attention import attention
from glimpse_kernels.linear import gated_linear, linear
from glimpse_kernels.rms_norm import rms_norm
from glimpse_kernels.rope import rope
from glimpse_kernels.vip.naive import dummy
from glimpse_kernels.vip.weights import Linear, VipWeights


def vip_conditions(taps: Sequence[Tensor], weights: VipWeights) -> list[Tensor]:
    """See `glimpse_kernels.vip_conditions`; arguments are checked there."""
    with torch.no_grad():
        return [_linear(tap, proj) for tap, proj in zip(taps, weights.cond_projs, strict=True)]


@torch.no_grad()
def vip(
    scores: Tensor,
    conditions: Sequence[Tensor] | None,
    weights: VipWeights,
    cu_seqlens: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """See `glimpse_kernels.vip`; arguments are checked there. The last product is fp32 whatever the dtype: rounding its
    result would make equals out of scores that are not."""
    if weights.kind == "dummy":
        return dummy(scores, cu_seqlens)
    assert (
        weights.in_proj is not None and weights.out_proj is not None and cos is not None and sin is not None
    )
    heads = weights.num_heads
    x = _linear(scores.to(weights.dtype), weights.in_proj)
    h = torch.empty_like(x)
    delta: Tensor | None = None
    for i, layer in enumerate(weights.layers):
        if delta is None:
            rms_norm(x, layer.norm1, weights.eps, out=h)
        else:
            rms_norm(delta, layer.norm1, weights.eps, residual=x, out=h)
        hc = h if conditions is None else torch.cat((h, conditions[i]), dim=-1)
        q, k = (_linear(hc, proj).unflatten(-1, (heads, -1)) for proj in (layer.q, layer.k))
        v = _linear(h, layer.v).unflatten(-1, (heads, -1))
        rope(q, k, cos, sin)
        attended = attention(q, k, v, cu_seqlens, cu_seqlens, causal=False)
        assert isinstance(attended, Tensor)
        delta = _linear(attended.flatten(1), layer.o)
        rms_norm(delta, layer.norm2, weights.eps, residual=x, out=h)
        gated = gated_linear(h, layer.gate.weight, layer.up.weight, layer.gate.bias, layer.up.bias)
        delta = _linear(gated, layer.down)
    if delta is not None:
        x = x.float() + delta.float()
    bias = weights.out_proj.bias
    return F.linear(
        x.float(), weights.out_proj.weight.float(), None if bias is None else bias.float()
    ).squeeze(-1)


def _linear(x: Tensor, proj: Linear) -> Tensor:
    return linear(x, proj.weight, proj.bias)

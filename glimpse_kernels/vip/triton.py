# SPDX-License-Identifier: Apache-2.0
"""`vip` and `vip_conditions` on a GPU: three launches a layer, the in-projection in the first of them and the head in the last.

What depends on the pictures alone is computed ahead by `vip_conditions`, large products that are torch's: the conditions, and
what they add to queries and keys. The second is two thirds of a projection's work and needs no scores, so it should not wait
for them: the predictor stands between two layers of the model, and nothing else can run while it does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from glimpse_kernels._triton import Configs, Launch, chip, power_of_2
from glimpse_kernels.attention.triton import attention
from glimpse_kernels.vip.naive import DUMMY_EPS
from glimpse_kernels.vip.triton_layer import (
    MLP,
    PROJECT,
    WIDE,
    vip_mlp_kernel,
    vip_project_kernel,
)
from glimpse_kernels.vip.weights import VipWeights

DUMMY: Configs[Launch] = Configs("vip_dummy", {(80, "mean"): Launch(4), (80, "stretch"): Launch(8)})
MEAN_ROWS, MEAN_COLUMNS, STRETCH_ROWS = 64, 32, 2048


class Ahead(list[Tensor]):
    """Conditions, and their shares in the queries and keys of their layers: two [N, H * Dq] a layer, of the tensors and weights
    that they were computed from. Written to afterwards, a condition and its shares would no longer agree."""

    def __init__(self, conditions: Sequence[Tensor], weights: VipWeights) -> None:
        super().__init__(conditions)
        self._conditions = tuple(conditions)
        self._weights = weights
        self._shares = []
        for c, layer in zip(conditions, weights.layers, strict=True):
            width = layer.q.weight.shape[1] - c.shape[1]
            self._shares.append(
                (F.linear(c, layer.q.weight[:, width:]), F.linear(c, layer.k.weight[:, width:]))
            )

    def shares(self, number: int, weights: VipWeights) -> tuple[Tensor, Tensor] | None:
        """Those of a layer; None if its condition or the weights are not the ones that they were made of."""
        if weights is self._weights and self[number] is self._conditions[number]:
            return self._shares[number]
        return None


@torch.no_grad()
def vip_conditions(taps: Sequence[Tensor], weights: VipWeights) -> list[Tensor]:
    """See `glimpse_kernels.vip_conditions`; arguments are checked there."""
    return Ahead(
        [F.linear(tap, proj.weight, proj.bias) for tap, proj in zip(taps, weights.cond_projs, strict=True)],
        weights,
    )


@torch.no_grad()
def vip(
    scores: Tensor,
    conditions: Sequence[Tensor] | None,
    weights: VipWeights,
    cu_seqlens: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """See `glimpse_kernels.vip`; arguments are checked there. Between the products everything is fp32."""
    count, seen = scores.shape
    device, dtype = scores.device, weights.dtype
    logits = torch.empty(count, dtype=torch.float32, device=device)
    if count == 0:
        return logits
    if weights.kind == "dummy":
        _dummy(scores, cu_seqlens, logits)
        return logits
    assert weights.in_proj is not None and weights.out_proj is not None
    assert cos is not None and sin is not None
    if not weights.layers:
        # Nothing between the first projection and the last: no layer's kernel to hold them.
        x = F.linear(scores.float(), weights.in_proj.weight.float(), _wide(weights.in_proj.bias))
        return F.linear(x, weights.out_proj.weight.float(), _wide(weights.out_proj.bias)).squeeze(-1)
    cos, sin, in_w = _lined(cos), _lined(sin), _lined(weights.in_proj.weight)
    heads, width = weights.num_heads, in_w.shape[0]
    block_f = max(16, power_of_2(width))
    capability = chip(device).capability
    wide = PROJECT.pick(capability, dtype.itemsize)
    deep = MLP.pick(capability, (dtype.itemsize, width > WIDE))
    row_tiles = triton.cdiv(count, wide.rows)
    x = torch.empty(count, width, dtype=torch.float32, device=device)
    h: Tensor | None = None
    for number, layer in enumerate(weights.layers):
        qk, value = layer.q.weight.shape[0], layer.v.weight.shape[0]
        q, k = (torch.empty(count, qk, dtype=dtype, device=device) for _ in range(2))
        v = torch.empty(count, value, dtype=dtype, device=device)
        wq, wk, wv = (_lined(proj.weight) for proj in (layer.q, layer.k, layer.v))
        c = q_share = k_share = None
        shares = conditions.shares(number, weights) if isinstance(conditions, Ahead) else None
        if shares is not None:
            q_share, k_share = shares
        elif conditions is not None:
            c = _lined(conditions[number])
        first = h is None
        tiles = 2 * triton.cdiv(qk // 2, wide.pairs) + triton.cdiv((value + 1) // 2, wide.pairs)
        vip_project_kernel[(row_tiles * tiles,)](
            h, width, c, 0 if c is None else c.stride(0),
            wq, wq.stride(0), layer.q.bias, wk, wk.stride(0), layer.k.bias, wv, wv.stride(0), layer.v.bias,
            q_share, k_share, qk,
            cos, cos.stride(0), sin, sin.stride(0), q, k, v, qk, qk, value,
            scores if first else None, scores.stride(0), scores.stride(1),
            in_w if first else None, in_w.stride(0), weights.in_proj.bias if first else None,
            layer.norm1 if first else None, x if first else None, width,
            count, weights.eps,
            S=seen, F=width, C=0 if c is None else c.shape[1], HALF=qk // heads // 2, QK=qk, V=value,
            ROWS=wide.rows, PAIRS=wide.pairs, DEPTH=wide.depth,
            BLOCK_S=min(64, max(16, power_of_2(seen))),
            num_warps=wide.warps, num_stages=wide.stages,
        )  # fmt: skip
        attended = attention(
            q.view(count, heads, -1), k.view(count, heads, -1), v.view(count, heads, -1),
            cu_seqlens, cu_seqlens, causal=False,
        )  # fmt: skip
        assert isinstance(attended, Tensor)
        wo, gate, up, down = (_lined(proj.weight) for proj in (layer.o, layer.gate, layer.up, layer.down))
        last = number == len(weights.layers) - 1
        if first and not last:
            h = torch.empty(count, width, dtype=dtype, device=device)
        vip_mlp_kernel[(triton.cdiv(count, deep.rows),)](
            x, width, attended, attended.stride(0),
            wo, wo.stride(0), layer.o.bias, layer.norm2,
            gate, gate.stride(0), layer.gate.bias, up, up.stride(0), layer.up.bias,
            down, down.stride(0), layer.down.bias,
            None if last else weights.layers[number + 1].norm1, None if last else h, width,
            weights.out_proj.weight if last else None, weights.out_proj.bias if last else None,
            logits if last else None,
            count, weights.eps,
            F=width, V=value, WIDTH=gate.shape[0],
            ROWS=deep.rows, BLOCK_F=block_f, DEPTH=deep.depth, INNER=deep.inner,
            num_warps=deep.warps, num_stages=deep.stages,
        )  # fmt: skip
    return logits


def _lined(t: Tensor) -> Tensor:
    """`t` if its last dimension is contiguous, as it always is in a checkpoint; else a copy."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _wide(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


@triton.jit(do_not_specialize=["count"])
def vip_mean_kernel(
    scores_ptr, scores_row, scores_col, mean_ptr, count,
    S: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Mean score of each row. Program: a tile of rows."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.float32)
    for s0 in range(0, S, COLUMNS):
        s = s0 + tl.arange(0, COLUMNS)
        seen = tl.load(
            scores_ptr + n[:, None] * scores_row + s[None, :] * scores_col,
            mask=(n < count)[:, None] & (s < S)[None, :],
            other=0.0,
        )
        total += tl.sum(seen.to(tl.float32), axis=1)
    tl.store(mean_ptr + n, total / S, mask=n < count)


@triton.jit
def vip_stretch_kernel(mean_ptr, cu_ptr, out_ptr, eps, ROWS: tl.constexpr):
    """Softmax of a segment's means, stretched to 0 .. 1. Program: a segment."""
    begin = tl.load(cu_ptr + tl.program_id(0)).to(tl.int64)
    length = tl.load(cu_ptr + tl.program_id(0) + 1) - begin
    at = tl.arange(0, ROWS)
    total = 0.0
    highest = float("-inf")
    lowest = float("inf")
    for start in range(0, length, ROWS):
        there = start + at < length
        mean = tl.load(mean_ptr + begin + start + at, mask=there, other=0.0)
        higher = tl.maximum(highest, tl.max(tl.where(there, mean, float("-inf")), axis=0))
        lowest = tl.minimum(lowest, tl.min(tl.where(there, mean, float("inf")), axis=0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.where(there, tl.exp(mean - higher), 0.0), axis=0)
        highest = higher
    least = tl.exp(lowest - highest) / total
    for start in range(0, length, ROWS):
        there = start + at < length
        mean = tl.load(mean_ptr + begin + start + at, mask=there, other=0.0)
        share = tl.exp(mean - highest) / total
        tl.store(out_ptr + begin + start + at, (share - least) / (1.0 / total - least + eps), mask=there)


def _dummy(scores: Tensor, cu_seqlens: Tensor, out: Tensor) -> None:
    """The predictor without weights, into `out`."""
    count, seen = scores.shape
    segments = cu_seqlens.shape[0] - 1
    if segments == 0:
        return
    capability = chip(scores.device).capability
    mean = torch.empty_like(out)
    one, two = DUMMY.pick(capability, "mean"), DUMMY.pick(capability, "stretch")
    vip_mean_kernel[(triton.cdiv(count, MEAN_ROWS),)](
        scores, scores.stride(0), scores.stride(1), mean, count,
        S=seen, ROWS=MEAN_ROWS, COLUMNS=MEAN_COLUMNS, num_warps=one.warps, num_stages=one.stages,
    )  # fmt: skip
    vip_stretch_kernel[(segments,)](
        mean, cu_seqlens, out, DUMMY_EPS, ROWS=STRETCH_ROWS, num_warps=two.warps, num_stages=two.stages
    )

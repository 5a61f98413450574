# SPDX-License-Identifier: Apache-2.0
"""The visual importance predictor: from what the glimpse token sees to one logit per visual token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glimpse_kernels import _tensors as check
from glimpse_kernels import dispatch
from glimpse_kernels.rope.naive import vision_rotary
from glimpse_kernels.vip.weights import Linear, VipLayer, VipWeights

__all__ = ["Linear", "VipLayer", "VipWeights", "vip", "vip_conditions", "vip_rotary"]


def vip_conditions(taps: Sequence[Tensor], weights: VipWeights) -> list[Tensor]:
    """Project the visual taps to the conditions of the predictor's layers (GlimpsePrune, arXiv 2508.01548, section 3.2).

    They depend on the picture only, so they may be computed long before the scores exist.

    taps: one [N, Cv] per layer, in the order of the checkpoint's `selected_visual_layers`; dtype of the weights.
    weights: of kind "v1"; the other kinds have no conditions and give an empty list.

    Returns one [N, C] per layer, dtype of the taps.

    Raises TypeError / ValueError for a wrong dtype / shape, UnsupportedError if no backend serves the dtype or device.
    """
    op = "vip_conditions"
    if weights.kind != "v1":
        return []
    if len(taps) != len(weights.cond_projs):
        raise ValueError(f"{op}: taps: expected {len(weights.cond_projs)} tensors, found {len(taps)}")
    for i, (tap, proj) in enumerate(zip(taps, weights.cond_projs, strict=True)):
        check.expect_shape(op, f"taps[{i}]", tap, (taps[0].shape[0], proj.weight.shape[1]), "[N, Cv]")
        check.expect_dtype(op, f"taps[{i}]", tap, weights.dtype)
        check.expect_same_device(op, weights.cond_projs[0].weight.device, **{f"taps[{i}]": tap})
    grad = check.needs_grad(*taps, *(p.weight for p in weights.cond_projs))
    return dispatch.select(op, taps[0].device, weights.dtype, grad=grad)(taps, weights)


def vip(
    scores: Tensor,
    conditions: Sequence[Tensor] | None,
    weights: VipWeights,
    cu_seqlens: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """One logit per visual token (GlimpsePrune, arXiv 2508.01548, section 3.2).

    x = in_proj(scores); then for every layer x += o(attn(q, k, v)) with h = norm1(x), q and k from [h, condition] and
    rotated, v from h, scale 1/sqrt(Dq), full inside a segment; x += down(silu(gate(h)) * up(h)) with h = norm2(x); at last
    out_proj(x). Kind "v2" has no condition. Kind "dummy" is (p - min p) / (max p - min p + 1e-6) with p the softmax over the
    segment of the mean score; its segments are pictures, never windows.

    scores: [N, F] float32 or the dtype of the weights, F = layers x heads, layer-major.
    conditions: from `vip_conditions`, one [N, C] per layer; None or empty unless the kind is "v1".
    cu_seqlens: [G+1] int32, the segments that attend inside themselves: pictures, or windows. Tokens, conditions and
        rotary tables come in segment order.
    cos, sin: [N, Dq/2] float32, from `vip_rotary(rows, cols, weights.qk_dim, weights.theta)`; None for kind "dummy".

    Returns logits [N] float32. The naive backend computes all in fp32 and is differentiable; others multiply in the dtype
    of the weights. Rotary tables are always fp32 (the original rounds its frequencies to the model's dtype).

    Raises TypeError / ValueError for a wrong dtype / shape, UnsupportedError if no backend serves the dtype or device.
    """
    op = "vip"
    check.expect_shape(op, "scores", scores, (None, None), "[N, F]")
    check.expect_dtype(op, "scores", scores, torch.float32, weights.dtype)
    check.expect_cu_seqlens(op, "cu_seqlens", cu_seqlens)
    check.expect_same_device(op, scores.device, cu_seqlens=cu_seqlens)
    n = scores.shape[0]
    if weights.kind == "dummy":
        serve = dispatch.select(op, scores.device, scores.dtype, grad=check.needs_grad(scores))
        return serve(scores, None, weights, cu_seqlens)
    assert weights.in_proj is not None
    check.expect_shape(op, "scores", scores, (n, weights.in_proj.weight.shape[1]), "[N, layers x heads]")
    wanted = len(weights.layers) if weights.kind == "v1" else 0
    given = list(conditions or ())
    if len(given) != wanted:
        raise ValueError(
            f"{op}: conditions: expected {wanted} tensors for kind {weights.kind!r}, found {len(given)}"
        )
    for i, (c, proj) in enumerate(zip(given, weights.cond_projs, strict=True)):
        check.expect_shape(op, f"conditions[{i}]", c, (n, proj.weight.shape[0]), "[N, C]")
        check.expect_dtype(op, f"conditions[{i}]", c, weights.dtype)
        check.expect_same_device(op, scores.device, **{f"conditions[{i}]": c})
    if cos is None or sin is None:
        raise ValueError(f"{op}: cos, sin: expected [N, {weights.qk_dim // 2}] float32 tensors, found None")
    for name, table in (("cos", cos), ("sin", sin)):
        check.expect_shape(op, name, table, (n, weights.qk_dim // 2), "[N, Dq/2]")
        check.expect_dtype(op, name, table, torch.float32)
    check.expect_same_device(op, scores.device, cos=cos, sin=sin, weights=weights.in_proj.weight)
    grad = check.needs_grad(scores, *given, *weights.tensors())
    serve = dispatch.select(op, scores.device, weights.dtype, grad=grad)
    # As it was given: a backend's `vip_conditions` may have computed more ahead than the conditions.
    return serve(scores, conditions if given else None, weights, cu_seqlens, cos, sin)


def vip_rotary(rows: Tensor, cols: Tensor, dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Rotary tables of the predictor: row and column of each token on its picture's merged grid, both from 0.

    The same two-dimensional embedding as the vision tower's; see `glimpse_kernels.vision_rotary`.
    """
    return vision_rotary(rows, cols, dim, theta)

# SPDX-License-Identifier: Apache-2.0
"""The measured rows of the norms, gated activations, image patches and the importance predictor; see `bench.op_cases`."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import glimpse_kernels as kernels
from bench.op_cases import nbytes
from bench.op_registry import REGISTRY, Sizes, Work
from glimpse_kernels.patchify.naive import patchify as naive_patchify
from glimpse_kernels.rms_norm.naive import rms_norm as naive_rms_norm
from glimpse_kernels.swiglu.naive import swiglu as naive_swiglu
from glimpse_kernels.vip.naive import vip as naive_vip
from glimpse_kernels.vip.naive import vip_conditions as naive_conditions
from glimpse_kernels.vip.weights import Linear, VipLayer, VipWeights

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # Qwen2-VL's processor
EPS = 1e-6


def _rms_norm(rows: int, width: int, dtype: torch.dtype, *, residual: bool) -> Work:
    # Small, so that what piles up in the residual over thousands of calls stays finite.
    x = (1e-3 * torch.randn(rows, width)).to(dtype)
    weight = torch.randn(width).to(dtype)
    start = torch.randn(rows, width).to(dtype)
    mine, theirs = start.clone(), start.clone()

    def ours() -> tuple[Tensor, ...]:
        if not residual:
            return (kernels.rms_norm(x, weight, EPS),)
        return kernels.rms_norm(x, weight, EPS, residual=mine), mine

    def plain() -> tuple[Tensor, ...]:
        if not residual:
            return (F.rms_norm(x, (width,), weight, EPS),)
        return F.rms_norm(theirs.add_(x), (width,), weight, EPS), theirs

    def truth() -> tuple[Tensor, ...]:
        if not residual:
            return (naive_rms_norm(x.float(), weight.float(), EPS),)
        total = start.float().clone()  # in fp32 .float() alone is the same tensor
        return naive_rms_norm(x.float(), weight.float(), EPS, residual=total), total

    return Work(ours, plain, truth, nbytes(weight) + (4 if residual else 2) * nbytes(x), "byte")


@REGISTRY.add("rms_norm", "all rows + residual")
def norm_prefill(s: Sizes, dtype: torch.dtype) -> Work:
    return _rms_norm(s.rows, s.hidden, dtype, residual=True)


@REGISTRY.add("rms_norm", "1 row + residual")
def norm_decode(s: Sizes, dtype: torch.dtype) -> Work:
    return _rms_norm(1, s.hidden, dtype, residual=True)


@REGISTRY.add("rms_norm", "vision")
def norm_vision(s: Sizes, dtype: torch.dtype) -> Work:
    return _rms_norm(s.patches, s.vision_hidden, dtype, residual=False)


def _swiglu(rows: int, inner: int, dtype: torch.dtype) -> Work:
    gate, up = torch.randn(rows, 2 * inner).to(dtype).chunk(2, -1)  # halves of one fused product
    return Work(
        lambda: (kernels.swiglu(gate, up),),
        lambda: (F.silu(gate).mul_(up),),
        lambda: (naive_swiglu(gate.float(), up.float()),),
        nbytes(gate, up, gate),
        "byte",
    )


@REGISTRY.add("swiglu", "all rows")
def swiglu_prefill(s: Sizes, dtype: torch.dtype) -> Work:
    return _swiglu(s.rows, s.inner, dtype)


@REGISTRY.add("swiglu", "1 row")
def swiglu_decode(s: Sizes, dtype: torch.dtype) -> Work:
    return _swiglu(1, s.inner, dtype)


@REGISTRY.add("swiglu", "vision")
def swiglu_vision(s: Sizes, dtype: torch.dtype) -> Work:
    return _swiglu(s.patches, s.vision_inner, dtype)


@REGISTRY.add("patchify", "1 picture", per_picture=True)
def patchify(s: Sizes, dtype: torch.dtype) -> Work:
    edge, grid = 28 * s.side, s.side
    image = torch.randint(0, 256, (edge, edge, 3), dtype=torch.uint8)
    mean, std = torch.tensor(MEAN), torch.tensor(STD)

    def plain() -> tuple[Tensor]:
        x = (image.float() * (1 / 255) - mean) / std
        x = x.view(grid, 2, 14, grid, 2, 14, 3).permute(0, 3, 1, 4, 6, 2, 5).unsqueeze(5)
        return (x.expand(-1, -1, -1, -1, -1, 2, -1, -1).reshape(-1, 1176),)

    return Work(
        lambda: (kernels.patchify(image, mean=MEAN, std=STD),),
        plain,
        lambda: (naive_patchify(image, mean=MEAN, std=STD),),
        nbytes(image) + 2 * 4 * image.numel(),
        "byte",
    )


@REGISTRY.add("patchify", "resize + patches", per_picture=True)
def resize_patchify(s: Sizes, dtype: torch.dtype) -> Work:
    edge, grid = 28 * s.side, s.side
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (15 * edge // 7, 2 * edge, 3), np.uint8)
    )
    image = torch.from_numpy(np.array(picture)).to(torch.empty(0).device)
    mean, std = np.array(MEAN, np.float32), np.array(STD, np.float32)

    def pillow() -> tuple[Tensor]:
        x = np.asarray(picture.resize((edge, edge), Image.Resampling.BICUBIC))
        x = ((x * (1 / 255)).astype(np.float32) - mean) / std
        x = x.reshape(grid, 2, 14, grid, 2, 14, 3).transpose(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]
        x = np.broadcast_to(x, (*x.shape[:5], 2, 14, 14))
        return (torch.from_numpy(x.reshape(-1, 1176)),)

    options = {"mean": MEAN, "std": STD, "size": (edge, edge)}

    def definition() -> tuple[Tensor]:
        return (naive_patchify(image, **options),)  # type: ignore[arg-type]

    amount = nbytes(image) + 2 * 4 * 3 * edge * edge
    on_host = image.device.type == "cpu"
    return Work(
        lambda: (kernels.patchify(image, **options),),  # type: ignore[arg-type]
        pillow if on_host else definition,  # what a resize gives byte by byte, torch has in no other way
        definition,
        amount,
        "byte",
        **({"plain_name": "Pillow, NumPy"} if on_host else {}),
    )


def _vip_weights(s: Sizes, dtype: torch.dtype) -> VipWeights:
    f, c = s.vip_width, s.vip_condition

    def linear(rows: int, cols: int, *, bias: bool = True) -> Linear:
        return Linear(torch.randn(rows, cols) / cols**0.5, 0.1 * torch.randn(rows) if bias else None)

    def layer() -> VipLayer:
        return VipLayer(
            norm1=torch.ones(f),
            q=linear(f + c, f + c, bias=False),
            k=linear(f + c, f + c, bias=False),
            v=linear(f, f, bias=False),
            o=linear(f, f, bias=False),
            norm2=torch.ones(f),
            gate=linear(2 * f, f),
            up=linear(2 * f, f),
            down=linear(f, 2 * f),
        )

    return VipWeights(
        kind="v1",
        in_proj=linear(f, s.heads),
        cond_projs=tuple(linear(c, s.vision_hidden) for _ in range(s.taps)),
        layers=tuple(layer() for _ in range(s.taps)),
        out_proj=linear(1, f),
        num_heads=s.vip_heads,
    ).to(dtype)


@REGISTRY.add("vip_conditions", "1 picture")
def conditions(s: Sizes, dtype: torch.dtype) -> Work:
    weights = _vip_weights(s, dtype)
    wide = weights.to(torch.float32)
    taps = [torch.randn(s.image, s.vision_hidden).to(dtype) for _ in range(s.taps)]
    return Work(
        lambda: tuple(kernels.vip_conditions(taps, weights)),
        lambda: tuple(_linear(t, p) for t, p in zip(taps, weights.cond_projs, strict=True)),
        lambda: tuple(naive_conditions([t.float() for t in taps], wide)),
        2 * s.taps * s.image * s.vision_hidden * s.vip_condition,
        "flop",
    )


@REGISTRY.add("vip", "1 picture")
def predictor(s: Sizes, dtype: torch.dtype) -> Work:
    weights = _vip_weights(s, dtype)
    wide = weights.to(torch.float32)
    n, f, c = s.image, s.vip_width, s.vip_condition
    taps = [torch.randn(n, s.vision_hidden).to(dtype) for _ in range(s.taps)]
    given = kernels.vip_conditions(taps, weights)  # with all that a backend computes ahead
    scores, bounds = torch.randn(n, s.heads), torch.tensor([0, n], dtype=torch.int32)
    at = torch.arange(n)
    cos, sin = kernels.vip_rotary(at // s.side, at % s.side, weights.qk_dim)
    products = s.heads * f + f + s.taps * (2 * (f + c) ** 2 + 2 * f * f + 6 * f * f)
    attended = s.taps * n * (f + c + f)
    return Work(
        lambda: (kernels.vip(scores, given, weights, bounds, cos, sin),),
        lambda: (_plain_vip(scores, given, weights, cos, sin),),
        lambda: (naive_vip(scores, [g.float() for g in given], wide, bounds, cos, sin),),
        2 * n * (products + attended),
        "flop",
    )


def _linear(x: Tensor, p: Linear) -> Tensor:
    return F.linear(x, p.weight, p.bias)


def _plain_vip(scores: Tensor, given: list[Tensor], w: VipWeights, cos: Tensor, sin: Tensor) -> Tensor:
    """The predictor for one picture as one would write it with torch.nn.functional."""
    assert w.in_proj is not None and w.out_proj is not None
    x = _linear(scores.to(w.dtype), w.in_proj)
    c, s = (torch.cat((t, t), -1)[:, None].to(w.dtype) for t in (cos, sin))
    width = x.shape[1]

    def rotated(t: Tensor) -> Tensor:
        t = t.unflatten(-1, (w.num_heads, -1))
        x1, x2 = t.chunk(2, -1)
        return (t * c + torch.cat((-x2, x1), -1) * s).transpose(0, 1)[None]

    for layer, condition in zip(w.layers, given, strict=True):
        h = F.rms_norm(x, (width,), layer.norm1, w.eps)
        both = torch.cat((h, condition), -1)
        v = _linear(h, layer.v).unflatten(-1, (w.num_heads, -1)).transpose(0, 1)[None]
        o = F.scaled_dot_product_attention(
            rotated(_linear(both, layer.q)), rotated(_linear(both, layer.k)), v
        )
        x = x + _linear(o[0].transpose(0, 1).flatten(1), layer.o)
        h = F.rms_norm(x, (width,), layer.norm2, w.eps)
        x = x + _linear(F.silu(_linear(h, layer.gate)) * _linear(h, layer.up), layer.down)
    return _linear(x, w.out_proj)[:, 0]

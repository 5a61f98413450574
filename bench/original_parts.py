# SPDX-License-Identifier: Apache-2.0
"""Parts of `bench.original_path`: small ops one by one as eager PyTorch runs them, the vision tower, and the predictor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Callable[[str], Tensor]
"""By the names that `glimpse_runtime.models.qwen2_5_vl.weights.canonical` gives."""
Mark = Callable[[str], None]
VisionAttention = Literal["flash", "dense"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In fp32, rounded, then scaled: six kernels, as models in eager PyTorch have it."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on the last dimension, whose halves are pairs; cos, sin as wide as x."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def grid_angles(rows: Tensor, cols: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[N, dim]` of the two-dimensional rotary embedding: a quarter of dim by rows, one by columns, twice."""
    steps = theta ** -(torch.arange(0, dim // 2, 2, dtype=torch.float32, device=rows.device) / (dim // 2))
    angles = torch.cat((torch.outer(rows.float(), steps), torch.outer(cols.float(), steps)), dim=-1)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


class _Segments:
    """Runs of packed patches that see each other. ends: behind each of them; bounds: the same, int32, from 0, on the device."""

    def __init__(self, ends: Sequence[int], device: torch.device) -> None:
        self.ends = ends
        self.begins = [0, *ends[:-1]]
        self.longest = max(end - begin for begin, end in zip(self.begins, ends, strict=True))
        self.bounds = torch.tensor([0, *ends], dtype=torch.int32, device=device)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, segments: _Segments) -> Tensor:
    """Full attention inside each segment of `[T, H, D]`: torch's FlashAttention-2 on a GPU, a loop elsewhere."""
    if q.is_cuda and q.dtype != torch.float32:
        bounds, longest = segments.bounds, segments.longest
        found: Tensor = torch.ops.aten._flash_attention_forward(
            q.contiguous(),
            k.contiguous(),
            v.contiguous(),
            bounds,
            bounds,
            longest,
            longest,
            0.0,
            False,
            False,
        )[0]
        return found
    parts = []
    for begin, end in zip(segments.begins, segments.ends, strict=True):
        heads = [x[begin:end].transpose(0, 1)[None] for x in (q, k, v)]
        parts.append(F.scaled_dot_product_attention(heads[0], heads[1], heads[2])[0].transpose(0, 1))
    return torch.cat(parts)


class OriginalVision:
    """The vision tower of Qwen2.5-VL, block by block.

    attention: "flash": torch's packed FlashAttention-2. "dense": sdpa with a mask of all patches by all patches, which is how
    the version of transformers that the original was written for runs it without flash-attn.
    """

    def __init__(self, weights: Weights, config: Any, attention: VisionAttention) -> None:
        self._w, self._c, self._attention = weights, config, attention

    def __call__(
        self, pixels: Tensor, grids: Sequence[tuple[int, int, int]], taps: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """`(embeds [N, text width], one [N, vision width] for each of taps)` of `pixels [P, patch_dim]`, raster order."""
        c, w = self._c, self._w
        order, windows, frames, rows, cols = self._places(grids)
        device = pixels.device
        order = order.to(device)
        hidden = F.linear(
            pixels.to(w("visual.merger.ln_q.weight").dtype), w("visual.patch_embed.proj.weight").flatten(1)
        )
        hidden = hidden.view(-1, c.merge_unit, c.hidden_size)[order].flatten(0, 1)
        cos, sin = (
            t[:, None] for t in grid_angles(rows.to(device), cols.to(device), c.head_dim, c.rope_theta)
        )
        pooled: dict[int, Tensor] = {}
        back = torch.argsort(order)
        segments = {False: _Segments(windows, device), True: _Segments(frames, device)}
        for number in range(c.depth):
            at = f"visual.blocks.{number}"
            x = rms_norm(hidden, w(f"{at}.norm1.weight"), c.eps)
            hidden = hidden + self._attend(x, at, segments[number in c.full_attention_blocks], cos, sin)
            x = rms_norm(hidden, w(f"{at}.norm2.weight"), c.eps)
            gate, up = (self._linear(x, f"{at}.mlp.{name}_proj") for name in ("gate", "up"))
            hidden = hidden + self._linear(F.silu(gate) * up, f"{at}.mlp.down_proj")
            if number in taps:
                pooled[number] = hidden.view(-1, c.merge_unit, c.hidden_size).mean(1)[back]
        x = rms_norm(hidden, w("visual.merger.ln_q.weight"), c.eps).view(-1, c.merge_unit * c.hidden_size)
        merged = self._linear(F.gelu(self._linear(x, "visual.merger.mlp.0")), "visual.merger.mlp.2")
        return merged[back], [pooled[number] for number in taps]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self._w(f"{name}.weight"), self._w(f"{name}.bias"))

    def _attend(self, x: Tensor, at: str, segments: _Segments, cos: Tensor, sin: Tensor) -> Tensor:
        c = self._c
        q, k, v = self._linear(x, f"{at}.attn.qkv").view(-1, 3, c.num_heads, c.head_dim).unbind(1)
        q, k = (turned(t.float(), cos, sin).to(x.dtype) for t in (q, k))
        if self._attention == "dense":
            places = torch.arange(len(x), device=x.device)
            segment = torch.bucketize(places, segments.bounds[1:], right=True)
            mask = (segment[:, None] == segment[None])[None, None]
            heads = [t.transpose(0, 1)[None] for t in (q, k, v)]
            found = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], attn_mask=mask)[0].transpose(
                0, 1
            )
        else:
            found = packed_attention(q, k, v, segments)
        return self._linear(found.flatten(1), f"{at}.attn.proj")

    def _places(
        self, grids: Sequence[tuple[int, int, int]]
    ) -> tuple[Tensor, list[int], list[int], Tensor, Tensor]:
        """(merged tokens in window order, ends of windows and of frames in patches, row and column of each patch)."""
        c = self._c
        merge, side = c.merge_size, c.window_size // c.merge_size // c.patch_size
        order, windows, frames, rows, cols = [], [], [], [], []
        start = 0
        corner = torch.arange(merge)
        for t, h, w in grids:
            height, width = h // merge, w // merge
            number = torch.arange(height * width)
            y, x = number // width, number % width
            window = y // side * -(-width // side) + x // side
            inside = torch.argsort(window, stable=True)
            across = (y[inside] * merge)[:, None, None] + corner[:, None]
            along = (x[inside] * merge)[:, None, None] + corner[None, :]
            for _ in range(t):
                order.append(start + inside)
                windows.append(torch.bincount(window) * merge**2)
                rows.append(across.expand(-1, merge, merge).flatten())
                cols.append(along.expand(-1, merge, merge).flatten())
                frames.append(height * width * merge**2)
                start += height * width
        return (
            torch.cat(order),
            torch.cat(windows).cumsum(0).tolist(),
            torch.tensor(frames).cumsum(0).tolist(),
            torch.cat(rows),
            torch.cat(cols),
        )


def importance(
    seen: Tensor,
    taps: Sequence[Tensor],
    picture: Tensor,
    rows: Tensor,
    cols: Tensor,
    fuser: Mapping[str, Tensor],
    heads: int,
) -> Tensor:
    """The predictor: one logit a visual token, `[N]`.

    seen: `[N, glimpse heads]`; taps: `[N, vision width]` a layer; picture: `[N]` which picture a token is of; rows, cols: its
    place on the merged grid. The mask of who sees whom is dense, N by N.
    """
    mask = (picture[:, None] == picture[None, :])[None, None]
    x = _project(seen, fuser, "attn_in_proj")
    angles: list[Tensor] = []
    for number, tap in enumerate(taps):
        at = f"layers.{number}"
        h = rms_norm(x, fuser[f"{at}.norm1.weight"], 1e-6)
        both = torch.cat((h, _project(tap, fuser, f"cond_in_projs.{number}")), dim=-1)
        q, k, v = (
            F.linear(given, fuser[f"{at}.attn.{name}_proj.weight"])
            .unflatten(-1, (heads, -1))
            .transpose(0, 1)[None]
            for given, name in ((both, "q"), (both, "k"), (h, "v"))
        )
        if not angles:
            angles += [t.to(q.dtype) for t in grid_angles(rows, cols, q.shape[-1], 10000.0)]
        cos, sin = angles
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1).flatten(1)
        x = x + F.linear(found, fuser[f"{at}.attn.o_proj.weight"])
        h = rms_norm(x, fuser[f"{at}.norm2.weight"], 1e-6)
        gate, up = (_project(h, fuser, f"{at}.mlp.{name}_proj") for name in ("gate", "up"))
        x = x + _project(F.silu(gate) * up, fuser, f"{at}.mlp.down_proj")
    return _project(x, fuser, f"attn_out_projs.{len(taps) - 1}").squeeze(-1)


def _project(x: Tensor, fuser: Mapping[str, Tensor], name: str) -> Tensor:
    return F.linear(x, fuser[f"{name}.weight"], fuser.get(f"{name}.bias"))

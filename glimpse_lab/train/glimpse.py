# SPDX-License-Identifier: Apache-2.0
"""GlimpsePrune's new modules as trainable parameters, named as in its checkpoints, and the glimpse row's way through the base.

The importance predictor itself is ``glimpse_kernels``' definition (``vip.naive``), run on these parameters.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glimpse_kernels.rope.naive import vision_rotary
from glimpse_kernels.vip.naive import vip, vip_conditions
from glimpse_kernels.vip.weights import VipWeights
from glimpse_lab.export import glimpse_settings
from glimpse_lab.train.config import ModelShape
from glimpse_lab.train.data import PREFIX_LENGTH, Batch
from glimpse_lab.train.model import Forward, Output, len_before, repeat_heads, text_finish, text_qkv


class _Attention(nn.Module):
    def __init__(self, size: int, cond: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(size + cond, size + cond, bias=False)
        self.k_proj = nn.Linear(size + cond, size + cond, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)


class _Mlp(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, 2 * size)
        self.up_proj = nn.Linear(size, 2 * size)
        self.down_proj = nn.Linear(2 * size, size)


class _Layer(nn.Module):
    def __init__(self, size: int, cond: int) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(size)
        self.norm2 = nn.RMSNorm(size)
        self.attn = _Attention(size, cond)
        self.mlp = _Mlp(size)


class _Fuser(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        depth = shape.vision_layers
        self.attn_in_proj = nn.Linear(shape.heads, shape.fuse_size)
        self.cond_in_projs = nn.ModuleList(
            nn.Linear(shape.vision_hidden, shape.cond_size) for _ in range(depth)
        )
        self.layers = nn.ModuleList(_Layer(shape.fuse_size, shape.cond_size) for _ in range(depth))
        self.attn_out_projs = nn.ModuleDict({str(depth - 1): nn.Linear(shape.fuse_size, 1)})


class GlimpseModules(nn.Module):
    """``attn_fuser``, ``learnable_embeddings [layers, 1, hidden]``, ``le_proj``, ``le_norm``."""

    def __init__(self, shape: ModelShape, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.shape = shape
        self.settings = glimpse_settings(shape)
        self.attn_fuser = _Fuser(shape)
        self.learnable_embeddings = nn.Parameter(torch.randn(shape.layers, 1, shape.hidden))
        self.le_proj = nn.Linear(shape.hidden, shape.hidden)
        self.le_norm = nn.RMSNorm(shape.hidden, eps=1e-6)
        nn.init.constant_(self.le_norm.weight, 0.5)
        nn.init.constant_(self.attn_fuser.attn_out_projs[str(shape.vision_layers - 1)].bias, -2.0)

    def new_modules(self) -> dict[str, Any]:
        """The dict that ``new_modules_gp.pt`` holds."""
        return {
            "attn_fuser": dict(self.attn_fuser.state_dict()),
            "learnable_embeddings": self.learnable_embeddings.data,
            "le_proj": dict(self.le_proj.state_dict()),
            "le_norm": dict(self.le_norm.state_dict()),
        }

    def vectors(self) -> Tensor:
        """The glimpse token's vector per layer, [layers, hidden]."""
        x = self.le_proj(self.learnable_embeddings[:, 0])
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.le_norm.weight

    def importance(self, scores: Tensor, taps: list[Tensor], batch: Batch, owner: Tensor) -> Tensor:
        """Importance logits [G, N] of G glimpses. scores [G, N, heads]; taps per block [B, N, Cv]; owner [G]: row of the batch."""
        glimpses, n = scores.shape[:2]
        parameters = {**dict(self.attn_fuser.named_parameters()), **dict(self.attn_fuser.named_buffers())}
        weights = VipWeights.from_state_dict(parameters, self.settings)
        chosen = [taps[i].flatten(0, 1) for i in self.settings["selected_visual_layers"]]
        conditions = [c.unflatten(0, (-1, n))[owner].flatten(0, 1) for c in vip_conditions(chosen, weights)]
        cell = torch.arange(n, device=scores.device).repeat(glimpses)
        cos, sin = vision_rotary(cell // batch.columns, cell % batch.columns, weights.qk_dim, weights.theta)
        bounds = torch.arange(0, (glimpses + 1) * n, n, dtype=torch.int32)
        return vip(scores.flatten(0, 1), conditions, weights, bounds, cos, sin).unflatten(0, (-1, n))


def glimpse_rows(
    forward: Forward, modules: GlimpseModules, batch: Batch, out: Output
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One glimpse token after each block's prompt.

    The base's other rows do not see it, so they come from ``out`` and only the glimpse rows are computed, with gradients for the
    new modules.

    Returns the scores at the glimpse layer [G, N, heads], logits of the first answer token [G, V], and each glimpse's place
    (row of the batch, position of the last prompt token in the blocks), [G] each.
    """
    owner, at = batch.last.nonzero(as_tuple=True)
    n = batch.rows * batch.columns
    prefix = n + PREFIX_LENGTH
    position = forward.positions(batch)[:, owner, prefix + at] + 1
    cos, sin = (t[:, :, 0] for t in forward.rotary(position[:, :, None]))
    cos, sin = cos[:, :, None], sin[:, :, None]
    visible = out.allowed[owner, prefix + at]
    bias = torch.zeros_like(visible, dtype=torch.float32).masked_fill_(~visible, float("-inf"))[:, None, None]
    vectors = modules.vectors()
    eps, dtype = forward.text_config.rms_norm_eps, torch.float32
    scores = out.logits.new_zeros(())
    x = out.logits.new_zeros(len(owner), 1, vectors.shape[1])
    for i, layer in enumerate(forward.model.model.language_model.layers):
        x = x + vectors[i]
        q, k, v = text_qkv(layer, x, cos, sin, eps, dtype)
        keys, values = (t.float() for t in out.qkv[i][1:])
        heads = q.shape[1]
        scale = q.shape[-1] ** -0.5
        # Glimpses of one picture share its keys: [G, Hq, 1, D] against [B, Hq, L, D] by gathering the picture of each.
        seen = repeat_heads(keys, heads)[owner]
        logits = (q @ seen.mT) * scale
        if i == modules.shape.reduce_layer:
            scores = logits[:, :, 0, len_before() : len_before() + n].transpose(1, 2)
        own = (q * repeat_heads(k, heads)).sum(-1, keepdim=True) * scale
        share = torch.cat((logits + bias, own), dim=-1).softmax(-1)
        mixed = share[..., :-1] @ repeat_heads(values, heads)[owner] + share[..., -1:] * repeat_heads(
            v, heads
        )
        x = text_finish(layer, x, mixed, eps, dtype)
    h = x[:, 0] * torch.rsqrt(x[:, 0].pow(2).mean(-1, keepdim=True) + eps)
    h = h * forward.model.model.language_model.norm.weight
    return scores, F.linear(h, forward.model.lm_head.weight), owner, at

# SPDX-License-Identifier: Apache-2.0
"""Training forward of a Hugging Face Qwen2.5-VL over same-size pictures: one batched attention a layer, no index loops.

The parameters are those of a ``Qwen2_5_VLForConditionalGeneration``; only the way through them is ours. Same-size pictures make
every vision and text tensor rectangular, and all vision blocks attend fully, so each attention is one ``sdpa`` call. Matrices are
cast to the compute type on use; residual stream, norms and losses stay in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from glimpse_lab.tokens import IMAGE_MEAN, IMAGE_STD
from glimpse_lab.train.config import ModelShape
from glimpse_lab.train.data import CELL_CLASSES, CELL_WEIGHTS, PREFIX, PREFIX_LENGTH, Batch


def new_model(
    shape: ModelShape, tokenizer: PreTrainedTokenizerFast, seed: int
) -> Qwen2_5_VLForConditionalGeneration:
    """A freshly initialised base in float32; fan-in scaled, residual branches damped, output head at zero."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(shape.hf_config(tokenizer)).float()
    branch = (2 * shape.layers) ** -0.5
    for name, p in model.named_parameters():
        with torch.no_grad():
            if p.dim() == 1:
                p.fill_(1.0 if "norm" in name or "ln_q" in name else 0.0)
            elif "embed_tokens" in name:
                p.normal_(std=0.5)
            elif "lm_head" in name:
                p.normal_(std=0.01)
            else:
                fan_in = p[0].numel()
                damped = name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight"))
                p.normal_(std=fan_in**-0.5 * (branch if damped else 1.0))
    return model


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def _norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    x = x.float()
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight).to(dtype)


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, layer.weight.to(x.dtype), bias)


def vision_block(block: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """One vision block with full attention. x float32 [B, P, C]; cos, sin [P, head_dim / 2]."""
    batch, length, width = x.shape
    attn = block.attn
    qkv = _linear(_norm(x, block.norm1.weight, 1e-6, dtype), attn.qkv)
    q, k, v = qkv.view(batch, length, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v)
    x = x + _linear(out.transpose(1, 2).reshape(batch, length, width), attn.proj)
    h = _norm(x, block.norm2.weight, 1e-6, dtype)
    return x + _linear(
        F.silu(_linear(h, block.mlp.gate_proj)) * _linear(h, block.mlp.up_proj), block.mlp.down_proj
    )


def text_qkv(
    layer: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated q [B, Hq, L, D], rotated k and v [B, Hkv, L, D]. cos, sin [B, 1, L, D / 2]."""
    h = _norm(x, layer.input_layernorm.weight, eps, dtype)
    attn = layer.self_attn
    q, k, v = (
        _linear(h, p).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)
        for p in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def text_finish(layer: nn.Module, x: Tensor, mixed: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """What follows attention: output projection, residual, MLP. mixed [B, Hq, L, D]."""
    x = x + _linear(mixed.transpose(1, 2).flatten(2), layer.self_attn.o_proj)
    h = _norm(x, layer.post_attention_layernorm.weight, eps, dtype)
    mlp = layer.mlp
    return x + _linear(F.silu(_linear(h, mlp.gate_proj)) * _linear(h, mlp.up_proj), mlp.down_proj)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Key/value heads repeated to the number of query heads."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def text_layer(
    layer: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One decoder layer. bias: additive attention mask [B, 1, L, L]. Returns hidden, q, k, v."""
    q, k, v = text_qkv(layer, x, cos, sin, eps, dtype)
    heads = q.shape[1]
    mixed = F.scaled_dot_product_attention(q, repeat_heads(k, heads), repeat_heads(v, heads), attn_mask=bias)
    return text_finish(layer, x, mixed, eps, dtype), q, k, v


@dataclass
class Output:
    """logits [M, V] at the labelled positions; q, k, v per text layer; taps: vision block outputs per cell [B, N, Cv]."""

    logits: Tensor
    labels: Tensor
    where: Tensor
    image_embeds: Tensor
    qkv: list[tuple[Tensor, Tensor, Tensor]]
    taps: list[Tensor]
    allowed: Tensor


class Forward:
    """The forward of one model. ``dtype``: compute type of matrix products; ``compiled`` compiles the layer functions."""

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        dtype: torch.dtype = torch.bfloat16,
        compiled: bool = False,
    ) -> None:
        self.model, self.dtype = model, dtype
        self.text_config = model.config.text_config
        self.vision_config = model.config.vision_config
        wrap: Callable = torch.compile if compiled else lambda f: f
        self._vision_block, self._text_layer = wrap(vision_block), wrap(text_layer)
        device = model.lm_head.weight.device
        head_dim = self.text_config.hidden_size // self.text_config.num_attention_heads
        rope = self.text_config.rope_parameters
        self._inv_freq = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2, device=device) / head_dim)
        axis = torch.arange(3).repeat_interleave(torch.tensor(rope["mrope_section"]))
        self._axis = axis.to(device)

    def patches(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised patches [B, P, 588] with 2 x 2 groups together, and each patch's row and column [P]."""
        batch, height, width, _ = pixels.shape
        x = pixels.float() / 255
        x = (x - x.new_tensor(IMAGE_MEAN)) / x.new_tensor(IMAGE_STD)
        x = x.view(batch, height // 28, 2, 14, width // 28, 2, 14, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
        rows = torch.arange(height // 14, device=x.device).view(-1, 1).expand(-1, width // 14)
        columns = torch.arange(width // 14, device=x.device).view(1, -1).expand(height // 14, -1)
        order = [
            g.reshape(height // 28, 2, width // 28, 2).permute(0, 2, 1, 3).flatten() for g in (rows, columns)
        ]
        return x.reshape(batch, -1, 588), order[0], order[1]

    def vision(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Merged image tokens float32 [B, N, C] and each block's output averaged over 2 x 2 patches [B, N, Cv]."""
        visual = self.model.model.visual
        x, rows, columns = self.patches(pixels)
        # Both frames of a still picture are the same, so their weights add up.
        weight = visual.patch_embed.proj.weight.sum(2).flatten(1)
        x = F.linear(x.to(self.dtype), weight.to(self.dtype)).float()
        quarter = self.vision_config.hidden_size // self.vision_config.num_heads // 4
        freq = 10000.0 ** -(torch.arange(quarter, device=x.device) / quarter)
        angles = torch.cat((rows[:, None] * freq, columns[:, None] * freq), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        taps = []
        for block in visual.blocks:
            x = self._vision_block(block, x, cos, sin, self.dtype)
            taps.append(x.unflatten(1, (-1, 4)).mean(2))
        merger = visual.merger
        h = _norm(x, merger.ln_q.weight, 1e-6, self.dtype).unflatten(1, (-1, 4)).flatten(2)
        return _linear(F.gelu(_linear(h, merger.mlp[0])), merger.mlp[2]).float(), taps

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 [B, 1, L, D / 2], of positions [3, B, L]."""
        angles = positions.float()[self._axis].permute(1, 2, 0) * self._inv_freq
        return angles.cos()[:, None], angles.sin()[:, None]

    def positions(self, batch: Batch) -> Tensor:
        """Time, row and column position of every token, [3, B, 5 + N + T]."""
        device = batch.ids.device
        before, after = len_before(), 1
        cell = torch.arange(batch.rows * batch.columns, device=device)
        image = torch.stack((torch.zeros_like(cell), cell // batch.columns, cell % batch.columns)) + before
        start = torch.arange(before, device=device).expand(3, -1)
        end = before + max(batch.rows, batch.columns)
        stop = torch.full((3, after), end, device=device)
        prefix = torch.cat((start, image, stop), dim=1)
        blocks = (batch.offset + end + after).expand(3, -1, -1)
        return torch.cat((prefix[:, None].expand(-1, len(batch.ids), -1), blocks), dim=2)

    def allowed(self, batch: Batch) -> Tensor:
        """Who may attend to whom, bool [B, L, L]: the prefix causally, a block to the prefix and causally to itself."""
        prefix = batch.rows * batch.columns + PREFIX_LENGTH
        size, length = batch.ids.shape
        block = F.pad(batch.block, (prefix, 0), value=-2)
        order = torch.arange(prefix + length, device=block.device)
        causal = order[:, None] >= order[None]
        same = block[:, :, None] == block[:, None]
        return causal & (same | (block[:, None] == -2))

    def embed(self, batch: Batch, image: Tensor, prefix_ids: tuple[list[int], int]) -> Tensor:
        table = self.model.model.language_model.embed_tokens
        start = table(torch.tensor(prefix_ids[0], device=image.device))
        stop = table(torch.tensor([prefix_ids[1]], device=image.device))
        size = len(batch.ids)
        return torch.cat(
            (start.expand(size, -1, -1), image, stop.expand(size, -1, -1), table(batch.ids)), dim=1
        )

    def __call__(
        self,
        batch: Batch,
        prefix_ids: tuple[list[int], int],
        *,
        keep_after: tuple[int, Tensor] | None = None,
    ) -> Output:
        """Runs everything. ``keep_after = (layer, keep [B, T, N])``: pruning as it acts on teacher-forced answers: block tokens see
        only their kept image tokens in layers after ``layer``, and answer tokens, which come after pruning, in all layers."""
        image, taps = self.vision(batch.pixels)
        x = self.embed(batch, image, prefix_ids)
        cos, sin = self.rotary(self.positions(batch))
        allowed = self.allowed(batch)
        bias = self._bias(allowed)
        early, late = bias, bias
        if keep_after is not None:
            n, prefix = batch.rows * batch.columns, batch.rows * batch.columns + PREFIX_LENGTH
            start = len_before()
            late_allowed = allowed.clone()
            late_allowed[:, prefix:, start : start + n] &= keep_after[1]
            first = (batch.last.int().cumsum(1) - batch.last.int()).gt(batch.block.clamp(min=0))
            early_allowed = torch.where(F.pad(first, (prefix, 0))[:, :, None], late_allowed, allowed)
            early, late = self._bias(early_allowed), self._bias(late_allowed)
        qkv = []
        eps = self.text_config.rms_norm_eps
        for i, layer in enumerate(self.model.model.language_model.layers):
            use = late if keep_after is not None and i > keep_after[0] else early
            x, q, k, v = self._text_layer(layer, x, cos, sin, use, eps, self.dtype)
            qkv.append((q, k, v))
        where = (batch.labels >= 0).nonzero(as_tuple=True)
        rows = x[:, -batch.ids.shape[1] :][where]
        h = _norm(rows, self.model.model.language_model.norm.weight, eps, self.dtype)
        return Output(
            _linear(h, self.model.lm_head).float(),
            batch.labels[where],
            torch.stack(where),
            image,
            qkv,
            taps,
            allowed,
        )

    def _bias(self, allowed: Tensor) -> Tensor:
        return torch.zeros_like(allowed, dtype=self.dtype).masked_fill_(~allowed, float("-inf"))[:, None]


def len_before() -> int:
    """Prefix tokens before the image."""
    return PREFIX_LENGTH - 1


def pointing_loss(q: Tensor, k: Tensor, target: Tensor, head: int) -> Tensor:
    """Cross-entropy of one head's attention over the image tokens against the target cells.

    q [B, Hq, L, D], k [B, Hkv, L, D], target bool [B, T, N] (rows without a cell do not count).
    """
    n, length = target.shape[2], target.shape[1]
    group = q.shape[1] // k.shape[1]
    at = target.any(-1)
    keys = k[:, head // group, len_before() : len_before() + n]
    scores = (q[:, head, -length:] @ keys.transpose(1, 2)).float() * q.shape[-1] ** -0.5
    share = target[at].float()
    share = share / share.sum(-1, keepdim=True)
    return -(share * F.log_softmax(scores[at], dim=-1)).sum(-1).mean()


class CellHeads(nn.Module):
    """Linear read-outs of what a cell shows, used while training only, so that the vision tower learns from every cell."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, sum(CELL_CLASSES))

    def forward(self, image: Tensor, cells: Tensor) -> Tensor:
        """Cross-entropy. image float32 [B, N, C], cells [B, N, 7]. Empty cells count a tenth."""
        image = image * torch.rsqrt(image.pow(2).mean(-1, keepdim=True) + 1e-6)
        loss = image.new_zeros(())
        parts = self.out(image).split(CELL_CLASSES, dim=-1)
        for part, target, share in zip(parts, cells.unbind(-1), CELL_WEIGHTS, strict=True):
            weight = torch.where(target > 0, 1.0, 0.1).flatten()
            each = F.cross_entropy(part.flatten(0, 1), target.flatten(), reduction="none")
            loss = loss + share * (each * weight).sum() / weight.sum()
        return loss / len(CELL_CLASSES)


__all__ = ["PREFIX", "CellHeads", "Forward", "Output", "new_model", "pointing_loss"]

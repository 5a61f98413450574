# SPDX-License-Identifier: Apache-2.0
"""GlimpsePrune on Qwen2.5-VL step by step in eager PyTorch, in the way its published code goes: what the runtime is measured against.

Written for this benchmark from the description of the method (docs/architecture.md has the runtime's own way). What it
pays for and the runtime does not: layer K in full for tokens that are dropped a moment later; a dense mask of all visual tokens
by all in the predictor; keys and values of each layer gathered with a mask, for which the host waits each time; logits for
every kept position; a cache that is copied for each new token; a look at every token by the host.

Batches: rows of equal length, one picture each, the same number of tokens kept.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.original_parts import Mark, OriginalVision, VisionAttention, importance, rms_norm, turned
from glimpse_runtime.models.qwen2_5_vl.config import ModelConfig
from glimpse_runtime.models.qwen2_5_vl.weights import canonical

PHASES = ("vision", "before", "select", "after")
"""As in `glimpse_runtime.timings`; marks are set at the end of each."""


@dataclass
class Prompt:
    """A batch after prefill.

    logits: `[B, vocabulary]` after the last prompt token. keep: `[B, pictures' tokens]` bool. scores: the same shape, before the
    sigmoid. seen: `[B, tokens, heads]`. cache: keys and values `[B, kv heads, rows, D]` of each layer. next_position: of the
    first generated token, `[B]`.
    """

    logits: Tensor
    keep: Tensor
    scores: Tensor
    seen: Tensor
    next_position: Tensor
    cache: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class OriginalPath:
    """The original's way through a model of transformers, on that model's weights.

    Args:
        hf: `Qwen2_5_VLForConditionalGeneration`.
        modules: folder of GlimpsePrune modules with one glimpse token, one selected layer, and AttnFuserV1 over whole pictures.
        vision: how the vision tower attends.
    """

    def __init__(self, hf: Any, modules: Path, vision: VisionAttention = "flash") -> None:
        self.config = ModelConfig.from_hf(hf.config)
        # The parameters themselves, not what they hold now: whoever shares the model may move that.
        self._held = {canonical(name): p for name, p in hf.named_parameters()}
        settings = json.loads((modules / "config.json").read_text())
        wanted = {
            "le_length": 1,
            "attn_fuse_type": "AttnFuserV1",
            "attn_fuse_global": True,
            "use_attention_logits": True,
        }
        wrong = [k for k, v in wanted.items() if settings.get(k, v) != v]
        if wrong or settings["selected_layers"] != [settings["reduce_layer"]]:
            raise ValueError(
                f"{modules}: settings that this transcription does not follow: {wrong or 'selected_layers'}"
            )
        self.stage, self.taps = settings["reduce_layer"], settings["selected_visual_layers"]
        self.heads = settings["attn_fuse_num_heads"]
        self.least = settings.get("min_remain_num") or 1
        parts = torch.load(modules / "new_modules_gp.pt", map_location="cpu", weights_only=True)
        place, dtype = self._w("text.norm.weight").device, self._w("text.norm.weight").dtype
        self.fuser = {name: t.to(place, dtype) for name, t in parts["attn_fuser"].items()}
        proj, norm = parts["le_proj"], parts["le_norm"]
        vectors = F.linear(
            parts["learnable_embeddings"].float(), proj["weight"].float(), proj["bias"].float()
        )
        if settings.get("le_norm_type", "rmsnorm") == "rmsnorm":
            vectors = rms_norm(vectors, norm["weight"].float(), 1e-6)
        else:
            vectors = F.layer_norm(vectors, vectors.shape[-1:], norm["weight"].float(), norm["bias"].float())
        self.vectors = dict(zip(settings["le_layers"], vectors[:, 0].to(place, dtype), strict=True))
        self._see = OriginalVision(self._w, self.config.vision, vision)

    def _w(self, name: str) -> Tensor:
        return self._held[name]

    @torch.inference_mode()
    def prefill(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        image_grid_thw: Tensor,
        *,
        threshold: float = 0.5,
        max_remain_ratio: float | None = None,
        keep: Tensor | None = None,
        mark: Mark = lambda phase: None,
    ) -> Prompt:
        """Run `input_ids [B, L]`, image tokens expanded. keep: `[B, tokens]`, instead of a choice by the scores."""
        device = self._w("text.norm.weight").device
        ids = input_ids.to(device)
        grids = [tuple(grid) for grid in image_grid_thw.tolist()]
        if len(grids) != len(ids):
            raise ValueError(f"expected one picture a row, found {len(grids)} for {len(ids)} rows")
        embeds, taps = self._see(pixel_values.to(device), grids, self.taps)
        mark("vision")
        image = ids == self.config.image_token_id
        hidden = F.embedding(ids, self._w("text.embed_tokens.weight"))
        hidden = hidden.masked_scatter(image[..., None], embeds.to(hidden.dtype))
        positions, following = self._positions(ids, image, grids)
        glimpse = self.vectors[0].expand(len(ids), 1, -1)
        hidden = torch.cat((hidden, glimpse), dim=1)
        positions = torch.cat((positions, following[None, :, None].expand(3, -1, 1)), dim=2)
        turns = self._turns(positions, hidden.dtype)
        cache: list[tuple[Tensor, Tensor]] = []
        seen = hidden
        for number in range(self.stage + 1):
            if number and number in self.vectors:
                hidden[:, -1] += self.vectors[number]
            hidden, q = self._layer(number, hidden, turns, cache)
            if number == self.stage:
                seen = self._glance(q[:, :, -1:], cache[number][0], image)
        mark("before")
        places = self._places(grids, device)
        scores = torch.stack(
            [
                importance(
                    seen[b],
                    [tap.view(len(ids), -1, tap.shape[-1])[b] for tap in taps],
                    *places,
                    self.fuser,
                    self.heads,
                )
                for b in range(len(ids))
            ]
        )
        chosen = self._choose(scores, threshold, max_remain_ratio) if keep is None else keep.to(device)
        counts = chosen.sum(1).tolist()
        if len(set(counts)) > 1:
            raise ValueError(f"expected the same number of kept tokens in every row, found {counts}")
        stays = torch.cat((~image, torch.zeros_like(image[:, :1])), dim=1)
        stays[:, :-1][image] = chosen.flatten()
        hidden = _gathered(hidden, stays)
        turns = tuple(_gathered(t, stays) for t in turns)  # type: ignore[assignment]
        cache = [
            tuple(_gathered(t.transpose(1, 2), stays).transpose(1, 2) for t in pair)  # type: ignore[misc]
            for pair in cache
        ]
        mark("select")
        for number in range(self.stage + 1, self.config.text.num_layers):
            hidden, _ = self._layer(number, hidden, turns, cache)
        logits = self._logits(hidden)
        mark("after")
        return Prompt(logits[:, -1], chosen, scores, seen, following, cache)

    @torch.inference_mode()
    def decode(self, prompt: Prompt, new_tokens: int, ends: int = -1) -> Tensor:
        """`[B, new_tokens]` greedily; the host looks at each token. The prompt is used up."""
        tokens = [prompt.logits.argmax(-1)]
        while len(tokens) < new_tokens:
            if bool((tokens[-1] == ends).all()):
                break
            hidden = F.embedding(tokens[-1][:, None], self._w("text.embed_tokens.weight"))
            position = prompt.next_position + len(tokens) - 1
            turns = self._turns(position[None, :, None].expand(3, -1, 1), hidden.dtype)
            for number in range(self.config.text.num_layers):
                hidden, _ = self._layer(number, hidden, turns, prompt.cache)
            tokens.append(self._logits(hidden)[:, -1].argmax(-1))
        found = torch.stack(tokens, dim=1)
        return found

    # -- one layer ---------------------------------------------------------------------------------------------

    def _layer(
        self, number: int, hidden: Tensor, turns: tuple[Tensor, Tensor], cache: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """(output, queries `[B, heads, L, D]`); keys and values are appended to the cache by a copy."""
        c, w, at = self.config.text, self._w, f"text.layers.{number}"
        x = rms_norm(hidden, w(f"{at}.input_layernorm.weight"), c.eps)
        q, k, v = (
            F.linear(x, w(f"{at}.self_attn.{name}_proj.weight"), w(f"{at}.self_attn.{name}_proj.bias"))
            .unflatten(-1, (-1, c.head_dim))
            .transpose(1, 2)
            for name in "qkv"
        )
        cos, sin = (t[:, None] for t in turns)
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        causal = number >= len(cache)
        if causal:
            cache.append((k, v))
        else:
            k, v = (torch.cat((old, new), dim=2) for old, new in zip(cache[number], (k, v), strict=True))
            cache[number] = k, v
        found = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        found = found.transpose(1, 2).flatten(2)
        hidden = hidden + F.linear(found, w(f"{at}.self_attn.o_proj.weight"))
        x = rms_norm(hidden, w(f"{at}.post_attention_layernorm.weight"), c.eps)
        gate, up = (F.linear(x, w(f"{at}.mlp.{name}_proj.weight")) for name in ("gate", "up"))
        return hidden + F.linear(F.silu(gate) * up, w(f"{at}.mlp.down_proj.weight")), q

    def _logits(self, hidden: Tensor) -> Tensor:
        head = self._held.get("lm_head.weight", self._held["text.embed_tokens.weight"])
        return F.linear(rms_norm(hidden, self._w("text.norm.weight"), self.config.text.eps), head)

    def _turns(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin `[B, L, D]` of `positions [3, B, L]`, each run of frequencies by its axis."""
        c = self.config.text
        powers = torch.arange(0, c.head_dim, 2, dtype=torch.float32, device=positions.device) / c.head_dim
        angles = positions[..., None].float() * c.rope_theta**-powers
        runs = angles.split(list(c.mrope_section), dim=-1)
        mixed = torch.cat([run[axis] for axis, run in enumerate(runs)], dim=-1)
        mixed = torch.cat((mixed, mixed), dim=-1)
        return mixed.cos().to(dtype), mixed.sin().to(dtype)

    # -- the pruning step --------------------------------------------------------------------------------------

    def _glance(self, q: Tensor, k: Tensor, image: Tensor) -> Tensor:
        """`[B, tokens, heads]`: what the last row's query sees of the pictures, before the softmax."""
        wide = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        found = (q @ wide.transpose(2, 3) / q.shape[-1] ** 0.5)[:, :, 0, :-1].transpose(1, 2)
        return found[image].view(len(image), -1, q.shape[1])

    def _choose(self, scores: Tensor, threshold: float, ratio: float | None) -> Tensor:
        """Row by row, the host deciding what to do by the number that passed."""
        found = []
        for row in scores:
            share = row.sigmoid()
            keep = share > threshold
            if ratio is not None and keep.sum().item() > int(ratio * len(row)):
                best = share.topk(int(ratio * len(row))).indices
                keep = torch.zeros_like(keep).scatter_(0, best, True)
            if keep.sum().item() < self.least:
                keep = keep.scatter(0, share.topk(min(self.least, len(row))).indices, True)
            found.append(keep)
        return torch.stack(found)

    def _positions(self, ids: Tensor, image: Tensor, grids: list[Any]) -> tuple[Tensor, Tensor]:
        """Rotary positions `[3, B, L]`, and the one behind the prompt `[B]`."""
        merge = self.config.vision.merge_size
        rows = []
        for mask, (_, h, w) in zip(image.tolist(), grids, strict=True):
            first, height, width = mask.index(True), h // merge, w // merge
            before = torch.arange(first).expand(3, -1)
            place = (
                torch.cartesian_prod(
                    torch.zeros(1, dtype=torch.int64), torch.arange(height), torch.arange(width)
                ).T
                + first
            )
            behind = (
                torch.arange(len(mask) - first - height * width).expand(3, -1) + first + max(height, width)
            )
            rows.append(torch.cat((before, place, behind), dim=1))
        positions = torch.stack(rows, dim=1).to(ids.device)
        return positions, positions[2, :, -1] + 1

    def _places(self, grids: list[Any], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """(picture, row, column) of each token of one prompt's picture."""
        merge = self.config.vision.merge_size
        _, h, w = grids[0]
        number = torch.arange(h * w // merge**2, device=device)
        return torch.zeros_like(number), number // (w // merge), number % (w // merge)


def _gathered(x: Tensor, stays: Tensor) -> Tensor:
    """Rows `[B, L, ...]` where `stays [B, L]`: the host waits for how many there are."""
    return x[stays].view(len(x), -1, *x.shape[2:])

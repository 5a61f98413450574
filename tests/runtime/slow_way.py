# SPDX-License-Identifier: Apache-2.0
"""Pruning in stages the slow way, in transformers' own layers: all rows through a layer, then drop, one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

from .conftest import IMAGE, for_hf


@dataclass
class Drop:
    """A stage.

    at: before this layer (the number of layers: behind the last). keep: of all visual tokens those that are left, or what finds
    them out from the attention of the last prompt row, see `last_row`. renumber: positions then count from 0.
    layer, rotary: of that attention.
    """

    at: int
    keep: torch.Tensor | Callable[[torch.Tensor], torch.Tensor]
    renumber: bool = False
    layer: int = 0
    rotary: bool = True


def slow_way(
    hf_model: Any,
    inputs: dict[str, torch.Tensor],
    drops: Sequence[Drop],
    new: Sequence[int] = (),
    embeds_of: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor], list[int]]:
    """Logits `[vocabulary]` behind a prompt and the tokens `new`, the keep mask of each drop, and the rows of each layer.

    embeds_of: changes the visual embeddings `[N, width]` before the decoder.
    """
    core, text = hf_model.model, hf_model.model.language_model
    ids = inputs["input_ids"]
    prompt = ids.shape[1]
    with torch.inference_mode():
        seen = core.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        seen = torch.cat(list(seen)) if isinstance(seen, (tuple, list)) else seen
        seen = seen if embeds_of is None else embeds_of(seen)
        positions, _ = core.get_rope_index(
            ids,
            for_hf(inputs)["mm_token_type_ids"],
            inputs["image_grid_thw"],
            attention_mask=inputs["attention_mask"],
        )
        after = positions[:, :, -1:] + 1 + torch.arange(len(new))
        positions = torch.cat([positions, after], dim=2)
        ids = torch.cat([ids, torch.tensor([list(new)], dtype=ids.dtype)], dim=1)
        hidden = text.embed_tokens(ids)
        hidden[ids == IMAGE] = seen
        number = torch.full((ids.shape[1],), -1)  # of the visual token in each row
        number[ids[0] == IMAGE] = torch.arange(seen.shape[0])
        last = torch.zeros(ids.shape[1], dtype=torch.bool)
        last[prompt - 1] = True
        waiting, kept, rows = list(drops), [], []
        attended: dict[int, torch.Tensor] = {}

        def drop(due: Drop) -> None:
            nonlocal hidden, positions, number, last
            keep = due.keep
            if callable(keep):
                scores = attended.get(due.layer)
                if scores is None:
                    scores = last_row(text, due.layer, due.rotary, hidden, positions, last)
                whole = torch.full((seen.shape[0],), float("nan"))
                whole[number[number >= 0]] = scores[number >= 0]
                keep = keep(whole)
            kept.append(keep)
            stay = (number < 0) | keep[number.clamp(min=0)]
            hidden, positions, number, last = hidden[:, stay], positions[:, :, stay], number[stay], last[stay]
            if due.renumber:
                positions = torch.arange(hidden.shape[1]).expand(3, 1, -1)

        for layer_number, layer in enumerate(text.layers):
            while waiting and waiting[0].at == layer_number:
                drop(waiting.pop(0))
            if waiting and waiting[0].at == layer_number + 1 and waiting[0].layer == layer_number:
                attended[layer_number] = last_row(
                    text, layer_number, waiting[0].rotary, hidden, positions, last
                )
            rows.append(hidden.shape[1] - len(new))
            length = hidden.shape[1]
            causal = torch.full((length, length), float("-inf")).triu(1)[None, None]
            rotary = text.rotary_emb(hidden, positions)
            hidden = layer(hidden, attention_mask=causal, position_embeddings=rotary, position_ids=None)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        for due in waiting:
            drop(due)
        return hf_model.lm_head(text.norm(hidden))[0, -1], kept, rows


def last_row(
    text: Any, number: int, rotary: bool, hidden: torch.Tensor, positions: torch.Tensor, last: torch.Tensor
) -> torch.Tensor:
    """Attention of the prompt's last row to every row `[T]` in a layer, mean over heads; 0 to what comes behind it."""
    layer = text.layers[number]
    x = layer.input_layernorm(hidden)
    attention = layer.self_attn
    q, k = (
        project(x).view(1, x.shape[1], -1, attention.head_dim).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj)
    )
    if rotary:
        q, k = apply_rotary_pos_emb(q, k, *text.rotary_emb(hidden, positions))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    at = int(last.nonzero())
    logits = (q[0, :, at : at + 1] @ k[0, :, : at + 1].transpose(1, 2))[:, 0] / attention.head_dim**0.5
    weights = torch.zeros(x.shape[1])
    weights[: at + 1] = logits.float().softmax(-1).mean(0)
    return weights

# SPDX-License-Identifier: Apache-2.0
"""Hugging Face inputs → packed batch: unpadding, checks, and multimodal rotary positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.models.qwen2_5_vl.config import ModelConfig
from glimpse_runtime.models.qwen2_5_vl.layout import Grid
from glimpse_runtime.packing import PackedBatch, Picture


def read_grids(
    name: str, grids: torch.Tensor | None, pixels: torch.Tensor | None, config: ModelConfig
) -> list[Grid]:
    """Check `[images, 3]` grids against their `[patches, patch_dim]` pixels; return them as tuples."""
    vision = config.vision
    if grids is None or pixels is None:
        if (grids is None) != (pixels is None):
            raise GlimpseError(f"pixel values and grids of {name}s come together: found only one of the two")
        return []
    if grids.ndim != 2 or grids.shape[1] != 3:
        raise GlimpseError(f"{name}_grid_thw: expected shape [{name}s, 3], found {list(grids.shape)}")
    found = [(int(t), int(h), int(w)) for t, h, w in grids.tolist()]
    for t, h, w in found:
        if min(t, h, w) < 1 or h % vision.merge_size or w % vision.merge_size:
            raise GlimpseError(
                f"{name}_grid_thw: expected positive sizes with height and width multiples of {vision.merge_size}, "
                f"found {(t, h, w)}"
            )
    patches = sum(t * h * w for t, h, w in found)
    if pixels.ndim != 2 or tuple(pixels.shape) != (patches, vision.patch_dim):
        raise GlimpseError(
            f"pixel values of the {name}s: expected [{patches}, {vision.patch_dim}] for the grids {found}, "
            f"found {list(pixels.shape)}"
        )
    return found


def pack(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    image_grids: Sequence[Grid],
    video_grids: Sequence[Grid],
    config: ModelConfig,
    *,
    seconds_per_grid: Sequence[float] | None = None,
    probe_length: int = 0,
    device: torch.device,
) -> PackedBatch:
    """Pack `input_ids [B, L]` (either padding side) and append `probe_length` learned rows where there are pictures.

    Positions follow Qwen2.5-VL (arXiv 2502.13923, section 2.1.3): text advances all three axes together; a picture's
    tokens share the position before them plus their frame, row and column. Probe rows continue after the last prompt
    token, one position each.

    Raises:
        GlimpseError: shapes disagree, a row is empty, image tokens and grids do not match, or a prompt is longer
            than the model's context.
    """
    ids, rows = _unpad(input_ids, attention_mask)
    merge = config.vision.merge_size
    seconds = [1.0] * len(video_grids) if seconds_per_grid is None else [float(s) for s in seconds_per_grid]
    if len(seconds) != len(video_grids):
        raise GlimpseError(f"second_per_grid_ts: expected {len(video_grids)} values, found {len(seconds)}")
    queues = {"image": list(enumerate(image_grids)), "video": list(enumerate(video_grids))}
    token_of = {config.image_token_id: "image", config.video_token_id: "video"}
    # Rows of the tower's output: all images come first, then all videos.
    sizes = [t * (h // merge) * (w // merge) for t, h, w in (*image_grids, *video_grids)]
    tower_start = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    positions: list[np.ndarray] = []
    next_positions: list[int] = []
    packed_ids: list[np.ndarray] = []
    lengths: list[int] = []
    visual_rows: list[np.ndarray] = []
    visual_order: list[np.ndarray] = []
    pictures: list[Picture] = []
    start = visual = 0
    for row, tokens in enumerate(rows):
        if len(tokens) > config.text.max_positions:
            raise GlimpseError(
                f"row {row}: expected at most {config.text.max_positions} prompt tokens (the model's context), "
                f"found {len(tokens)}"
            )
        kinds = np.zeros(len(tokens), dtype=np.int8)
        for number, token in enumerate(token_of, start=1):
            kinds[tokens == token] = number
        at, position, index = 0, 0, 0
        own: list[np.ndarray] = []
        while at < len(tokens):
            if kinds[at] == 0:
                stop = at + int(np.argmax(kinds[at:] != 0)) if (kinds[at:] != 0).any() else len(tokens)
                own.append(np.broadcast_to(np.arange(stop - at) + position, (3, stop - at)))
                position += stop - at
                at = stop
                continue
            kind = token_of[int(tokens[at])]
            if not queues[kind]:
                raise GlimpseError(
                    f"row {row}: more {kind} tokens in input_ids than {kind} grids account for"
                )
            number, (t, h, w) = queues[kind].pop(0)
            mh, mw = h // merge, w // merge
            count = t * mh * mw
            run = kinds[at : at + count]
            if len(run) < count or (run != kinds[at]).any():
                raise GlimpseError(
                    f"row {row}: {kind} {number} has grid {(t, h, w)}, that is {count} {kind} tokens; "
                    f"found {int((run == kinds[at]).sum())} in a row in input_ids"
                )
            interval = config.vision.tokens_per_second * seconds[number] if kind == "video" else 1.0
            frame, y, x = np.unravel_index(np.arange(count), (t, mh, mw))
            own.append(np.stack([(frame * interval).astype(np.int64), y, x]) + position)
            visual_rows.append(start + at + np.arange(count))
            tower = tower_start[number + (len(image_grids) if kind == "video" else 0)]
            visual_order.append(tower + np.arange(count))
            for f in range(t):
                pictures.append(Picture(row, index, kind, f, mh, mw, visual + f * mh * mw))
            visual += count
            index += 1
            position += max(mh, mw)
            at += count
        text_positions = np.concatenate(own, axis=1)
        following = int(text_positions.max()) + 1
        next_positions.append(following)
        probes = probe_length if index else 0
        if probes:
            after = int(text_positions[2, -1]) + 1
            own.append(np.broadcast_to(np.arange(probes) + after, (3, probes)))
        positions += own
        packed_ids += [tokens, np.zeros(probes, dtype=np.int64)]
        lengths.append(len(tokens) + probes)
        start += len(tokens) + probes
    for kind, left in queues.items():
        if left:
            raise GlimpseError(
                f"{kind} grids: {len(left)} of {len(image_grids if kind == 'image' else video_grids)} have no "
                f"{kind} tokens in input_ids"
            )

    def tensor(parts: Sequence[np.ndarray], axis: int = 0) -> torch.Tensor:
        joined = np.concatenate(parts, axis=axis) if parts else np.zeros(0, dtype=np.int64)
        return torch.from_numpy(np.ascontiguousarray(joined, dtype=np.int64)).to(device)

    return PackedBatch(
        ids=tensor(packed_ids),
        lengths=tuple(lengths),
        prompt_lengths=tuple(len(tokens) for tokens in rows),
        probe_length=probe_length,
        positions=tensor(positions, axis=1),
        next_positions=torch.tensor(next_positions, dtype=torch.int64, device=device),
        visual_rows=tensor(visual_rows),
        visual_order=tensor(visual_order),
        pictures=tuple(pictures),
    )


def _unpad(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[np.ndarray, list[np.ndarray]]:
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        raise GlimpseError(
            f"input_ids: expected an integer tensor [batch, length], found {_describe(input_ids)}"
        )
    if input_ids.shape[0] == 0:
        raise GlimpseError("input_ids: expected at least one row, found an empty batch")
    ids = input_ids.cpu().numpy().astype(np.int64)
    if attention_mask is None:
        mask = np.ones_like(ids, dtype=bool)
    else:
        if tuple(attention_mask.shape) != tuple(input_ids.shape):
            raise GlimpseError(
                f"attention_mask: expected the shape of input_ids {list(input_ids.shape)}, "
                f"found {list(attention_mask.shape)}"
            )
        mask = attention_mask.cpu().numpy() != 0
    rows = [row[keep] for row, keep in zip(ids, mask, strict=True)]
    for number, row in enumerate(rows):
        if len(row) == 0:
            raise GlimpseError(f"row {number}: expected at least one prompt token, found only padding")
    return ids, rows


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__

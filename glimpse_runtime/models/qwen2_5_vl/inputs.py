# SPDX-License-Identifier: Apache-2.0
"""Hugging Face inputs → packed batch: unpadding, checks, and multimodal rotary positions."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

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
    for what, value in ((f"{name}_grid_thw", grids), (f"pixel values of the {name}s", pixels)):
        if not isinstance(value, torch.Tensor):
            raise GlimpseError(f"{what}: expected a tensor, found {type(value).__name__}")
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


@dataclass(frozen=True)
class _Visual:
    """An image or video that waits for its tokens in the prompts."""

    kind: str
    number: int
    grid: Grid
    merged: Grid
    tower_start: int
    interval: float

    @property
    def tokens(self) -> int:
        return math.prod(self.merged)


@dataclass(frozen=True)
class _Segment:
    """Tokens `start..stop` of a row: text, or all tokens of one image or video."""

    start: int
    stop: int
    visual: _Visual | None


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

    Probe rows continue after the last prompt token, one position each.

    Raises:
        GlimpseError: shapes disagree, a row is empty, image tokens and grids do not match, or a prompt is longer
            than the model's context.
    """
    rows = _unpad(input_ids, attention_mask)
    waiting = _visuals(image_grids, video_grids, seconds_per_grid, config)
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    next_positions: list[np.ndarray] = []
    lengths: list[int] = []
    visual_rows: list[np.ndarray] = []
    visual_order: list[np.ndarray] = []
    pictures: list[Picture] = []
    start = 0
    for row, tokens in enumerate(rows):
        if len(tokens) > config.text.max_positions:
            raise GlimpseError(
                f"row {row}: expected at most {config.text.max_positions} prompt tokens (the model's context), "
                f"found {len(tokens)}"
            )
        if tokens.min() < 0 or tokens.max() >= config.text.vocab_size:
            raise GlimpseError(
                f"row {row}: expected token ids from 0 to {config.text.vocab_size - 1}, "
                f"found {int(tokens.min())} to {int(tokens.max())}"
            )
        segments = _segments(tokens, row, waiting, config)
        visuals = [segment for segment in segments if segment.visual is not None]
        own = _positions(segments)
        probes = probe_length if visuals else 0
        after = int(own[2, -1]) + 1
        ids += [tokens, np.zeros(probes, dtype=np.int64)]
        positions += [own, np.broadcast_to(np.arange(after, after + probes), (3, probes))]
        next_positions.append(own[:, -1] + 1)
        for index, segment in enumerate(visuals):
            visual = segment.visual
            assert visual is not None
            frames, height, width = visual.merged
            first = sum(map(len, visual_rows))
            for frame in range(frames):
                at = first + frame * height * width
                pictures.append(Picture(row, index, visual.kind, frame, height, width, at))
            visual_rows.append(start + np.arange(segment.start, segment.stop))
            visual_order.append(visual.tower_start + np.arange(visual.tokens))
        lengths.append(len(tokens) + probes)
        start += lengths[-1]
    for kind, left in waiting.items():
        if left:
            raise GlimpseError(
                f"{kind} grids: {len(left)} more than the {kind} tokens in input_ids account for"
            )

    nothing = np.zeros(0, dtype=np.int64)
    return PackedBatch.build(
        ids=np.concatenate(ids),
        positions=np.concatenate(positions, axis=1),
        next_positions=np.stack(next_positions, axis=1),
        visual_rows=np.concatenate([nothing, *visual_rows]),
        visual_order=np.concatenate([nothing, *visual_order]),
        lengths=lengths,
        prompt_lengths=[len(tokens) for tokens in rows],
        probe_length=probe_length,
        pictures=pictures,
        device=device,
    )


def _visuals(
    images: Sequence[Grid], videos: Sequence[Grid], seconds: Sequence[float] | None, config: ModelConfig
) -> dict[str, deque[_Visual]]:
    """Images and videos in the order in which prompts use them; the tower gives all images, then all videos."""
    if seconds is not None and len(seconds) != len(videos):
        raise GlimpseError(f"second_per_grid_ts: expected {len(videos)} values, found {len(seconds)}")
    merge = config.vision.merge_size
    waiting: dict[str, deque[_Visual]] = {"image": deque(), "video": deque()}
    tower = 0
    for kind, grids in (("image", images), ("video", videos)):
        for number, (t, h, w) in enumerate(grids):
            # Frames of a video are `interval` positions apart; a still image has one frame.
            interval = config.vision.tokens_per_second * (seconds[number] if seconds else 1.0)
            merged = (t, h // merge, w // merge)
            waiting[kind].append(
                _Visual(kind, number, (t, h, w), merged, tower, interval if kind == "video" else 1.0)
            )
            tower += math.prod(merged)
    return waiting


def _segments(
    tokens: np.ndarray, row: int, waiting: dict[str, deque[_Visual]], config: ModelConfig
) -> list[_Segment]:
    """Split a row at its images and videos, taking each from `waiting`."""
    kinds = {config.image_token_id: "image", config.video_token_id: "video"}
    visual_at = np.flatnonzero(np.isin(tokens, list(kinds)))
    segments: list[_Segment] = []
    at = 0
    while at < len(tokens):
        kind = kinds.get(int(tokens[at]))
        if kind is None:
            following = visual_at[visual_at >= at]
            stop = int(following[0]) if len(following) else len(tokens)
            segments.append(_Segment(at, stop, None))
        else:
            if not waiting[kind]:
                raise GlimpseError(
                    f"row {row}: more {kind} tokens in input_ids than {kind} grids account for"
                )
            visual = waiting[kind].popleft()
            stop = at + visual.tokens
            other = np.flatnonzero(tokens[at:stop] != tokens[at])
            found = int(other[0]) if len(other) else len(tokens[at:stop])
            if found < visual.tokens:
                raise GlimpseError(
                    f"row {row}: {kind} {visual.number} has grid {visual.grid}, that is {visual.tokens} {kind} "
                    f"tokens; found {found} in a row in input_ids"
                )
            segments.append(_Segment(at, stop, visual))
        at = stop
    return segments


def _positions(segments: Sequence[_Segment]) -> np.ndarray:
    """Multimodal rotary positions `[3, tokens]` (Qwen2.5-VL report, arXiv 2502.13923, section 2.1.3).

    Text advances all three axes together; a picture's tokens share the position before them plus their frame, row and
    column, and text goes on behind the picture's longer side.
    """
    parts: list[np.ndarray] = []
    position = 0
    for segment in segments:
        if segment.visual is None:
            count = segment.stop - segment.start
            parts.append(np.broadcast_to(np.arange(position, position + count), (3, count)))
            position += count
        else:
            _, height, width = segment.visual.merged
            t, y, x = np.unravel_index(np.arange(segment.visual.tokens), segment.visual.merged)
            # In float32, like the recorded positions of the family: the product decides where a frame falls.
            t = (t.astype(np.float32) * np.float32(segment.visual.interval)).astype(np.int64)
            parts.append(np.stack([t, y, x]) + position)
            position += max(height, width)
    return np.concatenate(parts, axis=1)


def check_ids(input_ids: object) -> torch.Tensor:
    """`input_ids` as the integer tensor `[B, L]` it must be."""
    if not isinstance(input_ids, torch.Tensor):
        raise GlimpseError(
            f"input_ids: expected an integer tensor [batch, length], found {type(input_ids).__name__}"
        )
    if input_ids.ndim != 2 or input_ids.is_floating_point() or input_ids.shape[0] == 0:
        found = f"{input_ids.dtype} {list(input_ids.shape)}"
        raise GlimpseError(f"input_ids: expected an integer tensor [batch, length], found {found}")
    return input_ids


def _unpad(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[np.ndarray]:
    ids = input_ids.cpu().numpy().astype(np.int64)
    if attention_mask is None:
        mask = np.ones_like(ids, dtype=bool)
    else:
        if not isinstance(attention_mask, torch.Tensor):
            raise GlimpseError(f"attention_mask: expected a tensor, found {type(attention_mask).__name__}")
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
    return rows

# SPDX-License-Identifier: Apache-2.0
"""The packed form of a batch: all sequences end to end, no padding, and where everything lies in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from glimpse_runtime.uploads import upload_together


@dataclass(frozen=True)
class Picture:
    """One image, or one temporal slice of a video, inside a batch.

    Attributes:
        row: sequence of the batch.
        index: number of the image or video inside its sequence, in prompt order.
        kind: "image" or "video".
        frame: temporal slice (0 for images).
        height, width: merged grid.
        start: offset of its first token among the batch's visual tokens.
        left: tokens that earlier stages left of it; None: all.
    """

    row: int
    index: int
    kind: str
    frame: int
    height: int
    width: int
    start: int
    left: int | None = None

    @property
    def size(self) -> int:
        """Tokens of the whole picture."""
        return self.height * self.width

    @property
    def tokens(self) -> int:
        """Tokens that are there."""
        return self.size if self.left is None else self.left

    @property
    def stop(self) -> int:
        return self.start + self.tokens


@dataclass(frozen=True)
class Prompt:
    """What a budget that depends on the prompt may look at.

    Attributes:
        ids: its token ids, pictures included.
        grids: merged grid `(height, width)` of each picture (video slice).
    """

    ids: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class PackedBatch:
    """A batch on its way into the model. T packed rows, N visual tokens, B sequences.

    Where everything lies is known on the host beforehand; `build` brings it to the device by one copy.

    Attributes:
        lengths: rows of each sequence, probe rows included.
        prompt_lengths: prompt tokens of each sequence.
        probe_length: learned rows appended to every sequence that carries pictures.
        pictures: every image and video slice, in prompt order.
        probed: sequences that carry probe rows.
        ending: numbers of the pictures with which a prompt ends: the next token is predicted from their last one, which cannot go.
        prompts: token ids of each prompt, on the host, whatever was dropped since.
        ids: `[T]` int64 token ids; probe rows hold 0.
        positions: `[3, T]` int64 multimodal rotary positions.
        next_positions: `[3, B]` int64 rotary position of the first generated token: that of the last prompt token + 1.
        visual_rows: `[N]` int64 packed row of each visual token, in prompt order.
        visual_order: `[N]` int64 row of the vision tower's output for each visual token.
        cu_seqlens: `[B + 1]` int32 first packed row of each sequence, and the total.
        cu_probed: `[B + 1]` int32 offsets of one row for each probed sequence and none for the others.
        probe_rows: `[len(probed), probe_length]` int64 packed rows of the probes.
        token_rows: `visual_rows` as int32.
        tower_rows: `[N]` int32 packed row of each row of the vision tower's output.
        tower_probe: `[N]` int32 number, among the probed sequences, of the one that holds each row of the tower's output.
        always_kept: `[T]` bool: rows that no selection removes (prompt text).
        ratios: what budgets that depend on the prompt gave, by the identity of the callable, and row.
        token_ids: `[N]` int64 number of each visual token among those of whole pictures; None: all are there.
    """

    lengths: tuple[int, ...]
    prompt_lengths: tuple[int, ...]
    probe_length: int
    pictures: tuple[Picture, ...]
    probed: tuple[int, ...]
    ending: tuple[int, ...]
    prompts: tuple[np.ndarray, ...]
    ids: torch.Tensor
    positions: torch.Tensor
    next_positions: torch.Tensor
    visual_rows: torch.Tensor
    visual_order: torch.Tensor
    cu_seqlens: torch.Tensor
    cu_probed: torch.Tensor
    probe_rows: torch.Tensor
    token_rows: torch.Tensor
    tower_rows: torch.Tensor
    tower_probe: torch.Tensor
    always_kept: torch.Tensor
    token_ids: torch.Tensor | None = None
    ratios: dict[tuple[int, int], float] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        *,
        ids: np.ndarray,
        positions: np.ndarray,
        next_positions: np.ndarray,
        visual_rows: np.ndarray,
        visual_order: np.ndarray,
        lengths: Sequence[int],
        prompt_lengths: Sequence[int],
        probe_length: int,
        pictures: Sequence[Picture],
        device: torch.device,
    ) -> PackedBatch:
        """The attributes of these names as arrays of the host; the rest follows from them."""
        starts = np.concatenate([[0], np.cumsum(lengths)])
        ends = starts[:-1] + np.asarray(prompt_lengths)
        probed = np.flatnonzero(np.asarray(lengths) > np.asarray(prompt_lengths))
        probe_rows = ends[probed][:, None] + np.arange(probe_length)
        numbers = np.zeros(len(lengths), dtype=np.int32)
        numbers[probed] = np.arange(len(probed))
        own = [np.full(p.tokens, numbers[p.row]) for p in pictures]
        tower_rows, tower_probe = np.empty_like(visual_rows), np.empty(len(visual_rows), dtype=np.int32)
        tower_rows[visual_order] = visual_rows
        tower_probe[visual_order] = np.concatenate(own) if own else 0
        kept = np.ones(len(ids), dtype=bool)
        kept[visual_rows] = False
        kept[probe_rows] = False
        one_each = np.isin(np.arange(len(lengths)), probed)
        on_device = {
            "ids": (ids, np.int64),
            "positions": (positions, np.int64),
            "next_positions": (next_positions, np.int64),
            "visual_rows": (visual_rows, np.int64),
            "visual_order": (visual_order, np.int64),
            "cu_seqlens": (starts, np.int32),
            "cu_probed": (np.concatenate([[0], np.cumsum(one_each)]), np.int32),
            "probe_rows": (probe_rows, np.int64),
            "token_rows": (visual_rows, np.int32),
            "tower_rows": (tower_rows, np.int32),
            "tower_probe": (tower_probe, np.int32),
            "always_kept": (kept, np.bool_),
        }
        host = [torch.from_numpy(np.ascontiguousarray(a, dtype=kind)) for a, kind in on_device.values()]
        sent: dict[str, Any] = dict(zip(on_device, upload_together(host, device), strict=True))
        return cls(
            lengths=tuple(lengths),
            prompt_lengths=tuple(prompt_lengths),
            probe_length=probe_length,
            pictures=tuple(pictures),
            probed=tuple(probed.tolist()),
            ending=tuple(n for n, p in enumerate(pictures) if visual_rows[p.stop - 1] == ends[p.row] - 1),
            prompts=tuple(ids[start:end] for start, end in zip(starts[:-1], ends, strict=True)),
            **sent,
        )

    @property
    def device(self) -> torch.device:
        return self.ids.device

    @property
    def num_rows(self) -> int:
        return sum(self.lengths)

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def num_visual(self) -> int:
        return self.visual_rows.shape[0]

    @property
    def picture_bounds(self) -> torch.Tensor:
        """`[P + 1]` int32 on the host: first visual token of each picture, and the number of all."""
        return torch.tensor([0, *(p.stop for p in self.pictures)], dtype=torch.int32, device="cpu")

    @property
    def last_visual(self) -> tuple[int, ...]:
        """Visual tokens with which a prompt ends."""
        return tuple(self.pictures[number].stop - 1 for number in self.ending)

    def prompt(self, row: int) -> Prompt:
        """A sequence, for budgets that depend on it."""
        grids = tuple((p.height, p.width) for p in self.pictures if p.row == row)
        return Prompt(tuple(self.prompts[row].tolist()), grids)


def rows_and_sequences(cu_seqlens: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`[rows]` int32 number of each packed row, and the sequence that it is in; behind the last one: the last."""
    row = torch.arange(rows, dtype=torch.int32, device=cu_seqlens.device)
    return row, torch.bucketize(row, cu_seqlens[1:], right=True).clamp_(max=cu_seqlens.shape[0] - 2)

# SPDX-License-Identifier: Apache-2.0
"""The packed form of a batch: all sequences end to end, no padding, and where everything lies in it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch


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
    """

    row: int
    index: int
    kind: str
    frame: int
    height: int
    width: int
    start: int

    @property
    def tokens(self) -> int:
        return self.height * self.width

    @property
    def stop(self) -> int:
        return self.start + self.tokens


@dataclass(frozen=True)
class PackedBatch:
    """A batch on its way into the model. T packed rows, N visual tokens, B sequences.

    Attributes:
        ids: `[T]` int64 token ids; probe rows hold 0.
        lengths: rows of each sequence, probe rows included.
        probe_length: learned rows appended to every sequence that carries pictures.
        positions: `[3, T]` int64 multimodal rotary positions.
        next_positions: `[3, B]` int64 rotary position of the first generated token: that of the last prompt token + 1.
        visual_rows: `[N]` int64 packed row of each visual token, in prompt order.
        visual_order: `[N]` int64 row of the vision tower's output for each visual token.
        pictures: every image and video slice, in prompt order.
        prompt_lengths: prompt tokens of each sequence.
    """

    ids: torch.Tensor
    lengths: tuple[int, ...]
    prompt_lengths: tuple[int, ...]
    probe_length: int
    positions: torch.Tensor
    next_positions: torch.Tensor
    visual_rows: torch.Tensor
    visual_order: torch.Tensor
    pictures: tuple[Picture, ...]

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

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First packed row of each sequence, and the total."""
        return tuple(np.concatenate([[0], np.cumsum(self.lengths)]).tolist())

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """`[B + 1]` int32 on the device."""
        return torch.tensor(self.starts, dtype=torch.int32, device=self.device)

    @cached_property
    def probed(self) -> tuple[int, ...]:
        """Sequences that carry probe rows."""
        if not self.probe_length:
            return ()
        return tuple(
            b for b, (n, p) in enumerate(zip(self.lengths, self.prompt_lengths, strict=True)) if n > p
        )

    @cached_property
    def probe_rows(self) -> torch.Tensor:
        """`[len(probed), probe_length]` int64 packed rows of the probes."""
        first = [self.starts[b + 1] - self.probe_length for b in self.probed]
        offsets = torch.arange(self.probe_length)
        return (torch.tensor(first, dtype=torch.int64)[:, None] + offsets).to(self.device)

    @cached_property
    def tower_rows(self) -> torch.Tensor:
        """`[N]` int32 packed row of each row of the vision tower's output."""
        rows = torch.empty_like(self.visual_rows)
        return rows.index_copy_(0, self.visual_order, self.visual_rows).to(torch.int32)

    @cached_property
    def tower_probe(self) -> torch.Tensor:
        """`[N]` int32 number, among the probed sequences, of the one that holds each row of the tower's output."""
        number = {row: i for i, row in enumerate(self.probed)}
        own = torch.tensor([number[p.row] for p in self.pictures], dtype=torch.int32)
        counts = torch.tensor([p.tokens for p in self.pictures], dtype=torch.int64)
        by_prompt = own.repeat_interleave(counts).to(self.device)
        return torch.empty_like(by_prompt).index_copy_(0, self.visual_order, by_prompt)

    @cached_property
    def last_visual(self) -> tuple[int, ...]:
        """Visual tokens with which a prompt ends: the next token is predicted from them, so they cannot go."""
        ends = {self.starts[b] + n - 1 for b, n in enumerate(self.prompt_lengths)}
        return tuple(n for n, row in enumerate(self.visual_rows.tolist()) if row in ends)

    @cached_property
    def always_kept(self) -> torch.Tensor:
        """`[T]` bool: rows that no selection removes (prompt text)."""
        keep = torch.ones(self.num_rows, dtype=torch.bool)
        for b in self.probed:
            keep[self.starts[b + 1] - self.probe_length : self.starts[b + 1]] = False
        keep = keep.to(self.device)
        return keep.index_fill_(0, self.visual_rows, False)


def cumulative(lengths: torch.Tensor) -> torch.Tensor:
    """`[B]` lengths → `[B + 1]` int32 offsets, without leaving the device."""
    total = lengths.new_zeros(lengths.shape[0] + 1, dtype=torch.int32)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=total[1:])
    return total

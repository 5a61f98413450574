# SPDX-License-Identifier: Apache-2.0
"""What pruning did to each picture, and what a generation gives back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from glimpse_runtime.packing import PackedBatch
from glimpse_runtime.prefill import Prefill
from glimpse_runtime.stages.outcome import StageOutcome
from glimpse_runtime.timings import Timings


@dataclass(frozen=True, eq=False)
class PicturePruning:
    """One image, or one temporal slice of a video.

    Attributes:
        row, image, frame: sequence of the batch, number of the image or video in its prompt, temporal slice.
        kind: "image" or "video".
        grid: merged grid `(height, width)`.
        keep: `[height, width]` bool, true where the visual token stayed.
        logits: `[height, width]` fp32 importance by which the last stage selected (GlimpsePrune: before the sigmoid), NaN where a
            token was gone before; None if it went by something else.
    """

    row: int
    image: int
    frame: int
    kind: str
    grid: tuple[int, int]
    keep: torch.Tensor
    logits: torch.Tensor | None

    @cached_property
    def kept(self) -> int:
        """Visual tokens that stayed."""
        return int(self.keep.sum())

    @property
    def total(self) -> int:
        """Visual tokens of the picture."""
        return self.grid[0] * self.grid[1]


class PruningReport(Sequence[PicturePruning]):
    """One entry a picture, in prompt order: what the last stage left of it.

    Attributes:
        stages: what each stage of the plan left, in their order.
    """

    def __init__(self, pictures: Sequence[PicturePruning], stages: Sequence[StageOutcome] = ()) -> None:
        self._pictures = tuple(pictures)
        self.stages = tuple(stages)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self._pictures[index]

    def __len__(self) -> int:
        return len(self._pictures)

    def __iter__(self) -> Iterator[PicturePruning]:
        return iter(self._pictures)

    @property
    def kept(self) -> int:
        """Visual tokens that stayed, over all pictures."""
        return sum(p.kept for p in self)

    @property
    def total(self) -> int:
        """Visual tokens of all pictures."""
        return sum(p.total for p in self)

    @classmethod
    def of(
        cls,
        batch: PackedBatch,
        keep: torch.Tensor,
        logits: torch.Tensor | None,
        stages: Sequence[StageOutcome] = (),
    ) -> PruningReport:
        """From `keep [N]` bool and `logits [N]` fp32 in prompt order."""
        return cls(
            [
                PicturePruning(
                    row=p.row,
                    image=p.index,
                    frame=p.frame,
                    kind=p.kind,
                    grid=(p.height, p.width),
                    keep=keep[p.start : p.stop].view(p.height, p.width),
                    logits=None if logits is None else logits[p.start : p.stop].view(p.height, p.width),
                )
                for p in batch.pictures
            ],
            stages,
        )

    def __repr__(self) -> str:
        return f"PruningReport({len(self)} pictures, {self.kept} of {self.total} tokens kept)"


def report_of(prefill: Prefill) -> PruningReport | None:
    """What a finished prefill kept; None if nothing was pruned."""
    if not prefill.outcomes:
        return None
    last = prefill.outcomes[-1]
    return PruningReport.of(prefill.batch, last.keep, last.scores, prefill.outcomes)


@dataclass
class GlimpseGenerateOutput(GenerateDecoderOnlyOutput):
    """Hugging Face's output with what pruning did.

    Attributes:
        pruning: a `PruningReport`; None when nothing was pruned.
        timings: seconds of each phase.
    """

    pruning: PruningReport | None = None
    timings: Timings | None = None

# SPDX-License-Identifier: Apache-2.0
"""Batches: pictures of one size, each with several questions that see the picture but not each other.

Layout of a sequence: ``<|im_start|>user\\n<|vision_start|>`` + image + ``<|vision_end|>`` (the prefix), then blocks. A block is
one question with its answer, exactly the tokens of a chat about this picture alone; its positions start right after the prefix, and
its tokens attend to the prefix and to themselves. So one pass over the picture trains many questions in the form in which they will
be asked.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from glimpse_lab.world import (
    CELL,
    COLOURS,
    HELD_OUT_SEED,
    SHAPES,
    TASKS,
    Box,
    Question,
    Scene,
    ask,
    box_cells,
    caption,
    make_scene,
    render,
)

PREFIX = "<|im_start|>user\n<|vision_start|>"
TAIL = "<|im_end|>\n<|im_start|>assistant\n"
PREFIX_LENGTH = 5
"""Prefix positions besides the image tokens: four before, one after."""

CELL_WEIGHTS = (1.0, 1.0, 1.0, 1.0, 1.0, 4.0, 2.0)
CELL_CLASSES = (len(COLOURS) + 1, len(SHAPES) + 2, 37, 37, 3, 5, 3)
"""Classes of what a cell shows: colour, form, left and right character, size, the shape's place from left to right, and whether
more shapes follow (1) or not (2); 0 is nothing."""

TASK_WEIGHTS = {
    "number": 1.6, "word": 1.6, "only": 1.0, "colour": 0.6, "shape": 0.6, "biggest": 1.0, "colours": 1.4, "things": 1.4,
    "caption": 0.6,
}  # fmt: skip
TASK_NAMES = (*TASKS, "caption")


@dataclass
class Batch:
    """B pictures of ``rows x columns`` cells (N = rows * columns), T positions of blocks after the prefix.

    pixels uint8 [B, H, W, 3]; ids, labels, block, offset, task int64 [B, T] (label -100: nothing to learn; block -1: padding;
    offset: place in the block); region, evidence bool [B, T, N]: cells of the whole answer and of the next token, false
    where there is no target; cells int64 [B, N, 7]: classes per cell; last bool [B, T]: last prompt token of a block.
    more_pixels, more_cells: further pictures (of a size of their own) for the cell read-outs alone.
    """

    rows: int
    columns: int
    pixels: Tensor
    ids: Tensor
    labels: Tensor
    block: Tensor
    offset: Tensor
    task: Tensor
    region: Tensor
    evidence: Tensor
    cells: Tensor
    last: Tensor
    more_pixels: Tensor | None = None
    more_cells: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        return Batch(**{f.name: _move(getattr(self, f.name), device) for f in fields(self)})


def _move(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def cell_mask(boxes: list[Box], height: int, width: int) -> np.ndarray:
    """Boxes to a bool mask over cells, ``[rows * columns]`` in raster order."""
    columns = width // CELL
    mask = np.zeros((height // CELL) * columns, dtype=bool)
    for box in boxes:
        for row, column in box_cells(box, height, width):
            mask[row * columns + column] = True
    return mask


def cell_classes(scene: Scene) -> np.ndarray:
    """What each cell shows, int64 ``[N, 7]`` (see CELL_CLASSES)."""
    rows, columns = scene.grid
    out = np.zeros((rows * columns, len(CELL_CLASSES)), dtype=np.int64)
    names = sorted(COLOURS)
    for place, thing in enumerate(scene.things, 1):
        for r, c in box_cells(thing.box, scene.height, scene.width):
            size = 2 if thing.size == "big" else 1
            end = 2 if place == len(scene.things) else 1
            out[r * columns + c] = (
                names.index(thing.colour) + 1,
                SHAPES.index(thing.shape) + 1,
                0,
                0,
                size,
                place,
                end,
            )
    for plate in scene.plates:
        for r, c in box_cells(plate.box, scene.height, scene.width):
            out[r * columns + c, :2] = (names.index(plate.colour) + 1, len(SHAPES) + 1)
        for char, slot in zip(plate.text, plate.char_boxes, strict=True):
            middle = (slot[0] + slot[2]) // 2
            cell = (plate.centre_y // CELL) * columns + middle // CELL
            value = ord(char) - 48 + 1 if char.isdigit() else ord(char) - 65 + 11
            out[cell, 2 + (middle % CELL >= CELL // 2)] = value
    return out


class Encoder:
    """Turns questions into token blocks; remembers prompts, of which there are few."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._prompts: dict[str, list[int]] = {}
        self.prefix: list[int] = tokenizer.encode(PREFIX, add_special_tokens=False)
        self.image_id: int = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.vision_end_id: int = tokenizer.convert_tokens_to_ids("<|vision_end|>")
        self.end_id: int = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.pad_id: int = tokenizer.convert_tokens_to_ids("<|endoftext|>")
        if len(self.prefix) != PREFIX_LENGTH - 1:
            raise ValueError(
                f"the prefix should take {PREFIX_LENGTH - 1} tokens, the tokenizer gives {len(self.prefix)}"
            )

    def prompt(self, text: str) -> list[int]:
        if text not in self._prompts:
            self._prompts[text] = self._tokenizer.encode(text, add_special_tokens=False)
        return self._prompts[text]

    def block(self, question: Question, short: bool) -> tuple[list[int], int, list[Box | None]]:
        """Tokens (prompt + answer), the prompt's length, and for each answer token the box that shows it.

        ``short`` leaves out the chat format between question and answer.
        """
        prompt = self.prompt(question.question if short else question.question + TAIL)
        encoded = self._tokenizer._tokenizer.encode(question.answer, add_special_tokens=False)
        boxes: list[Box | None] = []
        for start, end in encoded.offsets:
            found = [box for s, e, box in question.evidence if s < end and start < e]
            boxes.append(found[0] if found else None)
        return prompt + encoded.ids, len(prompt), boxes


def make_batch(
    encoder: Encoder,
    first_seed: int,
    count: int,
    height: int,
    width: int,
    text_length: int,
    *,
    short_share: float = 0.0,
    captions: bool = True,
) -> Batch:
    """A batch of the scenes ``first_seed .. first_seed + count - 1``; the same arguments give the same batch."""
    rows, columns = height // CELL, width // CELL
    n = rows * columns
    rng = random.Random(f"batch {first_seed} {height} {width}")
    pixels = np.empty((count, height, width, 3), dtype=np.uint8)
    ids = np.full((count, text_length), encoder.pad_id, dtype=np.int64)
    labels = np.full((count, text_length), -100, dtype=np.int64)
    block = np.full((count, text_length), -1, dtype=np.int64)
    offset = np.zeros((count, text_length), dtype=np.int64)
    task = np.full((count, text_length), -1, dtype=np.int64)
    last = np.zeros((count, text_length), dtype=bool)
    region = np.zeros((count, text_length, n), dtype=bool)
    evidence = np.zeros((count, text_length, n), dtype=bool)
    cells = np.empty((count, n, len(CELL_CLASSES)), dtype=np.int64)
    for b in range(count):
        scene = make_scene(first_seed + b, height, width)
        pixels[b] = np.asarray(render(scene))
        cells[b] = cell_classes(scene)
        questions = ask(scene) + ([caption(scene)] if captions else [])
        questions.sort(key=lambda q: -(rng.random() ** (1 / TASK_WEIGHTS[q.task])))
        at, number = 0, 0
        for question in questions:
            tokens, start, boxes = encoder.block(question, rng.random() < short_share)
            size = len(tokens)
            if at + size > text_length:
                continue
            span = slice(at, at + size)
            ids[b, span], block[b, span], offset[b, span] = tokens, number, np.arange(size)
            task[b, span] = TASK_NAMES.index(question.task)
            first = at + start - 1
            labels[b, first : at + size] = [*tokens[start:], encoder.end_id]
            last[b, first] = True
            region[b, first : at + size] = cell_mask(list(question.boxes), height, width)
            for i, box in enumerate(boxes):
                if box is not None:
                    evidence[b, first + i] = cell_mask([box], height, width)
            at, number = at + size, number + 1
    t = torch.from_numpy
    return Batch(
        rows,
        columns,
        t(pixels),
        t(ids),
        t(labels),
        t(block),
        t(offset),
        t(task),
        t(region),
        t(evidence),
        t(cells),
        t(last),
    )


def batch_count(tokens: int, height: int, width: int, text_length: int) -> int:
    """Pictures in a batch of about ``tokens`` positions; a picture's patches weigh on it too."""
    n = (height // CELL) * (width // CELL)
    return max(4, round(tokens / (2 * n + PREFIX_LENGTH + text_length)))


class Schedule(torch.utils.data.Dataset):
    """Step number to batch, so that a resumed run sees what an uninterrupted one would have seen."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        seed: int,
        stages: list[tuple[int, Mapping[tuple[int, int], float]]],
        tokens: int,
        text_length: int,
        short_until: int = 0,
        more_patches: int = 0,
    ) -> None:
        self._encoder = Encoder(tokenizer)
        self._seed, self._stages, self._tokens, self._text_length = seed, stages, tokens, text_length
        self._short_until, self._more_patches = short_until, more_patches

    def __getitem__(self, step: int) -> Batch:
        rng = random.Random(f"step {self._seed} {step}")
        ends = accumulate(length for length, _ in self._stages)
        sizes = next(s for end, (_, s) in zip(ends, self._stages, strict=True) if step < end)
        height, width = rng.choices(list(sizes), list(sizes.values()))[0]
        count = batch_count(self._tokens, height, width, self._text_length)
        first = rng.randrange(HELD_OUT_SEED - count)
        short = 0.4 * max(0.0, 1 - step / self._short_until) if self._short_until else 0.0
        batch = make_batch(self._encoder, first, count, height, width, self._text_length, short_share=short)
        if not self._more_patches:
            return batch
        side = rng.choice((168, 224, 280))
        more = self._more_patches // (side // 14) ** 2
        first = rng.randrange(HELD_OUT_SEED - more)
        scenes = [make_scene(first + i, side, side) for i in range(more)]
        return replace(
            batch,
            more_pixels=torch.from_numpy(np.stack([np.asarray(render(s)) for s in scenes])),
            more_cells=torch.from_numpy(np.stack([cell_classes(s) for s in scenes])),
        )

    def __len__(self) -> int:
        return sum(length for length, _ in self._stages)

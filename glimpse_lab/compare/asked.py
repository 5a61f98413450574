# SPDX-License-Identifier: Apache-2.0
"""What is asked: held-out pictures with all of their questions, by seeds alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from glimpse_lab.evaluate import EVALUATION_SEED, prompt_of
from glimpse_lab.world import SIZES, Question, ask, make_scene, render

LARGE_SEED = EVALUATION_SEED + 500_000_000
"""First seed of the pictures on which time and memory are measured; nobody is asked to answer about them."""

AREA = 4096 * 28 * 28
"""No picture is made smaller than it is: the small model's processor would shrink those beyond the sizes it was trained on."""


@dataclass(frozen=True)
class Picture:
    """One scene.

    Attributes:
        height, width: in pixels. number: which of its size. seed: of its scene.
    """

    height: int
    width: int
    number: int
    seed: int

    @property
    def size(self) -> str:
        return f"{self.height}x{self.width}"

    @property
    def tokens(self) -> int:
        """Visual tokens."""
        return self.height // 28 * (self.width // 28)

    def questions(self) -> list[Question]:
        return ask(make_scene(self.seed, self.height, self.width))


def pictures(sizes: tuple[tuple[int, int], ...], count: int, seed: int = 0) -> Iterator[Picture]:
    """`count` pictures of each size; with seed 0 those of ``glimpse_lab.evaluate``. A size has the same ones whatever others are
    asked for.

    Args:
        sizes: of `SIZES`.
    """
    for number in range(count):  # all sizes early on: a run that is stopped has something of each
        for height, width in sizes:
            first = EVALUATION_SEED + 100_000 * SIZES.index((height, width)) + 10_000_000 * seed
            yield Picture(height, width, number, first + number)


def large(height: int, width: int) -> Picture:
    """A picture for measuring time and memory."""
    return Picture(height, width, 0, LARGE_SEED)


def inputs_of(processor: Any, picture: Picture, questions: list[Question]) -> dict[str, Any]:
    """What the model takes: one row a question."""
    drawn = render(make_scene(picture.seed, picture.height, picture.width))
    prompts = [prompt_of(processor, question) for question in questions]
    return dict(
        processor(
            text=prompts,
            images=[[drawn] for _ in questions],
            padding=True,
            return_tensors="pt",
            max_pixels=AREA,
        )
    )

# SPDX-License-Identifier: Apache-2.0
"""Scenes: what stands where in a picture. Drawing is ``render``'s business, asking is ``ask``'s.

A picture is a board of 28-pixel cells (one cell is one merged visual token of a model with patch 14 and merge 2). Shapes
stand somewhere inside one cell (small, medium) or inside 2 x 2 cells (big); plates are 2 cells wide, one cell high and
carry three or four characters. Positions and sizes vary by pixels inside the cells.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

CELL = 28
"""Side of a cell in pixels."""

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "green": (40, 150, 50),
    "blue": (40, 70, 215),
    "yellow": (240, 205, 30),
    "purple": (140, 45, 170),
    "orange": (240, 130, 25),
    "cyan": (50, 190, 210),
    "black": (25, 25, 25),
}
SIZES: tuple[tuple[int, int], ...] = (
    (168, 168), (168, 224), (224, 168), (224, 224), (168, 336), (280, 280), (336, 224), (224, 336),
    (336, 336), (448, 224), (224, 448), (392, 392), (448, 448),
)  # fmt: skip
"""Picture sizes (height, width) the shipped model is trained and measured on: 36 to 256 merged tokens."""

HELD_OUT_SEED = 1 << 40
"""Training uses seeds below this number only; every seed from here on is held out."""

DIGITS = "0123456789"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Box = tuple[int, int, int, int]
"""``(x1, y1, x2, y2)`` in pixels, right and bottom exclusive."""


@dataclass(frozen=True)
class Thing:
    """A coloured shape. ``size`` is "small", "medium" or "big"; ``rgb`` the colour as drawn."""

    shape: str
    colour: str
    size: str
    box: Box
    rgb: tuple[int, int, int]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Plate:
    """A coloured plate with text. ``char_boxes[i]`` is the slot of ``text[i]``; ``centre_y`` the text's middle line."""

    colour: str
    kind: str
    text: str
    box: Box
    char_boxes: tuple[Box, ...]
    centre_y: int
    font_size: int
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """Everything in a picture. ``things`` run from left to right, ``plates`` from top to bottom."""

    seed: int
    height: int
    width: int
    background: tuple[int, int, int]
    things: tuple[Thing, ...]
    plates: tuple[Plate, ...]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of cells."""
        return self.height // CELL, self.width // CELL


def box_cells(box: Box, height: int, width: int) -> list[tuple[int, int]]:
    """Cells ``(row, column)`` a box covers, by the training target's rule.

    With ``x1, x2`` as shares of the width and W columns: ``floor(x1 * W) .. min(floor(x2 * W), W - 1)``, rows alike. Done in
    integers. ``x2`` and ``y2`` are the last covered pixel here, so a box that ends at a cell's edge stays in that cell.
    """
    rows, columns = height // CELL, width // CELL
    x1, y1, x2, y2 = box[0], box[1], box[2] - 1, box[3] - 1
    c1, c2 = x1 * columns // width, min(x2 * columns // width, columns - 1)
    r1, r2 = y1 * rows // height, min(y2 * rows // height, rows - 1)
    return [(r, c) for r in range(r1, r2 + 1) for c in range(c1, c2 + 1)]


def _tint(rng: random.Random, rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    r, g, b = (min(255, max(0, v + rng.randint(-14, 14))) for v in rgb)
    return r, g, b


def _place(rng: random.Random, free: list[list[bool]], rows: int, columns: int) -> tuple[int, int] | None:
    """A random free block of cells, marked as taken; None if there is none."""
    spots = [
        (r, c)
        for r in range(len(free) - rows + 1)
        for c in range(len(free[0]) - columns + 1)
        if all(free[r + i][c + j] for i in range(rows) for j in range(columns))
    ]
    if not spots:
        return None
    r, c = rng.choice(spots)
    for i in range(rows):
        for j in range(columns):
            free[r + i][c + j] = False
    return r, c


def _thing(rng: random.Random, shape: str, colour: str, size: str, row: int, column: int) -> Thing:
    block = 2 * CELL if size == "big" else CELL
    low, high = {"small": (14, 18), "medium": (20, 26), "big": (42, 54)}[size]
    side = rng.randint(low, high)
    x = column * CELL + rng.randint(0, block - side)
    y = row * CELL + rng.randint(0, block - side)
    return Thing(shape, colour, size, (x, y, x + side, y + side), _tint(rng, COLOURS[colour]))


def _plate(rng: random.Random, colour: str, kind: str, row: int, column: int) -> Plate:
    text = "".join(rng.choice(DIGITS if kind == "number" else LETTERS) for _ in range(rng.choice((3, 4, 4))))
    pitch = CELL // 2
    x = column * CELL + (2 * CELL - pitch * len(text)) // 2 // pitch * pitch + rng.randint(-1, 1)
    x = min(max(x, column * CELL + 1), (column + 2) * CELL - pitch * len(text))
    top, bottom = row * CELL + rng.randint(0, 3), (row + 1) * CELL - rng.randint(0, 3)
    box = (column * CELL + rng.randint(0, 1), top, (column + 2) * CELL - rng.randint(0, 1), bottom)
    slots = tuple((x + i * pitch, top, min(x + (i + 1) * pitch, box[2]), bottom) for i in range(len(text)))
    return Plate(
        colour, kind, text, box, slots, (top + bottom) // 2, rng.randint(17, 20), _tint(rng, COLOURS[colour])
    )


def make_scene(seed: int, height: int, width: int) -> Scene:
    """The scene of a seed: the same seed and size always give the same scene.

    Two to four shapes of pairwise different colours and forms, in separate columns so that "from left to right" has one
    answer, at most one of them big; one to three plates of pairwise different colours in separate rows.

    Raises ValueError if a side is not a multiple of 28 or under 168.
    """
    for name, side in (("height", height), ("width", width)):
        if side % CELL or side < 6 * CELL:
            raise ValueError(f"{name} must be a multiple of {CELL} and at least {6 * CELL}, got {side}")
    rng = random.Random(f"scene {seed} {height} {width}")
    rows, columns = height // CELL, width // CELL
    background = tuple(rng.randint(222, 255) for _ in range(3))
    while True:
        free = [[True] * columns for _ in range(rows)]
        count = rng.randint(2, 4)
        shapes, colours = rng.sample(SHAPES, count), rng.sample(sorted(COLOURS), count)
        sizes = [rng.choice(("small", "medium", "medium")) for _ in range(count)]
        if rng.random() < 0.6:
            sizes[0] = "big"
        things: list[Thing] = []
        taken = [False] * columns
        for shape, colour, size in zip(shapes, colours, sizes, strict=True):
            span = 2 if size == "big" else 1
            open_columns = [[f and not taken[c] for c, f in enumerate(line)] for line in free]
            spot = _place(rng, open_columns, span, span)
            if spot is None:
                break
            for i in range(span):
                taken[spot[1] + i] = True
                for j in range(span):
                    free[spot[0] + i][spot[1] + j] = False
            things.append(_thing(rng, shape, colour, size, *spot))
        plates: list[Plate] = []
        plate_count = rng.randint(1, 3)
        for colour in rng.sample(sorted(COLOURS), plate_count):
            spot = _place(rng, free, 1, 2)
            if spot is None:
                break
            free[spot[0]] = [False] * columns
            plates.append(_plate(rng, colour, rng.choice(("number", "word")), *spot))
        if len(things) == count and len(plates) == plate_count:
            break
    things.sort(key=lambda t: t.box[0])
    plates.sort(key=lambda p: p.box[1])
    return Scene(seed, height, width, background, tuple(things), tuple(plates))  # type: ignore[arg-type]

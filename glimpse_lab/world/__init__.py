# SPDX-License-Identifier: Apache-2.0
"""A drawn world whose every fact is known: scenes, their pictures, and questions with answers and answer boxes."""

from glimpse_lab.world.ask import TASKS, Question, ask, caption
from glimpse_lab.world.render import render
from glimpse_lab.world.scene import (
    CELL,
    COLOURS,
    HELD_OUT_SEED,
    SHAPES,
    SIZES,
    Box,
    Plate,
    Scene,
    Thing,
    box_cells,
    make_scene,
)

__all__ = [
    "CELL",
    "COLOURS",
    "HELD_OUT_SEED",
    "SHAPES",
    "SIZES",
    "TASKS",
    "Box",
    "Plate",
    "Question",
    "Scene",
    "Thing",
    "ask",
    "box_cells",
    "caption",
    "make_scene",
    "render",
]

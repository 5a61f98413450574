# SPDX-License-Identifier: Apache-2.0
"""Questions about a scene, with the answer and, for every part of the answer, the box in which it can be seen."""

from __future__ import annotations

import random
from dataclasses import dataclass

from glimpse_lab.world.scene import Box, Plate, Scene, Thing

TASKS = ("number", "word", "only", "colour", "shape", "biggest", "colours", "things")
"""Question types. ``number``/``word``: text on a plate named by colour; ``only``: the one number or word of the picture;
``colours``/``things``: lists from left to right."""

_TEMPLATES: dict[str, tuple[str, ...]] = {
    "number": ("What number is on the {} plate?", "Read the number on the {} plate."),
    "word": ("What word is on the {} plate?", "Read the word on the {} plate."),
    "only": ("What is the {}?", "Read the {} in the picture."),
    "colour": ("What colour is the {}?", "Name the colour of the {}."),
    "shape": ("What shape is the {} thing?", "Name the shape of the {} thing."),
    "biggest": ("What is the biggest thing?", "Name the biggest thing."),
    "colours": ("List the colours from left to right.", "What are the colours from left to right?"),
    "things": ("List the things from left to right.", "What are the things from left to right?"),
}
_CAPTION = "Describe the picture."


@dataclass(frozen=True)
class Question:
    """``evidence``: for each part ``answer[start:end]`` the box that shows it, as ``(start, end, box)``."""

    task: str
    question: str
    answer: str
    evidence: tuple[tuple[int, int, Box], ...]
    boxes: tuple[Box, ...]
    """Everything one has to look at to answer: whole plates, whole shapes."""


class _Answer:
    """Collects an answer's text and its evidence."""

    def __init__(self) -> None:
        self.text = ""
        self.evidence: list[tuple[int, int, Box]] = []

    def put(self, text: str, box: Box | None = None) -> _Answer:
        if box is not None:
            self.evidence.append((len(self.text), len(self.text) + len(text), box))
        self.text += text
        return self

    def plate(self, plate: Plate) -> _Answer:
        for char, box in zip(plate.text, plate.char_boxes, strict=True):
            self.put(char, box)
        return self

    def thing(self, thing: Thing) -> _Answer:
        return self.put(thing.colour, thing.box).put(" ").put(thing.shape, thing.box)


def ask(scene: Scene) -> list[Question]:
    """Every question that has exactly one right answer in this scene; wording chosen by the scene's seed."""
    rng = random.Random(f"ask {scene.seed}")
    found: list[Question] = []

    def add(task: str, subject: str, answer: _Answer, boxes: list[Box]) -> None:
        question = rng.choice(_TEMPLATES[task]).format(subject)
        found.append(Question(task, question, answer.text, tuple(answer.evidence), tuple(boxes)))

    for plate in scene.plates:
        add(plate.kind, plate.colour, _Answer().plate(plate), [plate.box])
        if sum(p.kind == plate.kind for p in scene.plates) == 1:
            add("only", plate.kind, _Answer().plate(plate), [plate.box])
    for thing in scene.things:
        add("colour", thing.shape, _Answer().put(thing.colour, thing.box), [thing.box])
        add("shape", thing.colour, _Answer().put(thing.shape, thing.box), [thing.box])
        if thing.size == "big":
            add("biggest", "", _Answer().thing(thing), [thing.box])
    boxes = [thing.box for thing in scene.things]
    colours, things = _Answer(), _Answer()
    for i, thing in enumerate(scene.things):
        colours.put(", " if i else "").put(thing.colour, thing.box)
        things.put(", " if i else "").thing(thing)
    add("colours", "", colours, boxes)
    add("things", "", things, boxes)
    return found


def caption(scene: Scene) -> Question:
    """The whole scene as one answer: shapes from left to right, then plates from top to bottom."""
    answer = _Answer()
    for i, thing in enumerate(scene.things):
        answer.put(", " if i else "").thing(thing)
    for plate in scene.plates:
        answer.put(", ").put(plate.colour, plate.box).put(" plate ").plate(plate)
    boxes = tuple(x.box for x in (*scene.things, *scene.plates))
    return Question("caption", _CAPTION, answer.text, tuple(answer.evidence), boxes)


def corpus() -> list[str]:
    """Every sentence frame and word of the world, without its random strings: what the tokenizer learns from."""
    from glimpse_lab.world.scene import COLOURS, SHAPES

    lines = [_CAPTION]
    for templates in _TEMPLATES.values():
        for template in templates:
            for subject in (*COLOURS, *SHAPES, "number", "word"):
                lines.append(template.format(subject))
    for colour in COLOURS:
        for shape in SHAPES:
            lines.append(f"{colour} {shape}, {colour} {shape}, {colour} plate ")
            lines.append(f"{shape} {colour}")
    return lines

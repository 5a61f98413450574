# SPDX-License-Identifier: Apache-2.0
"""The drawn world: determinism, boxes against pixels, answers worked out again from the scene."""

from __future__ import annotations

import numpy as np
import pytest

from glimpse_lab.world import COLOURS, SIZES, ask, box_cells, caption, make_scene, render

SCENES = [(seed, *size) for seed, size in enumerate(SIZES)] + [(100 + seed, 224, 224) for seed in range(12)]


@pytest.mark.parametrize(("seed", "height", "width"), SCENES[:6])
def test_same_seed_same_everything(seed: int, height: int, width: int) -> None:
    a, b = make_scene(seed, height, width), make_scene(seed, height, width)
    assert a == b
    assert render(a).tobytes() == render(b).tobytes()
    assert ask(a) == ask(b)
    assert make_scene(seed + 1, height, width) != a


@pytest.mark.parametrize("size", [(160, 168), (168, 140), (170, 168)])
def test_odd_sides_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="multiple of 28"):
        make_scene(0, *size)


@pytest.mark.parametrize(("seed", "height", "width"), SCENES)
def test_boxes_hold_the_drawn_pixels(seed: int, height: int, width: int) -> None:
    scene = make_scene(seed, height, width)
    pixels = np.asarray(render(scene)).astype(int)
    assert pixels.shape == (height, width, 3)
    drawn = (pixels != np.array(scene.background)).any(-1)
    boxed = np.zeros_like(drawn)
    for x1, y1, x2, y2 in [x.box for x in (*scene.things, *scene.plates)]:
        assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
        inside = drawn[y1:y2, x1:x2]
        # Tight: ink reaches each edge of the box, but for a star's points, which stand on the box's inner circle.
        slack = 1 + round(0.11 * max(x2 - x1, y2 - y1))
        assert (
            inside[:slack].any()
            and inside[-slack:].any()
            and inside[:, :slack].any()
            and inside[:, -slack:].any()
        )
        boxed[y1:y2, x1:x2] = True
    assert not (drawn & ~boxed).any()
    for thing in scene.things:
        x1, y1, x2, y2 = thing.box
        colours = pixels[y1:y2, x1:x2].reshape(-1, 3)
        assert (colours == np.array(thing.rgb)).all(-1).mean() > 0.15
        nearest = min(COLOURS, key=lambda name: np.abs(np.array(COLOURS[name]) - np.array(thing.rgb)).sum())
        assert nearest == thing.colour


@pytest.mark.parametrize(("seed", "height", "width"), SCENES)
def test_characters_stand_in_their_slots(seed: int, height: int, width: int) -> None:
    scene = make_scene(seed, height, width)
    pixels = np.asarray(render(scene)).astype(int)
    for plate in scene.plates:
        assert len(plate.text) == len(plate.char_boxes)
        assert plate.text.isdigit() if plate.kind == "number" else plate.text.isupper()
        for x1, y1, x2, y2 in plate.char_boxes:
            assert plate.box[0] - 1 <= x1 < x2 <= plate.box[2] and plate.box[1] <= y1 < y2 <= plate.box[3]
            middle = pixels[y1 + 3 : y2 - 3, x1 + 2 : x2 - 2].reshape(-1, 3)
            assert (np.abs(middle - np.array(plate.rgb)).sum(-1) > 150).mean() > 0.08


@pytest.mark.parametrize(("seed", "height", "width"), SCENES)
def test_answers_follow_from_the_scene(seed: int, height: int, width: int) -> None:
    scene = make_scene(seed, height, width)
    ordered = sorted(scene.things, key=lambda t: (t.box[0] + t.box[2]) / 2)
    by_shape = {t.shape: t for t in scene.things}
    by_colour = {t.colour: t for t in scene.things}
    plates = {p.colour: p for p in scene.plates}
    assert len(by_shape) == len(by_colour) == len(scene.things) and len(plates) == len(scene.plates)
    largest = max(scene.things, key=lambda t: t.box[2] - t.box[0])
    seen = set()
    for q in ask(scene):
        seen.add(q.task)
        words = q.question.rstrip("?.").split()
        if q.task in ("number", "word"):
            plate = next(plates[w] for w in words if w in plates)
            assert q.answer == plate.text and q.boxes == (plate.box,) and plate.kind == q.task
        elif q.task == "only":
            kind = "number" if "number" in words else "word"
            (plate,) = [p for p in scene.plates if p.kind == kind]
            assert q.answer == plate.text and q.boxes == (plate.box,)
        elif q.task == "colour":
            thing = next(by_shape[w] for w in words if w in by_shape)
            assert q.answer == thing.colour and q.boxes == (thing.box,)
        elif q.task == "shape":
            thing = next(by_colour[w] for w in words if w in by_colour)
            assert q.answer == thing.shape and q.boxes == (thing.box,)
        elif q.task == "biggest":
            assert q.answer == f"{largest.colour} {largest.shape}" and q.boxes == (largest.box,)
        elif q.task == "colours":
            assert q.answer.split(", ") == [t.colour for t in ordered] and set(q.boxes) == {
                t.box for t in ordered
            }
        else:
            assert q.answer.split(", ") == [f"{t.colour} {t.shape}" for t in ordered]
        for start, end, box in q.evidence:
            assert q.answer[start:end].strip()
            assert any(
                b[0] - 1 <= box[0] and box[2] <= b[2] and b[1] <= box[1] and box[3] <= b[3] for b in q.boxes
            )
    assert {"colour", "shape", "colours", "things"} <= seen
    text = caption(scene).answer
    assert all(p.text in text for p in scene.plates) and all(t.name in text for t in scene.things)


def test_cells_follow_the_rule() -> None:
    # x1 = 30 / 280 of 10 columns -> floor(1.07) = 1; last pixel 83 -> floor(2.96) = 2; rows 0 .. 3.
    assert box_cells((30, 0, 84, 85), 280, 280) == [(r, c) for r in range(4) for c in (1, 2)]
    # The last column is never exceeded.
    assert box_cells((250, 250, 280, 280), 280, 280) == [(r, c) for r in (8, 9) for c in (8, 9)]


def test_what_must_be_seen_is_a_small_part_of_a_picture() -> None:
    shares = []
    for seed in range(40):
        scene = make_scene(seed, 224, 224)
        shares += [len({c for b in q.boxes for c in box_cells(b, 224, 224)}) / 64 for q in ask(scene)]
    assert sum(shares) / len(shares) < 0.12

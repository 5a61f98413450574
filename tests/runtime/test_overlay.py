# SPDX-License-Identifier: Apache-2.0
"""The lit picture: which pixels are bright, and which are dim."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.overlay import overlay, side_by_side


def centre(picture: Image.Image, row: int, column: int, rows: int, columns: int) -> tuple[int, int, int]:
    x = int((column + 0.5) * picture.width / columns)
    y = int((row + 0.5) * picture.height / rows)
    pixel = picture.getpixel((x, y))
    assert isinstance(pixel, tuple)
    return pixel  # type: ignore[return-value]


@pytest.mark.parametrize("size", [(560, 448), (100, 80), (501, 463)])
def test_kept_cells_shine_and_dropped_cells_do_not(size):
    blue = Image.new("RGB", size, (20, 60, 250))
    keep = torch.zeros(4, 5, dtype=torch.bool)
    kept = {(0, 0), (1, 2), (1, 3), (3, 4)}
    for row, column in kept:
        keep[row, column] = True
    lit = overlay(blue, keep)
    assert lit.width / lit.height == pytest.approx(size[0] / size[1]) and min(lit.size) >= 448
    for row in range(4):
        for column in range(5):
            pixel = centre(lit, row, column, 4, 5)
            if (row, column) in kept:
                assert pixel == (20, 60, 250)
            else:
                assert max(pixel) < 60 and len(set(pixel)) == 1  # dim and grey


def test_outline_surrounds_regions_not_cells():
    picture = Image.new("RGB", (560, 560), "black")
    keep = torch.zeros(2, 2, dtype=torch.bool)
    keep[0] = True
    lit = overlay(picture, keep)
    red, green, blue = lit.getpixel((140, 0))
    assert red > 200 and blue < 50  # top edge of the region
    assert lit.getpixel((280, 140)) == (0, 0, 0)  # between two kept neighbours
    assert lit.getpixel((140, 279)) == (red, green, blue)


def test_all_and_none(tmp_path):
    Image.new("RGB", (448, 448), (200, 100, 50)).save(tmp_path / "a.png")
    everything = overlay(tmp_path / "a.png", torch.ones(3, 3, dtype=torch.bool))
    assert centre(everything, 1, 1, 3, 3) == (200, 100, 50)
    nothing = overlay(tmp_path / "a.png", torch.zeros(3, 3, dtype=torch.bool))
    assert (
        all(low == high for low, high in nothing.convert("RGB").getextrema())
        and max(nothing.getextrema())[1] < 60
    )


def test_bad_masks_are_named():
    with pytest.raises(GlimpseError, match=r"\[rows, columns\], found shape \[6\]"):
        overlay(Image.new("RGB", (100, 100)), torch.ones(6, dtype=torch.bool))
    with pytest.raises(GlimpseError, match="at least one picture"):
        side_by_side()


def test_side_by_side_holds_both():
    sheet = side_by_side(Image.new("RGB", (10, 20), "red"), Image.new("RGB", (30, 40), "blue"), gap=5)
    assert (
        sheet.size == (45, 40)
        and sheet.getpixel((20, 20)) == (0, 0, 255)
        and sheet.getpixel((5, 20)) == (255, 0, 0)
    )

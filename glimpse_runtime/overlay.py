# SPDX-License-Identifier: Apache-2.0
"""A picture with its kept visual tokens lit: kept cells bright and outlined, dropped cells dim and grey."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image, ImageDraw

from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.images import to_rgb

_OUTLINE = (255, 196, 0)
_DIM = 0.28
_LEAST_SIDE = 448


def overlay(image: Any, keep: torch.Tensor) -> Image.Image:
    """The picture with kept cells as they are and everything else dimmed.

    The vision tower sees the picture stretched to its grid, so cell (r, c) of an h x w grid covers the rectangle
    from (c / w, r / h) to ((c + 1) / w, (r + 1) / h) of the picture. Small pictures are enlarged so that their
    shorter side has at least 448 px.

    Args:
        image: anything `glimpse_runtime.images.to_rgb` takes.
        keep: ``[h, w]`` bool on the merged grid, such as ``out.pruning[0].keep``.

    Returns:
        A new picture in mode RGB.

    Raises:
        GlimpseError: the mask is not a grid.
    """
    if keep.ndim != 2 or keep.numel() == 0:
        raise GlimpseError(f"keep: expected a mask [rows, columns], found shape {list(keep.shape)}")
    cells = keep.detach().bool().cpu()
    rows, columns = cells.shape
    picture = to_rgb(image)
    scale = max(1, -(-_LEAST_SIDE // min(picture.size)))
    if scale > 1:
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    xs = [round(column * picture.width / columns) for column in range(columns + 1)]
    ys = [round(row * picture.height / rows) for row in range(rows + 1)]
    lit = Image.new("L", picture.size, 0)
    mask = ImageDraw.Draw(lit)
    for row, column in cells.nonzero().tolist():
        mask.rectangle((xs[column], ys[row], xs[column + 1] - 1, ys[row + 1] - 1), fill=255)
    grey = picture.convert("L").convert("RGB").point(lambda value: value * _DIM)
    result = Image.composite(picture, grey, lit)
    _outline(ImageDraw.Draw(result), cells, xs, ys, width=max(2, min(picture.size) // 160))
    return result


def _outline(
    draw: ImageDraw.ImageDraw, cells: torch.Tensor, xs: list[int], ys: list[int], width: int
) -> None:
    """Lines around regions of kept cells, drawn on their inside; neighbours share no line."""
    rows, columns = cells.shape

    def kept(row: int, column: int) -> bool:
        return 0 <= row < rows and 0 <= column < columns and bool(cells[row, column])

    for row, column in cells.nonzero().tolist():
        left, top, right, bottom = xs[column], ys[row], xs[column + 1] - 1, ys[row + 1] - 1
        edge = width - 1
        if not kept(row - 1, column):
            draw.rectangle((left, top, right, top + edge), fill=_OUTLINE)
        if not kept(row + 1, column):
            draw.rectangle((left, bottom - edge, right, bottom), fill=_OUTLINE)
        if not kept(row, column - 1):
            draw.rectangle((left, top, left + edge, bottom), fill=_OUTLINE)
        if not kept(row, column + 1):
            draw.rectangle((right - edge, top, right, bottom), fill=_OUTLINE)


def side_by_side(*pictures: Image.Image, gap: int = 12) -> Image.Image:
    """Pictures in one row on white, centred vertically."""
    if not pictures:
        raise GlimpseError("side_by_side: expected at least one picture, found none")
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    height = max(picture.height for picture in pictures)
    sheet = Image.new("RGB", (width, height), "white")
    x = 0
    for picture in pictures:
        sheet.paste(picture, (x, (height - picture.height) // 2))
        x += picture.width + gap
    return sheet

# SPDX-License-Identifier: Apache-2.0
"""Draws a scene with Pillow, text with the font that Pillow carries, so that no system font is needed."""

from __future__ import annotations

import functools
import math

from PIL import Image, ImageDraw, ImageFont

from glimpse_lab.world.scene import Scene

_SUPERSAMPLE = 4


@functools.lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("Pillow was built without FreeType; its embedded font cannot be scaled")
    return font


@functools.lru_cache(maxsize=1024)
def _glyph(char: str, size: int) -> Image.Image:
    """Coverage of one character, cropped to its ink."""
    font = _font(size)
    canvas = Image.new("L", (2 * size, 2 * size))
    ImageDraw.Draw(canvas).text((size // 2, size // 4), char, fill=255, font=font)
    return canvas.crop(canvas.getbbox())


def _polygon(shape: str, s: float) -> list[tuple[float, float]]:
    if shape == "triangle":
        return [(s / 2, 0), (s, s), (0, s)]
    if shape == "diamond":
        return [(s / 2, 0), (s, s / 2), (s / 2, s), (0, s / 2)]
    if shape == "cross":
        a, b = s * 0.32, s * 0.68
        return [
            (a, 0),
            (b, 0),
            (b, a),
            (s, a),
            (s, b),
            (b, b),
            (b, s),
            (a, s),
            (a, b),
            (0, b),
            (0, a),
            (a, a),
        ]
    points = []
    for i in range(10):
        radius = s / 2 if i % 2 == 0 else s * 0.2
        angle = math.pi * (i / 5 - 0.5)
        points.append((s / 2 + radius * math.cos(angle), s / 2 + radius * math.sin(angle)))
    return points


@functools.lru_cache(maxsize=512)
def _mask(shape: str, side: int) -> Image.Image:
    """Coverage of a shape, ``[side, side]``, 0 to 255."""
    s = side * _SUPERSAMPLE
    big = Image.new("L", (s, s))
    draw = ImageDraw.Draw(big)
    if shape == "square":
        edge = s // 16
        draw.rectangle((edge, edge, s - 1 - edge, s - 1 - edge), fill=255)
    elif shape in ("circle", "ring"):
        draw.ellipse((0, 0, s - 1, s - 1), fill=255)
        if shape == "ring":
            inner = s * 0.27
            draw.ellipse((inner, inner, s - 1 - inner, s - 1 - inner), fill=0)
    else:
        draw.polygon(_polygon(shape, s - 1), fill=255)
    return big.resize((side, side), Image.Resampling.BOX)


def _ink(rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever reads better on the plate."""
    luminance = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]
    return (0, 0, 0) if luminance > 125 else (255, 255, 255)


def render(scene: Scene) -> Image.Image:
    """The scene's RGB picture, ``scene.height`` x ``scene.width``. Deterministic for one Pillow version."""
    image = Image.new("RGB", (scene.width, scene.height), scene.background)
    for thing in scene.things:
        mask = _mask(thing.shape, thing.box[2] - thing.box[0])
        image.paste(thing.rgb, (thing.box[0], thing.box[1]), mask)
    draw = ImageDraw.Draw(image)
    for plate in scene.plates:
        x1, y1, x2, y2 = plate.box
        draw.rounded_rectangle((x1, y1, x2 - 1, y2 - 1), radius=3, fill=plate.rgb)
        ink = _ink(plate.rgb)
        for char, slot in zip(plate.text, plate.char_boxes, strict=True):
            glyph = _glyph(char, plate.font_size)
            x = (slot[0] + slot[2] - glyph.width) // 2
            image.paste(ink, (x, plate.centre_y - glyph.height // 2), glyph)
    return image

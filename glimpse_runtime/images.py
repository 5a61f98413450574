# SPDX-License-Identifier: Apache-2.0
"""Pictures: whatever the caller has → one RGB picture → the size the vision tower takes.

Every rule here equals the PIL image processor of Hugging Face transformers (``Qwen2VLImageProcessorPil``), because a
checkpoint was trained on what that processor produced:

* a *path* is turned upright by its EXIF orientation and converted to RGB as Pillow does (transparency is dropped);
* a *PIL image* is taken as it lies in memory (no EXIF), transparency is composited onto white;
* an *array* or *tensor* is uint8, ``[H, W]``, ``[H, W, C]`` or ``[C, H, W]`` with 1, 3 or 4 channels; channel 4 is
  composited onto white.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from glimpse_runtime.errors import GlimpseError

ImageInput: TypeAlias = "Image.Image | str | os.PathLike[str] | np.ndarray | torch.Tensor"

MAX_ASPECT_RATIO = 200
_PILLOW = int(PIL.__version__.partition(".")[0])
_STRIP = 1 << 19  # bytes


class ImageError(GlimpseError):
    """A picture that cannot be used: missing, corrupt, too small, too elongated, of a type we do not know."""


def smart_resize(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """The size a picture is scaled to: sides are multiples of ``factor``, the area lies in ``[min_pixels,
    max_pixels]`` where that is possible, the aspect ratio is kept as closely as those two allow.

    The rule of Qwen2-VL (arXiv 2409.12191, section 2.1, "naive dynamic resolution") as transformers implements it,
    with Python's round-half-to-even.

    Returns:
        ``(height, width)`` in pixels.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        ratio = max(height, width) / max(1, min(height, width))
        raise ImageError(
            f"picture is too elongated: expected an aspect ratio of at most {MAX_ASPECT_RATIO}, "
            f"found {width} x {height} px (ratio {ratio:.0f})"
        )
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return max(factor, new_height), max(factor, new_width)


def _composite_on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    background = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(background, rgba).convert("RGB")


def _rgb(image: Image.Image) -> Image.Image:
    """In mode RGB; the same picture where it is already: convert() would copy it."""
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_path(path: str | os.PathLike[str], name: str) -> Image.Image:
    text = os.fspath(path)
    if "://" in text[:12]:
        raise ImageError(f"{name}: pictures are read from disk only, found the address {text!r}")
    if os.path.isdir(text):
        raise ImageError(f"{name}: expected a picture file, {text!r} is a folder")
    if not os.path.exists(text):
        raise ImageError(f"{name}: no such file: {text!r}")
    try:
        with warnings.catch_warnings():
            # Pillow only warns between one and two times its limit; the size is bounded by max_pixels later anyway.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(text) as image:
                ImageOps.exif_transpose(image, in_place=True)
                return _rgb(image)
    except UnidentifiedImageError:
        raise ImageError(f"{name}: {text!r} is not a picture in a format that Pillow reads") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: {text!r} is too large: {error}") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        # Decoders report damaged data through all of these.
        raise ImageError(f"{name}: {text!r} is corrupt or cannot be read ({error})") from None


def _from_pil(image: Image.Image, name: str) -> Image.Image:
    try:
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            return _composite_on_white(image)
        return _rgb(image)
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError(f"{name}: the picture is corrupt or cannot be converted to RGB ({error})") from None


def _from_tensor(array: torch.Tensor, name: str) -> torch.Tensor:
    """[H, W, 3] uint8 of an array in one of the accepted layouts, on its own device and without a wait for it."""
    if array.dtype != torch.uint8:
        found = str(array.dtype).removeprefix("torch.")
        raise ImageError(f"{name}: expected an array of uint8 (0 to 255), found {found}")
    if array.numel() == 0:
        raise ImageError(f"{name}: the array is empty, shape {tuple(array.shape)}")
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim == 3 and array.shape[0] in (
        1,
        3,
        4,
    ):  # channels first wins where both readings are possible
        array = array.permute(1, 2, 0)
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4):
        raise ImageError(
            f"{name}: expected an array [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels, "
            f"found shape {tuple(array.shape)}"
        )
    channels = array.shape[-1]
    if channels == 1:
        array = array.expand(-1, -1, 3)
    elif channels == 4:
        alpha = array[..., 3:4].double() / 255
        array = torch.round(alpha * array[..., :3] + (1 - alpha) * 255).to(torch.uint8)
    return array.contiguous()


def _as_tensor(array: np.ndarray, name: str) -> torch.Tensor:
    if array.dtype != np.uint8:  # torch does not know all the others
        raise ImageError(f"{name}: expected an array of uint8 (0 to 255), found {array.dtype}")
    with warnings.catch_warnings():
        # The memory may be read-only, which torch cannot express; nothing here writes to it.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(np.ascontiguousarray(array))


def to_rgb(image: Any, name: str = "image") -> Image.Image:
    """One picture in mode RGB from a path, a PIL image, a uint8 array or a uint8 tensor. A PIL image that is RGB comes back as it
    is.

    Args:
        image: see the module's text for what each type means.
        name: how errors call this picture, such as ``"images[1]"``.

    Raises:
        ImageError: the file is missing or corrupt, the type or shape is unknown, the picture has no pixels.
    """
    if isinstance(image, (str, os.PathLike)):
        rgb = _from_path(image, name)
    elif isinstance(image, Image.Image):
        rgb = _from_pil(image, name)
    elif isinstance(image, (np.ndarray, torch.Tensor)):
        rgb = Image.fromarray(pixels_of(image, name).cpu().numpy())
    else:
        raise ImageError(
            f"{name}: expected a path, a PIL image, a uint8 array or a uint8 tensor, found {type(image).__name__}"
        )
    if rgb.width == 0 or rgb.height == 0:
        raise ImageError(f"{name}: the picture has no pixels ({rgb.width} x {rgb.height})")
    return rgb


def check_size(height: int, width: int, *, least: int, name: str = "image") -> None:
    """Raises ImageError where a side is shorter than ``least`` pixels (one vision patch: there is nothing to see)."""
    if min(height, width) < least:
        raise ImageError(
            f"{name}: the picture is too small: expected sides of at least {least} px, "
            f"found {width} x {height} px"
        )


def pixels_of(image: Any, name: str = "image", *, pinned: bool = False) -> torch.Tensor:
    """``[H, W, 3]`` uint8 of anything that `to_rgb` takes, contiguous: a tensor's on its own device (with nobody waiting for
    it), all others' on the host. An array's or tensor's may be its own memory: not to be written to.

    pinned: what is read from a file or a PIL image goes to page-locked memory.

    Raises:
        ImageError: as `to_rgb`.
    """
    if isinstance(image, np.ndarray):
        image = _as_tensor(image, name)
    if isinstance(image, torch.Tensor):
        return _from_tensor(image.detach(), name)
    return _unpacked(to_rgb(image, name), pinned)


def _unpacked(picture: Image.Image, pinned: bool) -> torch.Tensor:
    """The bytes of a picture in mode RGB. In strips: Pillow hands over bytes in memory of its own, and what is too large for a
    cache, or new to the system page by page, takes several times as long. (NumPy asks for large pages, torch does not.)"""
    width, height = picture.size
    if pinned:
        found = torch.empty(height, width, 3, dtype=torch.uint8, device="cpu", pin_memory=True)
    else:
        found = torch.from_numpy(np.empty((height, width, 3), np.uint8))
    into, rows = found.numpy(), max(1, _STRIP // (3 * width))
    for top in range(0, height, rows):
        into[top : top + rows] = np.asarray(picture.crop((0, top, width, min(height, top + rows))))
    return found


def vertical_pass_first(height: int, width: int, size: tuple[int, int]) -> bool:
    """Whether the installed Pillow's resize of ``height`` x ``width`` to ``size`` (height, width) begins with the
    vertical pass: from version 13 on it does where the height loses more than twice the pixels that the width loses.
    """
    return _PILLOW >= 13 and height - size[0] > max(0, 2 * (width - size[1]))


def flatten(images: Any) -> Iterator[Any]:
    """The pictures of a nested list in reading order; a single picture counts as a list of one, None as empty."""
    if images is None:
        return
    if isinstance(images, (list, tuple)):
        for image in images:
            yield from flatten(image)
    elif isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        yield from images  # a stack of pictures
    else:
        yield images

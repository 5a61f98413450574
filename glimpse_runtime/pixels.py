# SPDX-License-Identifier: Apache-2.0
"""Pictures → the rows of patches that the vision tower takes, made on the host or on a GPU.

For a GPU a picture goes up as it was decoded, in bytes, and is resized, normalised and cut there; the host only reads files and
decides on sizes. Nobody waits: the next picture is decoded while the one before is on its way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from glimpse_kernels import patchify
from glimpse_runtime.images import (
    ImageInput,
    check_size,
    flatten,
    pixels_of,
    smart_resize,
    vertical_pass_first,
)
from glimpse_runtime.processor_files import ImageSettings, ProcessorError
from glimpse_runtime.uploads import upload

_FILTERS = {
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
    4: "box",
    5: "hamming",
}  # Pillow's numbers of the op's filters


def pixel_values(images: Any, settings: ImageSettings, device: torch.device) -> tuple[Tensor, Tensor]:
    """Patches of all pictures and their grids.

    Args:
        images: a picture or any nesting of lists of them, see `glimpse_runtime.images`.
        device: where patches are made and stay.

    Returns:
        ``[P, 3 * temporal * patch * patch]`` float32 on `device` and ``[images, 3]`` int64 on the host (frames, rows and
        columns of patches).

    Raises:
        ImageError, ProcessorError: a picture that cannot be used, named by its number.
    """
    patches, grids = [], []
    for index, item in enumerate(flatten(images)):
        rows, grid = _patches(item, settings, f"images[{index}]", device)
        patches.append(rows)
        grids.append(grid)
    if not patches:
        width = 3 * settings.temporal_patch_size * settings.patch_size**2
        patches.append(torch.empty(0, width, dtype=torch.float32, device=device))
    pixels = patches[0] if len(patches) == 1 else torch.cat(patches)
    return pixels, torch.tensor(grids, dtype=torch.int64, device="cpu").reshape(-1, 3)


def _patches(
    item: ImageInput, settings: ImageSettings, name: str, device: torch.device
) -> tuple[Tensor, list[int]]:
    """Patches of one picture and its grid (frames, rows, columns)."""
    own = not isinstance(item, (np.ndarray, torch.Tensor))
    picture = pixels_of(item, name, pinned=own and device.type == "cuda")
    height, width, _ = picture.shape
    check_size(height, width, least=settings.patch_size, name=name)
    size = (height, width)
    if settings.do_resize:
        size = smart_resize(
            height,
            width,
            factor=settings.factor,
            min_pixels=settings.min_pixels,
            max_pixels=settings.max_pixels,
        )
    elif width % settings.factor or height % settings.factor:
        raise ProcessorError(
            f"{name}: this checkpoint does not resize, so sides must be multiples of {settings.factor} px, "
            f"found {width} x {height} px"
        )
    resample = _FILTERS.get(settings.resample)
    if resample is None and size != (height, width):
        # "nearest" and filters that only some versions of Pillow have: Pillow does it, or says why not.
        pillow = Image.fromarray(picture.cpu().numpy())
        pillow = pillow.resize((size[1], size[0]), resample=settings.resample)
        own, picture = True, pixels_of(pillow, name, pinned=device.type == "cuda")
    # Nobody writes to memory of our own any more, so it goes up as it is; the caller's may change, and is copied first.
    there = picture.to(device, non_blocking=True) if own else upload(picture, device)
    patches = patchify(
        there,
        mean=settings.mean,
        std=settings.std,
        size=size,
        resample=resample or "bicubic",
        down_first=vertical_pass_first(height, width, size),
        patch_size=settings.patch_size,
        temporal_patch_size=settings.temporal_patch_size,
        merge_size=settings.merge_size,
        rescale=settings.rescale,
    )
    return patches, [1, size[0] // settings.patch_size, size[1] // settings.patch_size]

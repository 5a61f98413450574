# SPDX-License-Identifier: Apache-2.0
"""From a resized picture to the rows that the vision tower's patch embedding takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glimpse_kernels import _tensors as check
from glimpse_kernels import dispatch

__all__ = ["patchify"]


def patchify(
    image: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    patch_size: int = 14,
    temporal_patch_size: int = 2,
    merge_size: int = 2,
    rescale: float = 1 / 255,
    out: Tensor | None = None,
) -> Tensor:
    """Rescale, normalise and cut a picture into patches, as Hugging Face's Qwen2-VL image processor does.

    image: [H, W, 3] uint8, H and W multiples of patch_size * merge_size; last two dimensions contiguous, row stride free.
    mean, std: one number per channel. rescale: factor of the pixel values, applied first.
    out: [P, 3 * temporal_patch_size * patch_size**2] float32, contiguous.

    Returns out [P, 3 * temporal * patch * patch] float32 with P = H * W / patch_size**2. The merge_size x merge_size patches
    that are merged into one token follow each other; inside a row the order is (channel, frame, y, x), and
    the one frame is repeated temporal_patch_size times.

    Raises TypeError / ValueError for a wrong dtype / shape, UnsupportedError if no backend serves the device.
    """
    op = "patchify"
    check.expect_shape(op, "image", image, (None, None, 3), "[H, W, 3]")
    check.expect_dtype(op, "image", image, torch.uint8)
    for name, size in (
        ("patch_size", patch_size),
        ("temporal_patch_size", temporal_patch_size),
        ("merge_size", merge_size),
    ):
        if size < 1:
            raise ValueError(f"{op}: {name}: expected at least 1, found {size}")
    height, width, channels = image.shape
    unit = patch_size * merge_size
    if height % unit or width % unit:
        raise ValueError(
            f"{op}: image: expected height and width in multiples of {unit}, found {height} x {width}"
        )
    if len(mean) != channels or len(std) != channels:
        raise ValueError(
            f"{op}: mean, std: expected {channels} numbers each, found {len(mean)} and {len(std)}"
        )
    if any(s == 0 for s in std):
        raise ValueError(f"{op}: std: expected numbers other than 0, found {list(std)}")
    if height and width and (image.stride(2) != 1 or image.stride(1) != channels):
        raise ValueError(
            f"{op}: image: expected contiguous pixels and channels, found strides {list(image.stride())}"
        )
    if out is not None:
        shape = (height // patch_size * (width // patch_size), channels * temporal_patch_size * patch_size**2)
        check.expect_shape(op, "out", out, shape, "[P, 3 * temporal * patch * patch]")
        check.expect_dtype(op, "out", out, torch.float32)
        check.expect_contiguous(op, "out", out)
        check.expect_same_device(op, image.device, out=out)
    serve = dispatch.select(op, image.device, image.dtype)
    return serve(
        image,
        mean=mean,
        std=std,
        patch_size=patch_size,
        temporal_patch_size=temporal_patch_size,
        merge_size=merge_size,
        rescale=rescale,
        out=out,
    )

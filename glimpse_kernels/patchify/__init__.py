# SPDX-License-Identifier: Apache-2.0
"""From a picture to the rows that the vision tower's patch embedding takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glimpse_kernels import _tensors as check
from glimpse_kernels import dispatch

__all__ = ["RESAMPLE", "patchify"]

RESAMPLE = ("box", "bilinear", "hamming", "bicubic", "lanczos")
"""Filters of a resize; the index is `glimpse_resample` of csrc/include/glimpse/patchify.h."""

_OP = "patchify"
_MOST = 1 << 24  # Pillow holds sides in fp32


def patchify(
    image: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    size: tuple[int, int] | None = None,
    resample: str = "bicubic",
    down_first: bool = False,
    patch_size: int = 14,
    temporal_patch_size: int = 2,
    merge_size: int = 2,
    rescale: float = 1 / 255,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Resize, rescale, normalise and cut a picture into patches, as Hugging Face's Qwen2-VL image processor does.

    image: [H, W, 3] uint8; last two dimensions contiguous, row stride free. Any H and W of at least 1 where `size` is given.
    mean, std: one number per channel. rescale: factor of the pixel values, applied first.
    size: (height, width) in pixels to resize to before anything else, multiples of patch_size * merge_size; None: H and W
        are such multiples already.
    resample: filter of the resize, one of `RESAMPLE`. Bytes are those of Pillow's `Image.resize` (antialiased; a horizontal
        and a vertical pass, each rounded to bytes; weights of 22 fraction bits): Pillow, src/libImaging/Resample.c.
    down_first: the vertical pass comes first, as it does in Pillow 13 for some sizes; otherwise the horizontal one.
    dtype: of the result, float32, bfloat16 or float16 (the float32 values, rounded once); None: that of `out`, else float32.
    out: [P, 3 * temporal_patch_size * patch_size**2] of such a dtype, contiguous.

    Returns out [P, 3 * temporal * patch * patch] with P = height * width / patch_size**2. The merge_size x merge_size
    patches that are merged into one token follow each other; inside a row the order is (channel, frame, y, x), and
    the one frame is repeated temporal_patch_size times.

    Raises TypeError / ValueError for a wrong dtype / shape, UnsupportedError if no backend serves the device.
    """
    check.expect_tensors(_OP, image=image)
    check.expect_shape(_OP, "image", image, (None, None, 3), "[H, W, 3]")
    check.expect_dtype(_OP, "image", image, torch.uint8)
    for name, value in (
        ("patch_size", patch_size),
        ("temporal_patch_size", temporal_patch_size),
        ("merge_size", merge_size),
    ):
        if value < 1:
            raise ValueError(f"{_OP}: {name}: expected at least 1, found {value}")
    channels = image.shape[2]
    height, width = _size(image, size, patch_size * merge_size)
    if resample not in RESAMPLE:
        raise ValueError(f"{_OP}: resample: expected one of {', '.join(RESAMPLE)}, found {resample!r}")
    if len(mean) != channels or len(std) != channels:
        raise ValueError(
            f"{_OP}: mean, std: expected {channels} numbers each, found {len(mean)} and {len(std)}"
        )
    if any(s == 0 for s in std):
        raise ValueError(f"{_OP}: std: expected numbers other than 0, found {list(std)}")
    if image.numel() and (image.stride(2) != 1 or image.stride(1) != channels):
        raise ValueError(
            f"{_OP}: image: expected contiguous pixels and channels, found strides {list(image.stride())}"
        )
    if dtype is not None and dtype not in dispatch.FLOATS:
        raise TypeError(f"{_OP}: dtype: expected float32, bfloat16 or float16, found {dtype}")
    if out is not None:
        shape = (height // patch_size * (width // patch_size), channels * temporal_patch_size * patch_size**2)
        check.expect_shape(_OP, "out", out, shape, "[P, 3 * temporal * patch * patch]")
        check.expect_dtype(_OP, "out", out, *(dispatch.FLOATS if dtype is None else (dtype,)))
        check.expect_contiguous(_OP, "out", out)
        check.expect_same_device(_OP, image.device, out=out)
    pixels: tuple[int, ...] = ()
    if image.is_cuda:
        given = (image.shape[0], image.shape[1])  # with a resize it is a call of another sort
        pixels = (*(() if given == (height, width) else (given[0] * given[1],)), height * width)
    serve = dispatch.select(_OP, image.device, image.dtype, size=pixels)
    return serve(
        image,
        mean=mean,
        std=std,
        size=(height, width),
        resample=resample,
        down_first=down_first,
        patch_size=patch_size,
        temporal_patch_size=temporal_patch_size,
        merge_size=merge_size,
        rescale=rescale,
        dtype=dtype or (torch.float32 if out is None else out.dtype),
        out=out,
    )


def _size(image: Tensor, size: tuple[int, int] | None, unit: int) -> tuple[int, int]:
    """Height and width of what is cut into patches; ValueError where they cannot be had."""
    given = (image.shape[0], image.shape[1])
    if size is None:
        if given[0] % unit or given[1] % unit:
            raise ValueError(
                f"{_OP}: image: expected height and width in multiples of {unit}, found {given[0]} x {given[1]}"
            )
        return given
    if len(size) != 2:
        raise ValueError(f"{_OP}: size: expected (height, width), found {size!r}")
    height, width = size
    if min(size) < unit or height % unit or width % unit or max(size) > _MOST:
        raise ValueError(
            f"{_OP}: size: expected height and width in multiples of {unit}, from {unit} to {_MOST}, "
            f"found {height} x {width}"
        )
    if not all(1 <= side <= _MOST for side in given):
        raise ValueError(
            f"{_OP}: image: expected a height and width of 1 to {_MOST} to resize, found {given[0]} x {given[1]}"
        )
    return height, width

# SPDX-License-Identifier: Apache-2.0
"""Definition of `patchify` in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glimpse_kernels.patchify.filters import FRACTION_BITS, filter_table
from glimpse_kernels.patchify.resident import Resident

TABLES = Resident(filter_table)
"""`filter_table` where a picture is."""


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
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """See `glimpse_kernels.patchify`."""
    if size is not None:
        image = resize(image, size, resample, down_first)
    height, width, channels = image.shape
    p, m = patch_size, merge_size
    x = normalise(image.contiguous(), mean, std, rescale)
    # rows: (group row, group column, row in group, column in group); columns: (channel, frame, y, x)
    x = x.view(height // (p * m), m, p, width // (p * m), m, p, channels)
    x = x.permute(0, 3, 1, 4, 6, 2, 5).unsqueeze(5).expand(-1, -1, -1, -1, -1, temporal_patch_size, -1, -1)
    patches = x.reshape(-1, channels * temporal_patch_size * p * p)
    return patches.to(dtype) if out is None else out.copy_(patches)


def normalise(image: Tensor, mean: Sequence[float], std: Sequence[float], rescale: float) -> Tensor:
    """[..., C] uint8 → [..., C] float32: rescaled in double and rounded, then shifted and divided in single, in the order of
    the NumPy processor."""
    x = (image.double() * rescale).float()
    shift, scale = _CHANNELS.on(x.device, tuple(mean), tuple(std))
    return (x - shift) / scale


def _channels(mean: Sequence[float], std: Sequence[float]) -> Tensor:
    return torch.tensor([list(mean), list(std)], dtype=torch.float32, device="cpu")


_CHANNELS = Resident(_channels)
"""[2, C] float32: mean and std of every channel."""


def resize(image: Tensor, size: tuple[int, int], resample: str, down_first: bool = False) -> Tensor:
    """[H, W, C] uint8 → [height, width, C] uint8 as Pillow's `Image.resize` has it.

    Along the rows and then down the columns, or the other way round; each time back to bytes.
    """
    for dim in (0, 1) if down_first else (1, 0):
        image = _resize_first(image.transpose(0, dim), size[dim], resample).transpose(0, dim)
    return image


def _resize_first(x: Tensor, length: int, resample: str) -> Tensor:
    """[n, ...] uint8 → [length, ...] uint8: every output pixel is a weighted sum of neighbours, rounded and clipped."""
    if x.shape[0] == length:
        return x
    table = TABLES.on(x.device, x.shape[0], length, resample)
    first, weights = table[0], table[1:].view(-1, length, *[1] * (x.dim() - 1))
    total = torch.full((length, *x.shape[1:]), 1 << (FRACTION_BITS - 1), dtype=torch.int32, device=x.device)
    for tap, weight in enumerate(weights):
        neighbours = x[(first + tap).clamp(max=x.shape[0] - 1)]  # past the end the weight is 0
        total += neighbours * weight
    return (total >> FRACTION_BITS).clamp(0, 255).to(torch.uint8)

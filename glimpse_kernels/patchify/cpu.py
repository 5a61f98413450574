# SPDX-License-Identifier: Apache-2.0
"""`patchify` in C++ (csrc/cpu/patchify.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glimpse_kernels._ext import extension


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
    """See `glimpse_kernels.patchify`; arguments are checked there."""
    height, width, channels = image.shape
    area = patch_size * patch_size
    if out is None:
        out = torch.empty(height * width // area, channels * temporal_patch_size * area, dtype=torch.float32)
    extension().patchify(
        image.data_ptr(),
        out.data_ptr(),
        height,
        width,
        image.stride(0),
        patch_size,
        temporal_patch_size,
        merge_size,
        list(mean),
        list(std),
        rescale,
    )
    return out

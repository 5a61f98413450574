# SPDX-License-Identifier: Apache-2.0
"""`patchify` in C++ (csrc/cpu/patchify.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glimpse_kernels._ext import extension
from glimpse_kernels._tensors import DTYPE_CODES
from glimpse_kernels.patchify import RESAMPLE


def patchify(
    image: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    size: tuple[int, int],
    resample: str,
    down_first: bool,
    patch_size: int,
    temporal_patch_size: int,
    merge_size: int,
    rescale: float,
    dtype: torch.dtype,
    out: Tensor | None,
) -> Tensor:
    """See `glimpse_kernels.patchify`; arguments are checked there, `size` and `dtype` are those of the result."""
    height, width, channels = image.shape
    area = patch_size * patch_size
    wanted = out
    # C++ writes no float16: the same values in float32, rounded afterwards.
    written = torch.float32 if dtype is torch.float16 else dtype
    if out is None or written is not dtype:
        out = torch.empty(size[0] * size[1] // area, channels * temporal_patch_size * area, dtype=written)
    extension().patchify(
        image.data_ptr(),
        out.data_ptr(),
        (height, width),
        image.stride(0),
        size,
        RESAMPLE.index(resample),
        down_first,
        DTYPE_CODES[written],
        patch_size,
        temporal_patch_size,
        merge_size,
        list(mean),
        list(std),
        rescale,
    )
    if written is dtype:
        return out
    return out.to(dtype) if wanted is None else wanted.copy_(out)

# SPDX-License-Identifier: Apache-2.0
"""`patchify` in CUDA C++ (csrc/cuda/patchify.cu). A resize is not part of the kernel: what runs before it on the same device is
the Triton kernel, or, where there is no Triton, the definition; both are in integers and give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glimpse_kernels import _cuda, _triton
from glimpse_kernels._tensors import DTYPE_CODES
from glimpse_kernels.patchify import naive


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
    if tuple(image.shape[:2]) != tuple(size):
        image = _resize(image, size, resample, down_first)
    height, width, channels = image.shape
    area = patch_size * patch_size
    if out is None:
        out = torch.empty(
            height * width // area, channels * temporal_patch_size * area, dtype=dtype, device=image.device
        )
    _cuda.module().patchify(
        _cuda.stream(image),
        0,
        0,
        image.data_ptr(),
        out.data_ptr(),
        (height, width),
        image.stride(0),
        (height, width),
        0,
        False,
        DTYPE_CODES[dtype],
        patch_size,
        temporal_patch_size,
        merge_size,
        list(mean),
        list(std),
        rescale,
    )
    return out


def _resize(image: Tensor, size: tuple[int, int], resample: str, down_first: bool) -> Tensor:
    if _triton.missing():
        return naive.resize(image, size, resample, down_first).contiguous()
    from glimpse_kernels.patchify.triton_resize import resize

    return resize(image, size, resample, down_first)

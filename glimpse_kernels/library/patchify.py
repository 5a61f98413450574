# SPDX-License-Identifier: Apache-2.0
"""Pictures into patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import glimpse_kernels as gk
from glimpse_kernels.library.registry import register


def _patchify(
    image: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    patch_size: int = 14,
    temporal_patch_size: int = 2,
    merge_size: int = 2,
    rescale: float = 1 / 255,
    *,
    size: Sequence[int] | None = None,
    resample: str = "bicubic",
    down_first: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return gk.patchify(
        image,
        mean=mean,
        std=std,
        size=None if size is None else (size[0], size[1]),
        resample=resample,
        down_first=down_first,
        patch_size=patch_size,
        temporal_patch_size=temporal_patch_size,
        merge_size=merge_size,
        rescale=rescale,
        dtype=dtype,
    )


def _patchify_fake(
    image: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    patch_size: int = 14,
    temporal_patch_size: int = 2,
    *_: Any,
    size: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    **__: Any,
) -> Tensor:
    height, width = image.shape[:2] if size is None else size
    patches = (height // patch_size) * (width // patch_size)
    columns = image.shape[2] * temporal_patch_size * patch_size**2
    return image.new_empty(patches, columns, dtype=dtype or torch.float32)


register(
    "patchify(Tensor image, float[] mean, float[] std, int patch_size=14, int temporal_patch_size=2, int merge_size=2, "
    f"float rescale={1 / 255!r}, *, SymInt[]? size=None, str resample='bicubic', bool down_first=False, "
    "ScalarType? dtype=None) -> Tensor",
    _patchify,
    _patchify_fake,
)

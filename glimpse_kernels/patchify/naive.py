# SPDX-License-Identifier: Apache-2.0
"""Definition of `patchify` in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
    """See `glimpse_kernels.patchify`."""
    height, width, channels = image.shape
    p, m = patch_size, merge_size
    # Rescaled in double and rounded, then shifted and divided in single: the order of the NumPy processor.
    x = (image.double() * rescale).float()
    x = (x - torch.tensor(mean, dtype=torch.float32, device=x.device)) / torch.tensor(
        std, dtype=torch.float32, device=x.device
    )
    # rows: (group row, group column, row in group, column in group); columns: (channel, frame, y, x)
    x = x.view(height // (p * m), m, p, width // (p * m), m, p, channels)
    x = x.permute(0, 3, 1, 4, 6, 2, 5).unsqueeze(5).expand(-1, -1, -1, -1, -1, temporal_patch_size, -1, -1)
    patches = x.reshape(-1, channels * temporal_patch_size * p * p)
    return patches if out is None else out.copy_(patches)

# SPDX-License-Identifier: Apache-2.0
"""Keep masks that come with a call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.packing import PackedBatch
from glimpse_runtime.uploads import upload


def scores_from_masks(masks: torch.Tensor | Sequence[torch.Tensor], batch: PackedBatch) -> torch.Tensor:
    """Masks as scores `[N]` fp32 on the batch's device: +1 stays, -1 goes.

    Args:
        masks: a flat `[N]` over all visual tokens in prompt order, or one `[height, width]` mask (or its flat form) for
            each picture. bool, or numbers of which those above 0.5 stay.

    Raises:
        GlimpseError: a size disagrees with the pictures.
    """
    if not isinstance(masks, (torch.Tensor, list, tuple)):
        raise GlimpseError(f"keep masks: expected a tensor or a list of them, found {masks!r}")
    if isinstance(masks, torch.Tensor) and masks.ndim == 1:
        parts = [masks]
        if masks.shape[0] != batch.num_visual:
            raise GlimpseError(
                f"keep masks: expected {batch.num_visual} values, one a visual token, found {masks.shape[0]}"
            )
    else:
        parts = [torch.as_tensor(mask) for mask in ([masks] if isinstance(masks, torch.Tensor) else masks)]
        if len(parts) != len(batch.pictures):
            raise GlimpseError(
                f"keep masks: expected {len(batch.pictures)}, one a picture (video slice), found {len(parts)}"
            )
        for number, (mask, picture) in enumerate(zip(parts, batch.pictures, strict=True)):
            grid = (picture.height, picture.width)
            if tuple(mask.shape) not in (grid, (1, *grid), (picture.tokens,)):
                raise GlimpseError(
                    f"keep masks: picture {number}: expected shape {list(grid)}, found {list(mask.shape)}"
                )
    if not parts:
        return torch.zeros(0, device=batch.device)
    flat = [part.flatten().to(torch.float32) for part in parts]
    if len({part.device for part in flat}) > 1:
        flat = [upload(part, batch.device) for part in flat]
    return torch.where(upload(torch.cat(flat), batch.device) > 0.5, 1.0, -1.0)

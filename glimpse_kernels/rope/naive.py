# SPDX-License-Identifier: Apache-2.0
"""Definition of `rope` in plain PyTorch, and the two tables of cosines and sines it is used with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x [T, H, D]` by `cos, sin [T, D/2]`: pairs are (i, i + D/2). fp32 inside, rounded once."""
    x1, x2 = x.float().chunk(2, dim=-1)
    c, s = cos[:, None, :], sin[:, None, :]
    return torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), dim=-1).to(x.dtype)


def rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    v: Tensor | None = None,
    k_out: Tensor | None = None,
    v_out: Tensor | None = None,
    slots: Tensor | None = None,
) -> None:
    """See `glimpse_kernels.rope`."""
    q.copy_(rotate(q, cos, sin))
    if k is None:
        return
    rotated = rotate(k, cos, sin)
    if k_out is None:
        k.copy_(rotated)
        return
    if slots is None:
        k_out[: k.shape[0]] = rotated
        if v is not None and v_out is not None:
            v_out[: v.shape[0]] = v
        return
    valid = slots >= 0
    where = slots[valid].long()
    k_out[where] = rotated[valid]
    if v is not None and v_out is not None:
        v_out[where] = v[valid]


def mrope_cos_sin(positions: Tensor, inv_freq: Tensor, sections: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the multimodal rotary embedding (Qwen2-VL, arXiv 2409.12191, section 2.1).

    The frequencies are split into three runs of lengths `sections`; the first follows the temporal position, the
    second the row, the third the column.

    Args:
        positions: `[3, T]` integer, (temporal, height, width) of every token.
        inv_freq: `[D/2]` float32 inverse frequencies.
        sections: three lengths with sum `D/2`.

    Returns:
        `cos, sin [T, D/2]` float32.

    Raises:
        ValueError: when the shapes or the sections do not fit.
    """
    if positions.dim() != 2 or positions.shape[0] != 3:
        raise ValueError(f"mrope_cos_sin: positions must be [3, T], found {list(positions.shape)}")
    if len(sections) != 3 or sum(sections) != inv_freq.numel():
        raise ValueError(
            f"mrope_cos_sin: sections must be three lengths with sum {inv_freq.numel()} (inv_freq), found {tuple(sections)}"
        )
    angles = torch.cat(
        [
            axis.float()[:, None] * part.float()
            for axis, part in zip(positions, inv_freq.split(list(sections)), strict=True)
        ],
        dim=-1,
    )
    return angles.cos(), angles.sin()


def vision_rotary(rows: Tensor, cols: Tensor, dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the two-dimensional rotary embedding of Qwen2.5-VL's vision tower.

    Of the `dim/2` rotation angles the first half turns with the row, the second half with the column; both use
    the frequencies `theta ** (-4 i / dim)`, `i = 0 .. dim/4 - 1`. Always float32.

    Args:
        rows, cols: `[N]` integer coordinates on the patch grid.
        dim: head dimension, a multiple of 4.
        theta: base of the frequencies.

    Returns:
        `cos, sin [N, dim/2]` float32.

    Raises:
        ValueError: when `dim` is no multiple of 4 or the coordinates differ in shape.
    """
    if dim <= 0 or dim % 4:
        raise ValueError(f"vision_rotary: dim must be a positive multiple of 4, found {dim}")
    if rows.dim() != 1 or rows.shape != cols.shape:
        raise ValueError(
            f"vision_rotary: rows and cols must be [N] of one length, found {list(rows.shape)} and {list(cols.shape)}"
        )
    half = dim // 2
    inv_freq = 1.0 / (theta ** (torch.arange(0, half, 2, dtype=torch.float32, device=rows.device) / half))
    angles = torch.cat((rows.float()[:, None] * inv_freq, cols.float()[:, None] * inv_freq), dim=-1)
    return angles.cos(), angles.sin()

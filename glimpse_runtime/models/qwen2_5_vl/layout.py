# SPDX-License-Identifier: Apache-2.0
"""Where every patch and visual token of a batch lies: computed on the host from the grids alone.

Two orders occur. *Raster order* is the order of the prompt: images one after the other, rows top to bottom. *Window
order* is the order in which the vision tower works, so that the tokens of one attention window lie together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from glimpse_kernels import vision_rotary
from glimpse_runtime.models.qwen2_5_vl.config import VisionConfig

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class VisionLayout:
    """Index tensors of one set of grids; P patches, N = P / merge² visual tokens.

    Attributes:
        grids: patch grids `(t, h, w)` of the images and videos.
        patch_order: `[P]` int64, window order → processor order of patches.
        token_order: `[N]` int64, window order → raster order of visual tokens.
        token_rank: `[N]` int64, inverse of `token_order`.
        cu_frames: `[frames + 1]` int32 patch offsets of the frames (full attention).
        cu_windows: `[windows + 1]` int32 patch offsets of the windows (window attention).
        cos, sin: `[P, head_dim / 2]` fp32 rotary of the tower, window order.
        rows, cols: `[N]` int64 merged-grid coordinates of each visual token, raster order, each frame from 0.
        longest_frame, longest_window: patches of the largest one, known from the grids alone.
    """

    grids: tuple[Grid, ...]
    patch_order: torch.Tensor
    token_order: torch.Tensor
    token_rank: torch.Tensor
    cu_frames: torch.Tensor
    cu_windows: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    rows: torch.Tensor
    cols: torch.Tensor
    merge_unit: int
    longest_frame: int
    longest_window: int

    @property
    def cu_token_frames(self) -> torch.Tensor:
        """`[frames + 1]` int32 offsets of the frames in visual tokens."""
        return torch.div(self.cu_frames, self.merge_unit, rounding_mode="floor").to(torch.int32)

    @property
    def cu_token_windows(self) -> torch.Tensor:
        """`[windows + 1]` int32 offsets of the windows in visual tokens (window order)."""
        return torch.div(self.cu_windows, self.merge_unit, rounding_mode="floor").to(torch.int32)


@lru_cache(maxsize=32)
def vision_layout(grids: tuple[Grid, ...], config: VisionConfig, device: torch.device) -> VisionLayout:
    """Build the layout of `grids` (patch grids, multiples of the merge size)."""
    merge = config.merge_size
    window = config.window_size // merge // config.patch_size
    order: list[np.ndarray] = []
    windows: list[int] = []
    frames: list[int] = []
    rows: list[np.ndarray] = []
    cols: list[np.ndarray] = []
    start = 0
    for t, h, w in grids:
        mh, mw = h // merge, w // merge
        y, x = np.divmod(np.arange(mh * mw), mw)
        # Stable sort by window number keeps raster order inside a window.
        number = (y // window) * (-(-mw // window)) + x // window
        inside = np.argsort(number, kind="stable")
        sizes = np.bincount(number)
        for _ in range(t):
            order.append(start + inside)
            windows += sizes.tolist()
            frames.append(mh * mw)
            rows.append(y)
            cols.append(x)
            start += mh * mw
    token_order = np.concatenate(order)
    unit = merge**2
    patch_order = (token_order[:, None] * unit + np.arange(unit)).reshape(-1)
    token_rows, token_cols = np.concatenate(rows), np.concatenate(cols)
    # Inside a merge group the processor lists the patches row by row.
    group_y, group_x = np.divmod(np.arange(unit), merge)
    patch_rows = (token_rows[token_order][:, None] * merge + group_y).reshape(-1)
    patch_cols = (token_cols[token_order][:, None] * merge + group_x).reshape(-1)
    cos, sin = vision_rotary(
        torch.from_numpy(patch_rows), torch.from_numpy(patch_cols), config.head_dim, config.rope_theta
    )
    rank = np.empty_like(token_order)
    rank[token_order] = np.arange(len(token_order))
    return VisionLayout(
        grids=grids,
        patch_order=torch.from_numpy(patch_order).to(device),
        token_order=torch.from_numpy(token_order).to(device),
        token_rank=torch.from_numpy(rank).to(device),
        cu_frames=_offsets(np.asarray(frames) * unit).to(device),
        cu_windows=_offsets(np.asarray(windows) * unit).to(device),
        cos=cos.to(device),
        sin=sin.to(device),
        rows=torch.from_numpy(token_rows).to(device),
        cols=torch.from_numpy(token_cols).to(device),
        merge_unit=unit,
        longest_frame=max(frames) * unit,
        longest_window=max(windows) * unit,
    )


def _offsets(sizes: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32))

# SPDX-License-Identifier: Apache-2.0
"""Where every patch and visual token of a batch lies: computed on the host from the grids alone.

Two orders occur. *Raster order* is the order of the prompt: images one after the other, rows top to bottom. *Window
order* is the order in which the vision tower works, so that the tokens of one attention window lie together.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from glimpse_kernels import vision_rotary
from glimpse_runtime.models.qwen2_5_vl.config import VisionConfig
from glimpse_runtime.uploads import upload_together

Grid = tuple[int, int, int]

KEPT_PATCHES = 1 << 18
"""Patches of the layouts that are kept: some 90 MB with the tables of all of them."""


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
        patch_rows, patch_cols: `[P]` int64 coordinates of each patch in its picture, window order.
        cu_token_frames: `[frames + 1]` int32 offsets of the frames in visual tokens.
        cu_token_windows: `[windows + 1]` int32 offsets of the windows in visual tokens (window order).
        rows, cols: `[N]` int64 merged-grid coordinates of each visual token, raster order, each frame from 0.
        longest_frame, longest_window: patches of the largest one, known from the grids alone.
    """

    grids: tuple[Grid, ...]
    patch_order: torch.Tensor
    token_order: torch.Tensor
    token_rank: torch.Tensor
    cu_frames: torch.Tensor
    cu_windows: torch.Tensor
    cu_token_frames: torch.Tensor
    cu_token_windows: torch.Tensor
    patch_rows: torch.Tensor
    patch_cols: torch.Tensor
    rows: torch.Tensor
    cols: torch.Tensor
    longest_frame: int
    longest_window: int
    config: VisionConfig

    @cached_property
    def rotary(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin `[P, head_dim / 2]` fp32 of the tower, window order.

        They are computed on the device: they are many times as large as what they follow from.
        """
        with torch.inference_mode(False), torch.no_grad():
            return vision_rotary(
                self.patch_rows, self.patch_cols, self.config.head_dim, self.config.rope_theta
            )

    @property
    def patches(self) -> int:
        """P."""
        return self.patch_order.shape[0]


_known: OrderedDict[tuple[tuple[Grid, ...], VisionConfig, torch.device], VisionLayout] = OrderedDict()


def vision_layout(grids: tuple[Grid, ...], config: VisionConfig, device: torch.device) -> VisionLayout:
    """The layout of `grids` (patch grids, multiples of the merge size), from the grids alone: no pixel is looked at and nothing
    on the device is read. Layouts of up to `KEPT_PATCHES` patches together are kept for the next call."""
    key = (grids, config, device)
    found = _known.pop(key, None)
    if found is None:
        # It outlives this call: no tensors of inference mode, which other calls could not use outside of it.
        with torch.inference_mode(False), torch.no_grad():
            found = _build(grids, config, device)
    _known[key] = found
    while sum(layout.patches for layout in _known.values()) > KEPT_PATCHES:
        _known.popitem(last=False)
    return found


def _build(grids: tuple[Grid, ...], config: VisionConfig, device: torch.device) -> VisionLayout:
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
    rank = np.empty_like(token_order)
    rank[token_order] = np.arange(len(token_order))
    on_host = {
        "patch_order": patch_order,
        "token_order": token_order,
        "token_rank": rank,
        "cu_frames": _offsets(frames, unit),
        "cu_windows": _offsets(windows, unit),
        "cu_token_frames": _offsets(frames),
        "cu_token_windows": _offsets(windows),
        "rows": token_rows,
        "cols": token_cols,
        "patch_rows": patch_rows,
        "patch_cols": patch_cols,
    }
    sent = upload_together([torch.from_numpy(np.ascontiguousarray(a)) for a in on_host.values()], device)
    return VisionLayout(
        grids=grids,
        longest_frame=max(frames) * unit,
        longest_window=max(windows) * unit,
        config=config,
        **dict(zip(on_host, sent, strict=True)),
    )


def _offsets(sizes: list[int], unit: int = 1) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes) * unit]).astype(np.int32)

# SPDX-License-Identifier: Apache-2.0
"""`patchify` in Triton: one launch from bytes to patches.

A byte of a channel has 256 values to become, so they are looked up: the arithmetic is that of the definition, done once on
the host, and the result the same bit for bit on every device. Every byte is loaded once and stored temporal_patch_size
times. A resize is not part of the kernel; `resize` runs before it on the same device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from glimpse_kernels import _triton
from glimpse_kernels.patchify.naive import normalise
from glimpse_kernels.patchify.resident import Resident
from glimpse_kernels.patchify.triton_resize import resize


@dataclass(frozen=True)
class Run(_triton.Launch):
    """values: bytes of the picture that one program takes."""

    values: int = 1024


CONFIGS: _triton.Configs[Run] = _triton.Configs(
    "patchify",
    {(80, None): Run(warps=4, values=1024)},
    candidates=[Run(warps=w, values=v) for w in (4, 8) for v in (512, 1024, 2048, 4096)],
)


@triton.jit(do_not_specialize=["total", "image_stride", "groups_x"])
def patchify_kernel(
    image,
    table,
    out,
    total,
    image_stride,
    groups_x,  # groups of merged patches along a row of the picture
    PATCH: tl.constexpr,
    MERGE: tl.constexpr,
    FRAMES: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    AREA: tl.constexpr = PATCH * PATCH
    VALUES: tl.constexpr = CHANNELS * AREA
    # Counted along the patches and, inside one, as a row of the result without its repeated frames. What may be large is a
    # scalar of 64 bits, so that the vectors divide in 32.
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    live = start + lane < total
    first = start // VALUES
    local = (start % VALUES).to(tl.int32) + lane
    value = local % VALUES
    channel, pixel = value // AREA, value % AREA
    band = groups_x * (MERGE * MERGE)  # patches of one row of groups
    within = (first % band).to(tl.int32) + local // VALUES
    group, member = within % band // (MERGE * MERGE), within % (MERGE * MERGE)
    y = (first // band + within // band) * (MERGE * PATCH) + member // MERGE * PATCH + pixel // PATCH
    x = group * (MERGE * PATCH) + member % MERGE * PATCH + pixel % PATCH
    byte = tl.load(image + y * image_stride + x * CHANNELS + channel, mask=live, other=0)
    found = tl.load(table + byte.to(tl.int32) * CHANNELS + channel, mask=live, other=0.0)
    place = out + (first + local // VALUES) * (FRAMES * VALUES) + channel * (FRAMES * AREA) + pixel
    for frame in tl.static_range(FRAMES):
        tl.store(place + frame * AREA, found, mask=live)


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
    image = resize(image, size, resample, down_first)
    height, width, channels = image.shape
    values = channels * patch_size * patch_size
    if out is None:
        patches = height * width // (patch_size * patch_size)
        out = torch.empty(patches, temporal_patch_size * values, dtype=dtype, device=image.device)
    total = image.numel()
    if not total:
        return out
    table = TABLES.on(image.device, tuple(mean), tuple(std), rescale, dtype)
    config = CONFIGS.pick(_triton.chip(image.device).capability, None)
    patchify_kernel[(triton.cdiv(total, config.values),)](
        image,
        table,
        out,
        total,
        image.stride(0),
        width // (patch_size * merge_size),
        PATCH=patch_size,
        MERGE=merge_size,
        FRAMES=temporal_patch_size,
        CHANNELS=channels,
        BLOCK=config.values,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out


def _table(mean: tuple[float, ...], std: tuple[float, ...], rescale: float, dtype: torch.dtype) -> Tensor:
    every = torch.arange(256, dtype=torch.uint8, device="cpu")[:, None].expand(256, len(mean))
    return normalise(every, mean, std, rescale).to(dtype)


TABLES = Resident(_table)
"""[256, channels]: what the definition makes of every byte, computed on the CPU."""

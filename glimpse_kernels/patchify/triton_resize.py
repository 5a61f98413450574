# SPDX-License-Identifier: Apache-2.0
"""The resize that comes before the patches, in Triton: one launch for each direction, byte for byte Pillow's.

All is in integers, so the order of the sums says nothing about the result. What lies between the two launches is the picture
with one side of its old length, in bytes; nothing larger is allocated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from glimpse_kernels import _triton
from glimpse_kernels.patchify.filters import FRACTION_BITS
from glimpse_kernels.patchify.naive import TABLES

ALIGNMENT = 16
"""Bytes that a thread loads or stores at once; rows of what is made here begin at multiples of it."""


@dataclass(frozen=True)
class Run(_triton.Launch):
    """rows, values: of the result that one program makes: picture rows, and bytes of each."""

    rows: int = 4
    values: int = 256


CONFIGS: _triton.Configs[Run] = _triton.Configs(
    "resize",
    {(80, "across"): Run(warps=4, rows=16, values=128), (80, "down"): Run(warps=4, rows=8, values=256)},
    candidates=[Run(warps=w, rows=r, values=v) for w in (4, 8) for r in (4, 8, 16) for v in (128, 256, 512)],
)


# Whatever the sizes of a picture, it is the same kernel: none is compiled in the middle of serving.
@triton.jit(
    do_not_specialize=[
        "rows", "line", "blocks", "length_in", "length_out", "taps", "image_stride", "out_stride",
    ]
)  # fmt: skip
def resize_kernel(
    image,
    table,
    out,
    rows,
    line,  # bytes of a row to read, if the height changes; in units
    blocks,  # programs along a row of the result
    length_in,  # of the side that changes, in pixels
    length_out,
    taps,
    image_stride,  # in units
    out_stride,  # in pieces of 16 bytes
    ACROSS: tl.constexpr,  # the width changes, else the height
    CHANNELS: tl.constexpr,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,  # in bytes: 16 where line and image_stride are multiples of that, else 1
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    byte = (program % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    # Multiplied here, they are known to be multiples: bytes of a row are then loaded and stored 16 at once.
    line *= UNIT
    image_stride *= UNIT
    out_stride *= 16
    if ACROSS:
        place = byte // CHANNELS
        there = place < length_out
        live = there & (row < rows)
        first = tl.load(table + place, mask=there, other=0)
        source = image + row.to(tl.int64) * image_stride + (first * CHANNELS + byte % CHANNELS)
        step = CHANNELS
    else:
        place = row
        there = row < rows
        live = there & (byte < line)
        first = tl.load(table + place, mask=there, other=0)
        source = image + first.to(tl.int64) * image_stride + byte
        step = image_stride
    weights = table + length_out + place
    total = tl.full([ROWS, BLOCK], 1 << (BITS - 1), tl.int32)
    for tap in range(taps):
        weight = tl.load(weights, mask=there, other=0)
        # Past the end the weight is 0, and there is nothing to load.
        pixel = tl.load(source, mask=live & (first + tap < length_in), other=0)
        total += pixel.to(tl.int32) * weight
        weights += length_out
        source += step
    found = tl.minimum(tl.maximum(total >> BITS, 0), 255).to(tl.uint8)
    tl.store(out + row.to(tl.int64) * out_stride + byte, found, mask=(row < rows) & (byte < out_stride))


def resize(image: Tensor, size: tuple[int, int], resample: str, down_first: bool = False) -> Tensor:
    """[H, W, C] uint8, row stride free → [height, width, C] uint8 as Pillow's `Image.resize` has it, with some room behind each
    row; `image` itself where it has that size. The host waits for nothing."""
    height, width, channels = image.shape
    line = width * channels
    for across in (False, True) if down_first else (True, False):
        length_in, length = (width, size[1]) if across else (height, size[0])
        if length_in == length:
            continue
        image = _one_way(image, line, channels, length_in, length, resample, across)
        # The next pass also reads the room, which spares it a look at where a row ends.
        line = image.shape[1]
        height, width = (height, length) if across else (length, width)
    return image if image.dim() == 3 else image[:, : width * channels].unflatten(1, (width, channels))


def _one_way(
    image: Tensor, line: int, channels: int, length_in: int, length: int, resample: str, across: bool
) -> Tensor:
    """[length or H, n] uint8: rows of bytes with room up to a multiple of 16."""
    table = TABLES.on(image.device, length_in, length, resample)
    rows = image.shape[0] if across else length
    used = length * channels if across else line
    room = -(-used // ALIGNMENT) * ALIGNMENT
    out = torch.empty(rows, room, dtype=torch.uint8, device=image.device)
    config = CONFIGS.pick(_triton.chip(image.device).capability, "across" if across else "down")
    blocks = triton.cdiv(room, config.values)
    stride = image.stride(0)
    unit = 1 if across or line % ALIGNMENT or stride % ALIGNMENT else ALIGNMENT
    resize_kernel[(blocks * triton.cdiv(rows, config.rows),)](
        image,
        table,
        out,
        rows,
        line // unit,
        blocks,
        length_in,
        length,
        table.shape[0] - 1,
        stride // unit,
        room // ALIGNMENT,
        ACROSS=across,
        CHANNELS=channels,
        BITS=FRACTION_BITS,
        UNIT=unit,
        ROWS=config.rows,
        BLOCK=config.values,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out

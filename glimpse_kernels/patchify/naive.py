# SPDX-License-Identifier: Apache-2.0
"""Definition of `patchify` in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

FRACTION_BITS = 22  # of a weight: 32 bits less 8 of the pixel less 2 for sums outside of 0..1


def patchify(
    image: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    size: tuple[int, int] | None = None,
    resample: str = "bicubic",
    down_first: bool = False,
    patch_size: int = 14,
    temporal_patch_size: int = 2,
    merge_size: int = 2,
    rescale: float = 1 / 255,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """See `glimpse_kernels.patchify`."""
    if size is not None:
        image = resize(image, size, resample, down_first)
    height, width, channels = image.shape
    p, m = patch_size, merge_size
    x = normalise(image.contiguous(), mean, std, rescale)
    # rows: (group row, group column, row in group, column in group); columns: (channel, frame, y, x)
    x = x.view(height // (p * m), m, p, width // (p * m), m, p, channels)
    x = x.permute(0, 3, 1, 4, 6, 2, 5).unsqueeze(5).expand(-1, -1, -1, -1, -1, temporal_patch_size, -1, -1)
    patches = x.reshape(-1, channels * temporal_patch_size * p * p)
    return patches.to(dtype) if out is None else out.copy_(patches)


def normalise(image: Tensor, mean: Sequence[float], std: Sequence[float], rescale: float) -> Tensor:
    """[..., C] uint8 → [..., C] float32: rescaled in double and rounded, then shifted and divided in single, in the order of
    the NumPy processor."""
    x = (image.double() * rescale).float()
    shift, scale = (torch.tensor(list(v), dtype=torch.float32, device=x.device) for v in (mean, std))
    return (x - shift) / scale


def resize(image: Tensor, size: tuple[int, int], resample: str, down_first: bool = False) -> Tensor:
    """[H, W, C] uint8 → [height, width, C] uint8 as Pillow's `Image.resize` has it.

    Along the rows and then down the columns, or the other way round; each time back to bytes.
    """
    for dim in (0, 1) if down_first else (1, 0):
        image = _resize_first(image.transpose(0, dim), size[dim], resample).transpose(0, dim)
    return image


def _resize_first(x: Tensor, length: int, resample: str) -> Tensor:
    """[n, ...] uint8 → [length, ...] uint8: every output pixel is a weighted sum of neighbours, rounded and clipped."""
    if x.shape[0] == length:
        return x
    # On an accelerator a copy for every tap would make the host wait as often.
    first, weights = (t.to(x.device) for t in filter_weights(x.shape[0], length, resample))
    total = torch.full((length, *x.shape[1:]), 1 << (FRACTION_BITS - 1), dtype=torch.int32, device=x.device)
    for tap in range(weights.shape[1]):
        neighbours = x[(first + tap).clamp(max=x.shape[0] - 1)]  # past the end the weight is 0
        total += neighbours * weights[:, tap].view(-1, *[1] * (x.dim() - 1))
    return (total >> FRACTION_BITS).clamp(0, 255).to(torch.uint8)


@lru_cache(maxsize=64)
def filter_weights(length_in: int, length_out: int, resample: str) -> tuple[Tensor, Tensor]:
    """First input pixel [out] int64 and weights [out, taps] int32, in units of 2**-22, of every output pixel.

    Tensors on the CPU, kept for the next call: not to be written to.

    The filter stands over the output pixel's centre. Where the picture shrinks it is stretched by the scale, so that it
    averages (antialiasing).
    """
    support, value = FILTERS[resample]
    scale = length_in / length_out
    stretch = max(scale, 1.0)
    reach = support * stretch
    taps = 2 * math.ceil(reach) + 1
    first = []
    weights = torch.zeros(length_out, taps, dtype=torch.int32, device="cpu")
    for i in range(length_out):
        centre = (i + 0.5) * scale
        begin = max(int(centre - reach + 0.5), 0)
        end = min(int(centre + reach + 0.5), length_in)
        values = [value((x - centre + 0.5) * (1.0 / stretch)) for x in range(begin, end)]
        total = 0.0
        for v in values:  # one after the other: sum() of newer Pythons compensates
            total += v
        shares = [v / total if total else v for v in values]
        rounded = [int(s * 2**FRACTION_BITS + math.copysign(0.5, s)) for s in shares]
        weights[i, : len(rounded)] = torch.tensor(rounded, dtype=torch.int32, device="cpu")
        first.append(begin)
    return torch.tensor(first, device="cpu"), weights


def _box(x: float) -> float:
    return 1.0 if -0.5 < x <= 0.5 else 0.0


def _bilinear(x: float) -> float:
    return max(1.0 - abs(x), 0.0)


def _hamming(x: float) -> float:
    x = abs(x)
    if x == 0.0:
        return 1.0
    if x >= 1.0:
        return 0.0
    angle = x * math.pi
    a, b = torch.tensor([0.54, 0.46], device="cpu").tolist()  # Pillow holds these two in single precision
    return math.sin(angle) / angle * (a + b * math.cos(angle))


def _bicubic(x: float) -> float:
    """Cubic convolution with a = -1/2 (Keys 1981, equation 15)."""
    x = abs(x)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5 if x < 2.0 else 0.0


def _sinc(x: float) -> float:
    return math.sin(x * math.pi) / (x * math.pi) if x else 1.0


def _lanczos(x: float) -> float:
    return _sinc(x) * _sinc(x / 3.0) if -3.0 <= x < 3.0 else 0.0


FILTERS: dict[str, tuple[float, Callable[[float], float]]] = {
    "box": (0.5, _box),
    "bilinear": (1.0, _bilinear),
    "hamming": (1.0, _hamming),
    "bicubic": (2.0, _bicubic),
    "lanczos": (3.0, _lanczos),
}
"""Filter → how far it reaches to either side, and its value at a distance, both in output pixels where it shrinks."""

# SPDX-License-Identifier: Apache-2.0
"""Weights of a resize: how much of which input pixels goes into every output pixel, in Pillow's arithmetic.

The filter stands over the output pixel's centre. Where the picture shrinks it is stretched by the scale, so that it averages
(antialiasing).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

FRACTION_BITS = 22  # of a weight: 32 bits less 8 of the pixel less 2 for sums outside of 0..1

Array: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"


@lru_cache(maxsize=64)
def filter_table(length_in: int, length_out: int, resample: str) -> Tensor:
    """[1 + taps, length_out] int32 of the host: the first input pixel of every output pixel, then its weights, one row a tap, in
    units of 2**-22. Kept for the next call: not to be written to.

    Past the end of the picture weights are 0.
    """
    support, value = FILTERS[resample]
    scale = length_in / length_out
    stretch = max(scale, 1.0)
    reach = support * stretch
    taps = 2 * math.ceil(reach) + 1
    centre = (np.arange(length_out) + 0.5) * scale
    begin = np.maximum((centre - reach + 0.5).astype(np.int64), 0)
    end = np.minimum((centre + reach + 0.5).astype(np.int64), length_in)
    pixel = begin + np.arange(taps)[:, None]
    values = np.where(pixel < end, value((pixel - centre + 0.5) * (1.0 / stretch)), 0.0)
    total = values.cumsum(axis=0)[-1]  # one after the other, as Pillow adds; sum() pairs
    shares = np.divide(values, total, out=values, where=total != 0)
    table = np.empty((1 + taps, length_out), np.int32)
    table[0] = begin
    table[1:] = shares * 2**FRACTION_BITS + np.copysign(0.5, shares)
    return torch.from_numpy(table)


def _one_by_one(function: Callable[[float], float]) -> Callable[[Array], Array]:
    """By the C library, as in Pillow: NumPy's own sine may differ from it in the last bit."""
    each = np.frompyfunc(function, 1, 1)
    return lambda x: np.asarray(each(x), np.float64)


_sin, _cos = _one_by_one(math.sin), _one_by_one(math.cos)


def _box(x: Array) -> Array:
    return np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)


def _bilinear(x: Array) -> Array:
    return np.maximum(1.0 - np.abs(x), 0.0)


def _hamming(x: Array) -> Array:
    x = np.abs(x)
    angle = np.where(x == 0.0, 1.0, x * math.pi)
    a, b = float(np.float32(0.54)), float(np.float32(0.46))  # Pillow holds these two in single precision
    found = _sin(angle) / angle * (a + b * _cos(angle))
    return np.where(x == 0.0, 1.0, np.where(x < 1.0, found, 0.0))


def _bicubic(x: Array) -> Array:
    """Cubic convolution with a = -1/2 (Keys 1981, equation 15)."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _sinc(x: Array) -> Array:
    angle = np.where(x == 0.0, 1.0, x * math.pi)
    return np.where(x == 0.0, 1.0, _sin(angle) / angle)


def _lanczos(x: Array) -> Array:
    return np.where((x >= -3.0) & (x < 3.0), _sinc(x) * _sinc(x / 3.0), 0.0)


FILTERS: dict[str, tuple[float, Callable[[Array], Array]]] = {
    "box": (0.5, _box),
    "bilinear": (1.0, _bilinear),
    "hamming": (1.0, _hamming),
    "bicubic": (2.0, _bicubic),
    "lanczos": (3.0, _lanczos),
}
"""Filter → how far it reaches to either side, and its value at a distance, both in output pixels where it shrinks."""

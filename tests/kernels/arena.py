# SPDX-License-Identifier: Apache-2.0
"""Tensors that reach further than memory: addresses past 2^31 elements, and only the pages that are touched exist."""

from __future__ import annotations

import gc
import mmap
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests import stand_in

NORESERVE = 0x4000
"""Linux's MAP_NORESERVE, which `mmap` names from Python 3.13 on."""

SPARE = 2**30
"""Bytes of a GPU that are left alone."""


def reach(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last of a strided tensor, both counted."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def sparse_tensor(
    shape: Sequence[int],
    strides: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """A tensor of zeros with these strides (contiguous if None) in a mapping of its own, on the default device.

    On the CPU a page costs memory once it is written; what reads all of a storage would still take very long, so do nothing
    with the whole of it. On a GPU all of it is allocated, and the test is skipped where that does not fit.
    """
    if strides is None:
        strides = torch.empty(tuple(shape), device="meta").stride()
    device = torch.get_default_device() if device is None else torch.device(device)
    count = reach(shape, strides)
    size = count * dtype.itemsize
    if device.type == "cuda" and not stand_in.active():
        gc.collect()  # what a failed test held
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
        if size > free - SPARE:
            pytest.skip(f"needs {size / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} GiB are free")
        return torch.zeros(count, dtype=dtype, device=device).as_strided(tuple(shape), tuple(strides))
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    with torch.device("cpu"):
        found = torch.frombuffer(pages, dtype=dtype, count=count).as_strided(tuple(shape), tuple(strides))
    return stand_in.adopt(found) if device.type == "cuda" else found


def spread(tensor: Tensor, dim: int, step: int) -> Tensor:
    """The same values with the elements of `dim` this far apart, the other dimensions contiguous."""
    strides = list(torch.empty(tensor.shape[:dim] + tensor.shape[dim + 1 :], device="meta").stride())
    found = sparse_tensor(tensor.shape, [*strides[:dim], step, *strides[dim:]], tensor.dtype, tensor.device)
    return found.copy_(tensor)

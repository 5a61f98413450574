# SPDX-License-Identifier: Apache-2.0
"""Checks of tensor arguments. Every message names the argument, what was expected and what was found."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPE_CODES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""`glimpse_dtype` of csrc/include/glimpse/common.h."""


def describe(t: object) -> str:
    """Short description of an argument for an error message."""
    if isinstance(t, Tensor):
        return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} on {t.device}"
    return f"{type(t).__name__}"


def expect_tensor(op: str, name: str, t: object) -> Tensor:
    """`t` itself; TypeError unless it is a tensor."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name}: expected a torch.Tensor, found {describe(t)}")
    return t


def expect_tensors(op: str, **tensors: object) -> None:
    """TypeError unless all of these are tensors."""
    for name, t in tensors.items():
        expect_tensor(op, name, t)


def expect_head_dim(op: str, q: Tensor) -> None:
    """ValueError unless the heads of `q [T, Hq, D]` have at least one dimension."""
    if q.shape[-1] < 1:
        raise ValueError(f"{op}: q: expected a head dimension D of at least 1, found {describe(q)}")


def expect_shape(op: str, name: str, t: Tensor, shape: Sequence[int | None], text: str = "") -> None:
    """ValueError unless `t` has this shape. None accepts any size; `text` is the shape in words, e.g. "[T, Hq, D]"."""
    found = t.shape
    if len(found) == len(shape):
        for size, want in zip(found, shape):  # noqa: B905 (same length; `strict` costs time on this hot path)
            if size != want and want is not None:
                break
        else:
            return
    sizes = ", ".join("*" if s is None else str(s) for s in shape)
    words = f"{text} = " if text else ""
    raise ValueError(f"{op}: {name}: expected shape {words}[{sizes}], found {describe(t)}")


def expect_dtype(op: str, name: str, t: Tensor, *dtypes: torch.dtype) -> None:
    """TypeError unless `t` has one of these dtypes."""
    if t.dtype not in dtypes:
        words = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: {name}: expected dtype {words}, found {describe(t)}")


def expect_same_device(op: str, device: torch.device, **tensors: Tensor | None) -> None:
    """ValueError unless all given tensors are on `device`."""
    for name, t in tensors.items():
        if t is not None and t.device != device:
            raise ValueError(f"{op}: {name}: expected device {device}, found {describe(t)}")


def expect_last_contiguous(op: str, **tensors: Tensor | None) -> None:
    """ValueError unless the last dimension of every given tensor has stride 1."""
    for name, t in tensors.items():
        if t is not None and t.stride(-1) != 1 and t.shape[-1] > 1 and t.numel():
            raise ValueError(
                f"{op}: {name}: expected a contiguous last dimension, found strides {list(t.stride())} "
                f"for {describe(t)}"
            )


def expect_cu_seqlens(op: str, name: str, t: Tensor, segments: int | None = None) -> None:
    """A [B+1] int32 contiguous vector. Its values are not read: on an accelerator that would make the host wait."""
    expect_dtype(op, name, t, torch.int32)
    if t.dim() != 1 or t.numel() < 1:
        raise ValueError(f"{op}: {name}: expected shape [B+1] with B >= 0, found {describe(t)}")
    if segments is not None:
        expect_shape(op, name, t, (segments + 1,), "[B+1]")
    expect_contiguous(op, name, t)


def expect_contiguous(op: str, name: str, t: Tensor) -> None:
    """ValueError unless `t` is contiguous."""
    if not t.is_contiguous():
        raise ValueError(
            f"{op}: {name}: expected a contiguous tensor, found strides {list(t.stride())} for {describe(t)}"
        )


def expect_count(op: str, name: str, value: int, *, least: int = 0) -> None:
    """ValueError unless `value` is at least `least`."""
    if value < least:
        raise ValueError(f"{op}: {name}: expected at least {least}, found {value}")


def needs_grad(*tensors: Tensor | None) -> bool:
    """True if autograd has to record an op on these tensors (the compiled kernels have no backward)."""
    if not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in tensors)

# SPDX-License-Identifier: Apache-2.0
"""Who computes `attention` on a GPU when nobody forced a backend: our kernel, torch's or flash-attn's, as measured there.

On a GPU of the record (`glimpse_kernels.measured`) the fastest provider serves that serves the call at all; for kinds of calls
that were not measured, our kernel if it has passed its tests on a GPU (`glimpse_kernels.proof`), else a library that was
measured on other kinds. On any other GPU `dispatch` chooses as for every op.

The choice depends on shapes alone, never on a length on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from glimpse_kernels import dispatch, measured, proof

OURS = "triton"
OTHERS = ("torch_flash", "flash_attn")
"""Modules beside this one, each with `attention` (the op) and `serves(call) -> reason against it, or ""`."""


@dataclass(frozen=True)
class Call:
    """What the choice knows of a call.

    segments: how many. queries, keys: rows of q and of k. bounded: whether the caller gave the longest query segment.
    aligned: whether all rows and heads start at multiples of 16 bytes. rising: whether the scale is positive.
    """

    dtype: torch.dtype
    dim: int
    v_dim: int
    heads: int
    kv_heads: int
    causal: bool
    positions: bool
    segments: int
    queries: int
    keys: int
    bounded: bool
    aligned: bool = True
    rising: bool = True

    def key(self) -> str:
        """The kind of call that measurements are kept by; lengths are the nearest powers of two of the averages."""
        name = measured.dtype_name(self.dtype)
        mask = "positions" if self.positions else "causal" if self.causal else "full"
        shared = "grouped" if self.heads != self.kv_heads else "each"
        lengths = "x".join(str(measured.bucket(n / max(self.segments, 1))) for n in (self.queries, self.keys))
        return f"{name} {mask} {self.dim}/{self.v_dim} {shared} {lengths}"


def against(provider: str, call: Call) -> str:
    """Why a library's attention does not serve this call; empty if it does."""
    return str(import_module(f"glimpse_kernels.attention.{provider}").serves(call))


@lru_cache(maxsize=4096)
def choose(call: Call, device: str) -> str:
    """`OURS` or one of `OTHERS`, for a GPU of this name."""
    cases, ours = measured.of(device, "attention"), proof.proven("attention", OURS)
    times = cases.get(call.key(), {})
    for provider in sorted(times, key=lambda name: times[name]):
        if (provider == OURS and ours) or (provider in OTHERS and not against(provider, call)):
            return provider
    if not ours:
        for provider in OTHERS:
            if any(provider in others for others in cases.values()) and not against(provider, call):
                return provider
    return OURS


def _aligned(t: Tensor) -> bool:
    return t.data_ptr() % 16 == 0 and not (t.stride(0) | t.stride(1)) * t.element_size() % 16


def provider(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segments: int,
    causal: bool,
    scale: float | None,
    positions: bool,
    bounded: bool,
) -> Callable[..., Any] | None:
    """The `attention` of the library that serves these tensors on their GPU; None if `dispatch` is to choose a backend."""
    if dispatch.forced_backend() != "auto":
        return None
    call = Call(
        dtype=q.dtype,
        dim=q.shape[2],
        v_dim=v.shape[2],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        causal=causal,
        positions=positions,
        segments=segments,
        queries=q.shape[0],
        keys=k.shape[0],
        bounded=bounded,
        aligned=_aligned(q) and _aligned(k) and _aligned(v),
        rising=scale is None or scale > 0,
    )
    chosen = choose(call, measured.gpu(q.device.index))
    return None if chosen == OURS else import_module(f"glimpse_kernels.attention.{chosen}").attention

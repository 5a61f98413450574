# SPDX-License-Identifier: Apache-2.0
"""Rows that are copied, merged, rotated, normed or gated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

import glimpse_kernels as gk
from glimpse_kernels.library.registry import like_first, nothing, register


def _compact(
    index: Tensor,
    slots: Tensor | None,
    k_src: Tensor | None,
    v_src: Tensor | None,
    k_dst: Tensor | None,
    v_dst: Tensor | None,
    row_src: Sequence[Tensor],
    row_dst: Sequence[Tensor],
) -> None:
    if len(row_src) != len(row_dst):
        raise ValueError(
            f"compact: row_dst: expected {len(row_src)} tensors, one per row_src, found {len(row_dst)}"
        )
    gk.compact(index, slots, k_src, v_src, k_dst, v_dst, list(zip(row_src, row_dst, strict=True)))


def _merge_nearest(
    values: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    *,
    sources: Tensor | None = None,
    metric: Tensor | None = None,
    how: str = "mean",
) -> tuple[Tensor, Tensor]:
    return gk.merge_nearest(values, targets, cu_seqlens, sources=sources, metric=metric, how=how)


def _merge_nearest_fake(
    values: Tensor, _targets: Tensor, cu_seqlens: Tensor, **__: Any
) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape), cu_seqlens.new_empty(values.shape[0])


def _rope(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor) -> None:
    gk.rope(q, k, cos, sin)


def _rope_write(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_out: Tensor,
    *,
    v: Tensor | None = None,
    v_out: Tensor | None = None,
    slots: Tensor | None = None,
) -> None:
    gk.rope(q, k, cos, sin, v=v, k_out=k_out, v_out=v_out, slots=slots)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return gk.rms_norm(x, weight, eps)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return gk.rms_norm(x, weight, eps, residual=residual)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gk.swiglu(gate, up)


register(
    "compact(Tensor index, Tensor? slots, Tensor? k_src, Tensor? v_src, Tensor(a!)? k_dst, Tensor(b!)? v_dst, "
    "Tensor[] row_src, Tensor(c!)[] row_dst) -> ()",
    _compact,
    nothing,
)
register(
    "merge_nearest(Tensor values, Tensor targets, Tensor cu_seqlens, *, Tensor? sources=None, Tensor? metric=None, "
    "str how='mean') -> (Tensor, Tensor)",
    _merge_nearest,
    _merge_nearest_fake,
)
register("rope(Tensor(a!) q, Tensor(b!)? k, Tensor cos, Tensor sin) -> ()", _rope, nothing)
register(
    "rope_write(Tensor(a!) q, Tensor k, Tensor cos, Tensor sin, Tensor(b!) k_out, *, "
    "Tensor? v=None, Tensor(c!)? v_out=None, Tensor? slots=None) -> ()",
    _rope_write,
    nothing,
)
register("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _rms_norm, like_first)
register(
    "add_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float eps) -> Tensor",
    _add_rms_norm,
    like_first,
)
register("swiglu(Tensor gate, Tensor up) -> Tensor", _swiglu, like_first)

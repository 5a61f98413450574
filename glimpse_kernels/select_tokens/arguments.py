# SPDX-License-Identifier: Apache-2.0
"""What the compiled kernels of `select_tokens` are given, on a CPU and on a GPU alike: addresses, sizes and strides in the order of
csrc/python/bind_select_tokens.cpp."""

from __future__ import annotations

from torch import Tensor

from glimpse_kernels.select_tokens.selection import Selection


def arguments(
    logits: Tensor,
    cu_groups: Tensor,
    threshold: float,
    caps: Tensor,
    floors: Tensor,
    forced: Tensor | None,
    token_rows: Tensor,
    row_keep: Tensor,
    cu_seqlens: Tensor,
    into: Selection,
) -> tuple[int | float, ...]:
    """As the op has them; `into` is where the results go."""
    return (
        logits.data_ptr(),
        cu_groups.data_ptr(),
        caps.data_ptr(),
        floors.data_ptr(),
        0 if forced is None else forced.data_ptr(),
        token_rows.data_ptr(),
        row_keep.data_ptr(),
        cu_seqlens.data_ptr(),
        into.keep.data_ptr(),
        into.counts.data_ptr(),
        into.index.data_ptr(),
        into.cu_seqlens.data_ptr(),
        logits.shape[0],
        cu_groups.shape[0] - 1,
        row_keep.shape[0],
        cu_seqlens.shape[0] - 1,
        into.index.shape[0],
        threshold,
    )

# SPDX-License-Identifier: Apache-2.0
"""`compact` in C++ (csrc/cpu/compact.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from glimpse_kernels._ext import extension
from glimpse_kernels.compact.copies import copies, flat


def compact(
    index: Tensor,
    slots: Tensor | None,
    k_src: Tensor | None,
    v_src: Tensor | None,
    k_dst: Tensor | None,
    v_dst: Tensor | None,
    rows: Sequence[tuple[Tensor, Tensor]] = (),
) -> None:
    """See `glimpse_kernels.compact`; arguments are checked there."""
    extension().compact(
        index.data_ptr(),
        0 if slots is None else slots.data_ptr(),
        index.shape[0],
        flat(copies(k_src, v_src, k_dst, v_dst, rows)),
    )

# SPDX-License-Identifier: Apache-2.0
"""What the libraries' FlashAttention-2 has in common: what it serves, and what is left to do behind it.

It leaves rows outside all segments unwritten, gives +inf as the lse of a row that sees no key, and lays the lse out by heads.
One small kernel puts that right, without the host learning a length. (One difference stays: where a query is NaN so is its
output, but not its lse, which is -inf.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from glimpse_kernels import _triton

if TYPE_CHECKING:
    from glimpse_kernels.attention.choice import Call

LOOSE_SEGMENTS = 4
"""Segments up to which the number of all rows is a bearable bound of the longest: the grid is that many times too large."""


def against(call: Call) -> str:
    """Why no FlashAttention-2 serves this call; empty if it might."""
    if call.dtype not in (torch.float16, torch.bfloat16):
        return f"has 16-bit kernels only, not {str(call.dtype).removeprefix('torch.')}"
    if call.dim != call.v_dim:
        return f"needs equal head dimensions, not {call.dim} and {call.v_dim}"
    if call.dim > 256 or call.dim % 8:
        return f"has head dimensions up to 256 in steps of 8, not {call.dim}"
    if call.positions:
        return "has no q_positions"
    if not (call.segments and call.queries and call.keys and call.heads):
        return "is not asked about nothing"
    if not call.rising:
        return "needs a positive scale"
    if not call.aligned:
        return "needs rows and heads that start at multiples of 16 bytes"
    if not call.bounded and call.segments > LOOSE_SEGMENTS:
        return f"needs the longest segment on the host (max_seqlen_q) for {call.segments} segments"
    return ""


def longest(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, hint: int | None
) -> tuple[int, int]:
    """Upper bounds of the longest segment of q and of k, from shapes and the caller's word.

    A bound of 1 says more to the libraries than it may: where key heads are shared they then take row i for segment i, without
    a look at cu_seqlens_q, although an empty segment or a row outside all of them shifts the rows. So 1 is for a lone row.
    """
    most = q.shape[0] if hint is None else max(1, min(hint, q.shape[0]))
    if most == 1 and (q.shape[0] > 1 or cu_seqlens_q.shape[0] > 2):
        most = 2
    same = cu_seqlens_q is cu_seqlens_k and q.shape[0] == k.shape[0]
    return most, most if same else k.shape[0]


def finish(
    found: Tensor, logs: Tensor | None, cu_seqlens_q: Tensor, out: Tensor | None, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """Results as `glimpse_kernels.attention` gives them.

    found: [Tq, Hq, D] as the library left it. logs: its lse [Hq, Tq], needed if `return_lse`. RuntimeError for another layout.
    """
    from glimpse_kernels.attention.triton_finish import attention_finish_kernel

    rows, heads, dim = found.shape
    if out is not None:
        found = out.copy_(found)
    lse = None
    if return_lse:
        if logs is None or logs.shape != (heads, rows) or logs.stride(1) != 1:
            shape = None if logs is None else list(logs.shape)
            raise RuntimeError(
                f"attention: expected an lse of shape [Hq, Tq] = [{heads}, {rows}], found {shape}"
            )
        lse = torch.empty((rows, heads), dtype=torch.float32, device=found.device)
    block = 16
    attention_finish_kernel[(-(-rows // block),)](
        found, found if logs is None else logs, found if lse is None else lse, cu_seqlens_q,
        found.stride(0), found.stride(1), 0 if logs is None else logs.stride(0), rows, cu_seqlens_q.shape[0] - 1,
        heads, dim, LSE=lse is not None, BLOCK=block, HEADS=max(16, _triton.power_of_2(heads)),
        DIM=max(16, _triton.power_of_2(dim)), num_warps=4,
    )  # fmt: skip
    return found if lse is None else (found, lse)

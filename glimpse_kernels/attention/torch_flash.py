# SPDX-License-Identifier: Apache-2.0
"""`attention` by the FlashAttention-2 that PyTorch brings, through the operator below `torch.nn.attention.varlen`.

That function checks for equal heads in some releases and renamed its causal argument in others; the operator takes fewer key
heads in all of them, and aligns its causal mask to the bottom right as this package does.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from glimpse_kernels import _triton
from glimpse_kernels.attention import _flash

if TYPE_CHECKING:
    from glimpse_kernels.attention.choice import Call


@lru_cache(maxsize=1)
def missing() -> str:
    """Why this PyTorch has no such operator; empty if it has one."""
    if _triton.missing():
        return _triton.missing()
    if not torch.backends.cuda.is_built():
        return "PyTorch is built without CUDA"
    if not torch.backends.cuda.is_flash_attention_available():
        return "PyTorch is built without FlashAttention"
    if not hasattr(torch.ops.aten, "_flash_attention_forward"):
        return "PyTorch has no _flash_attention_forward"
    return ""


def serves(call: Call) -> str:
    """Why this does not serve the call; empty if it does."""
    return missing() or _flash.against(call)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    q_positions: Tensor | None = None,
    max_seqlen_q: int | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `glimpse_kernels.attention`; for calls that `serves` has nothing against."""
    most_q, most_k = _flash.longest(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q)
    found = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, most_q, most_k, 0.0, causal, False, scale=scale
    )
    return _flash.finish(found[0], found[1], cu_seqlens_q, out, return_lse)

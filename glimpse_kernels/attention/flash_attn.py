# SPDX-License-Identifier: Apache-2.0
"""`attention` by the flash-attn package, where it is installed."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import TYPE_CHECKING

from torch import Tensor

from glimpse_kernels import _triton
from glimpse_kernels.attention import _flash

if TYPE_CHECKING:
    from glimpse_kernels.attention.choice import Call

OLDEST = (2, 6)
"""First release whose lse is [Hq, Tq]; the causal mask is aligned to the bottom right since 2.1."""


@lru_cache(maxsize=1)
def missing() -> str:
    """Why the package cannot be used; empty if it can."""
    if _triton.missing():
        return _triton.missing()
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    try:
        import flash_attn
    except Exception as problem:  # built for another PyTorch: whatever it raises, it is of no use
        return f"flash-attn does not load: {problem}"
    version = str(getattr(flash_attn, "__version__", "0"))
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < OLDEST or not hasattr(flash_attn, "flash_attn_varlen_func"):
        return f"flash-attn {version} is older than {OLDEST[0]}.{OLDEST[1]}, or lacks flash_attn_varlen_func"
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
    from flash_attn import flash_attn_varlen_func

    most_q, most_k = _flash.longest(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q)
    found = flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, most_q, most_k,
        dropout_p=0.0, softmax_scale=scale, causal=causal, return_attn_probs=return_lse,
    )  # fmt: skip
    values, logs = (found[0], found[1]) if return_lse else (found, None)
    return _flash.finish(values, logs, cu_seqlens_q, out, return_lse)

# SPDX-License-Identifier: Apache-2.0
"""`attention` of one packing, compared with plain PyTorch segment by segment."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from glimpse_kernels import attention
from tests.kernels.kernel_cases import Case, assert_as_good_as, cu_seqlens


def visible(lq: int, lk: int, causal: bool, positions: Tensor | None) -> Tensor:
    """[Lq, Lk] bool, True where the query sees the key."""
    if not causal:
        return torch.ones(lq, lk, dtype=torch.bool)
    last = positions if positions is not None else torch.arange(lq) + lk - lq
    return torch.arange(lk)[None, :] <= last[:, None]


def per_segment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lq: list[int],
    lk: list[int],
    causal: bool,
    scale: float | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Truth in fp64, PyTorch's own attention in the inputs' dtype, and the lse in fp64, each segment by itself."""
    group = q.shape[1] // k.shape[1]
    truth = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=torch.float64)
    same = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=q.dtype)
    lse = torch.full((q.shape[0], q.shape[1]), float("-inf"), dtype=torch.float64)
    q0 = k0 = 0
    for nq, nk in zip(lq, lk, strict=True):
        if nq and nk:
            where = positions[q0 : q0 + nq] if positions is not None else None
            mask = visible(nq, nk, causal, where)
            some = mask.any(1)
            qs = q[q0 : q0 + nq].transpose(0, 1)
            ks = k[k0 : k0 + nk].repeat_interleave(group, 1).transpose(0, 1)
            vs = v[k0 : k0 + nk].repeat_interleave(group, 1).transpose(0, 1)
            factor = q.shape[2] ** -0.5 if scale is None else scale
            logits = (qs.double() @ ks.double().transpose(1, 2)) * factor
            logits = logits.masked_fill(~mask, float("-inf"))
            exact = torch.softmax(logits, -1) @ vs.double()
            torchs = F.scaled_dot_product_attention(
                qs[None], ks[None], vs[None], attn_mask=mask, scale=scale
            )[0]
            truth[q0 : q0 + nq][some] = exact.transpose(0, 1)[some]
            same[q0 : q0 + nq][some] = torchs.transpose(0, 1)[some]
            lse[q0 : q0 + nq] = torch.logsumexp(logits, -1).transpose(0, 1)
        q0, k0 = q0 + nq, k0 + nk
    return truth, same, lse


def check(
    case: Case,
    lq: list[int],
    lk: list[int],
    heads: tuple[int, int],
    dims: tuple[int, int],
    *,
    causal: bool,
    scale: float | None = None,
    positions: Tensor | None = None,
    spread: float = 1.0,
    lead: int = 0,
    tail: int = 3,
    hint: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs the op with `lead` and `tail` rows outside all segments, NaN there, and compares everything; returns (out, lse)."""
    assert case.dtype is not None
    lengths = lq, lk
    tq, tk = lead + sum(lq) + tail, lead + sum(lk) + tail
    q = (torch.randn(tq, heads[0], dims[0]) * spread).to(case.dtype)
    k = torch.randn(tk, heads[1], dims[0]).to(case.dtype)
    v = torch.randn(tk, heads[1], dims[1]).to(case.dtype)
    for t in (q, k, v):
        t[:lead] = float("nan")
        t[t.shape[0] - tail :] = float("nan")
    if positions is not None:
        positions = F.pad(positions, (lead, tail)).int()
    inside = slice(lead, tq - tail)
    truth, same, lse = (torch.zeros(tq, heads[0], *n) for n in ((dims[1],), (dims[1],), ()))
    truth, same, lse = (
        truth.double(),
        same.to(case.dtype),
        torch.full_like(lse, float("-inf"), dtype=torch.float64),
    )
    truth[inside], same[inside], lse[inside] = per_segment(
        q[inside],
        k[lead : tk - tail],
        v[lead : tk - tail],
        *lengths,
        causal,
        scale,
        None if positions is None else positions[inside],
    )
    out, found_lse = attention(
        q,
        k,
        v,
        cu_seqlens(lengths[0]) + lead,
        cu_seqlens(lengths[1]) + lead,
        causal=causal,
        scale=scale,
        q_positions=positions,
        max_seqlen_q=hint,
        return_lse=True,
    )
    assert out.dtype == case.dtype and found_lse.dtype == torch.float32
    assert_as_good_as(out, same, truth, f"{lengths}, heads {heads}, dims {dims}")
    assert torch.equal(found_lse == float("-inf"), lse == float("-inf"))
    seen = lse > float("-inf")
    # logits are sums of `dims[0]` products in fp32
    torch.testing.assert_close(found_lse[seen].double(), lse[seen], rtol=2e-6, atol=1e-5 * spread)
    assert (out[~seen] == 0).all()
    return out, found_lse

# SPDX-License-Identifier: Apache-2.0
"""The measured rows of attention received by keys and of the last row's attention; see `bench.op_cases`."""

from __future__ import annotations

import torch
from torch import Tensor

import glimpse_kernels as kernels
from bench.op_cases import nbytes
from bench.op_registry import REGISTRY, Sizes, Work
from glimpse_kernels.last_row_attention.naive import last_row_attention as naive_last_row
from glimpse_kernels.received_attention.naive import received_attention as naive_received


def _received(
    segments: int,
    length: int,
    heads: int,
    kv: int,
    dim: int,
    dtype: torch.dtype,
    *,
    group: int,
    causal: bool = False,
) -> Work:
    rows = segments * length
    q, k = torch.randn(rows, heads, dim).to(dtype), torch.randn(rows, kv, dim).to(dtype)
    cu = torch.arange(segments + 1, dtype=torch.int32) * length
    order = torch.randperm(rows // group)
    order32 = order.int()
    ql = (q * dim**-0.5).unflatten(0, (segments, -1)).permute(2, 0, 1, 3).contiguous()  # [Hq, B, L, D]
    kl = k.unflatten(0, (segments, -1)).permute(2, 0, 3, 1).contiguous()  # [Hkv, B, D, L]
    hidden = torch.full((length, length), -torch.inf).triu(1) if causal else None

    def logits(head: int) -> Tensor:
        found = (ql[head] @ kl[head // (heads // kv)]).float()
        return found if hidden is None else found + hidden

    lse = torch.stack([logits(head).logsumexp(-1).flatten() for head in range(heads)], 1)
    columns = lse.T.unflatten(1, (segments, -1))[..., None].contiguous()

    def ours() -> tuple[Tensor]:
        return (kernels.received_attention(q, k, lse, cu, cu, causal=causal, group=group, order=order32),)

    def plain() -> tuple[Tensor]:
        # One head at a time: the weights of all are more memory than most machines have.
        total = torch.zeros(segments, length)
        for head in range(heads):
            total += (logits(head) - columns[head]).exp_().sum(1)
        pooled = total.view(-1, group).mean(1) / heads
        return (torch.empty_like(pooled).index_copy_(0, order, pooled),)

    def truth() -> tuple[Tensor]:
        return (naive_received(q.float(), k.float(), lse, cu, cu, causal=causal, group=group, order=order32),)

    # Both ops of this file keep fp32 from the products on, whatever the dtype of the model: held to that.
    pairs = length * (length + 1) // 2 if causal else length * length
    return Work(
        ours,
        plain,
        truth,
        2 * dim * heads * segments * pairs,
        "flop",
        tolerance=2e-5,
        plain_name="matmul, a head at a time",
    )


@REGISTRY.add("received_attention", "vision, full")
def received_full(s: Sizes, dtype: torch.dtype) -> Work:
    return _received(1, s.patches, s.vision_heads, s.vision_heads, s.vision_dim, dtype, group=4)


@REGISTRY.add("received_attention", "vision, windows")
def received_windows(s: Sizes, dtype: torch.dtype) -> Work:
    heads, w = s.vision_heads, s.window
    return _received(s.patches // w, w, heads, heads, s.vision_dim, dtype, group=4)


@REGISTRY.add("received_attention", "causal, all rows")
def received_causal(s: Sizes, dtype: torch.dtype) -> Work:
    return _received(1, s.rows, s.heads, s.kv_heads, s.dim, dtype, group=1, causal=True)


def _last_row(s: Sizes, dtype: torch.dtype, sequences: int, with_lse: bool) -> Work:
    q = torch.randn(sequences, s.heads, s.dim).to(dtype)
    k = torch.randn(sequences * s.rows, s.kv_heads, s.dim).to(dtype)
    cu = torch.arange(sequences + 1, dtype=torch.int32) * s.rows
    first = s.text // 4
    seq = torch.arange(sequences, dtype=torch.int32).repeat_interleave(s.image)
    index = seq * s.rows + first + torch.arange(s.image, dtype=torch.int32).repeat(sequences)
    kl = k.unflatten(0, (sequences, -1)).permute(0, 2, 1, 3).contiguous()  # [B, Hkv, L, D]
    grouped = q.unflatten(1, (s.kv_heads, -1)).transpose(2, 3)

    def rows() -> Tensor:
        return (kl @ grouped).float() * s.dim**-0.5  # [B, Hkv, L, group]

    lse = rows().logsumexp(2).flatten(1) if with_lse else None

    def plain() -> tuple[Tensor]:
        weights = rows().softmax(2).permute(0, 2, 1, 3).flatten(2).mean(2)
        return (weights[:, first : first + s.image].flatten(),)

    amount = nbytes(q, index, seq) + nbytes(k) + 4 * sequences * s.image
    return Work(
        lambda: (kernels.last_row_attention(q, k, cu, index, seq, lse=lse),),
        plain,
        lambda: (naive_last_row(q.float(), k.float(), cu, index, seq, lse=lse),),
        amount,
        "byte",
        tolerance=2e-5,
        plain_name="matmul",
    )


@REGISTRY.add("last_row_attention", "1 row")
def last_row(s: Sizes, dtype: torch.dtype) -> Work:
    return _last_row(s, dtype, 1, False)


@REGISTRY.add("last_row_attention", "1 row, lse known")
def last_row_lse(s: Sizes, dtype: torch.dtype) -> Work:
    return _last_row(s, dtype, 1, True)


@REGISTRY.add("last_row_attention", "8 rows")
def last_row_batch(s: Sizes, dtype: torch.dtype) -> Work:
    return _last_row(s, dtype, 8, False)

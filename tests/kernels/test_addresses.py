# SPDX-License-Identifier: Apache-2.0
"""Offsets past 2^31 elements: the same values far apart give what they give side by side.

The memory in between is never touched and does not exist (`tests.kernels.arena`). Expected values come from the definitions on
tensors laid out compactly.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import glimpse_kernels as kernels
from glimpse_kernels import _cuda, _triton
from glimpse_kernels.attention.naive import attention as naive_attention
from glimpse_kernels.compact.naive import compact as naive_compact
from glimpse_kernels.decode_attention.naive import decode_attention as naive_decode
from glimpse_kernels.drop_duplicates.naive import drop_duplicates as naive_duplicates
from glimpse_kernels.farthest_points.naive import farthest_points as naive_farthest
from glimpse_kernels.glimpse_scores.naive import glimpse_scores as naive_scores
from glimpse_kernels.greedy_dpp.naive import greedy_dpp as naive_dpp
from glimpse_kernels.last_row_attention.naive import last_row_attention as naive_last_row
from glimpse_kernels.linear.naive import gated_linear as naive_gated
from glimpse_kernels.linear.naive import linear as naive_linear
from glimpse_kernels.patchify.naive import patchify as naive_patchify
from glimpse_kernels.received_attention.naive import received_attention as naive_received
from glimpse_kernels.rms_norm.naive import rms_norm as naive_rms_norm
from glimpse_kernels.rope.naive import rope as naive_rope
from glimpse_kernels.swiglu.naive import swiglu as naive_swiglu
from tests.kernels.arena import sparse_tensor, spread
from tests.kernels.kernel_cases import Case, cu_seqlens, op_cases

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="sparse anonymous maps as Linux has them"
)

FAR = 2**29 + 64
"""Five times that is past 2^31; a multiple of every alignment that kernels look at."""

ROWS = 6
APART = [pytest.param(0, 4, 2, id="rows"), pytest.param(1, 2 * ROWS, ROWS, id="heads")]
"""The dimension that is far apart, query heads and key heads: enough of them that a stride alone still fits 32 bits."""

LIMIT = 2**31


def far(tensor: Tensor, dim: int = 0, times: int = 1) -> Tensor:
    """`tensor` with the elements of `dim` so far apart that the last one's offset does not fit 32 bits, nor does it in pieces
    of `times` elements."""
    step = times * FAR * (ROWS - 1) // (tensor.shape[dim] - 1) // 64 * 64 + 64
    assert (tensor.shape[dim] - 1) * step > LIMIT
    return spread(tensor, dim, step)


def close(found: Tensor, wanted: Tensor) -> None:
    limit = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[wanted.dtype]
    torch.testing.assert_close(found, wanted, rtol=limit, atol=limit)


def paths(kernel: Case) -> list[AbstractContextManager[None]]:
    """To be entered one after the other: interpreted, a kernel shows both ways in which it reads its tiles, emulated those with
    clusters and without."""
    if not kernel.interpreted:
        return [nullcontext()]
    if kernel.backend == "cuda":
        return [told(80, 108), told(90, 132), told(90, 3)]
    return [_triton.force_chip(_triton.Chip(capability, 3)) for capability in (80, _triton.HOPPER)]


@contextmanager
def told(capability: int, multiprocessors: int) -> Iterator[None]:
    """The chip that launch code of CUDA kernels sees while they are emulated."""
    _cuda.module().set_chip(capability, multiprocessors)
    try:
        yield
    finally:
        _cuda.module().set_chip(90, 3)


def real(kernel: Case, *shape: int) -> Tensor:
    return torch.randn(*shape).to(kernel.dtype or torch.float32)


def test_a_sparse_tensor_takes_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    x = sparse_tensor([ROWS, 8], [2**33, 1], torch.float32, "cpu")
    x[-1] = 3.0
    assert x.sum() == 24.0
    assert x[-1].data_ptr() - x.data_ptr() == 5 * 2**35
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**15  # KiB


@pytest.mark.parametrize("kernel", op_cases("attention"), indirect=True)
@pytest.mark.parametrize(("dim", "hq", "hkv"), APART)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_attention(kernel: Case, dim: int, hq: int, hkv: int, causal: bool) -> None:
    q, k, v = real(kernel, ROWS, hq, 64), real(kernel, ROWS, hkv, 64), real(kernel, ROWS, hkv, 64)
    at = cu_seqlens([2, 4]).to(q.device)
    out = far(torch.zeros_like(q), dim)
    found, lse = kernels.attention(
        far(q, dim), far(k, dim), far(v, dim), at, at, causal=causal, out=out, return_lse=True
    )
    wanted, wanted_lse = naive_attention(q, k, v, at, at, causal=causal, return_lse=True)
    close(found, wanted)
    close(lse, wanted_lse)


@pytest.mark.parametrize("kernel", op_cases("attention"), indirect=True)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_attention_in_tiles(kernel: Case, causal: bool) -> None:
    q, k, v = real(kernel, 140, 2, 64), real(kernel, 140, 1, 64), real(kernel, 140, 1, 64)
    at = cu_seqlens([140]).to(q.device)
    wanted = naive_attention(q, k, v, at, at, causal=causal)
    assert isinstance(wanted, Tensor)
    for path in paths(kernel):
        with path:
            close(
                kernels.attention(
                    far(q), far(k), far(v), at, at, causal=causal, out=far(torch.zeros_like(q))
                ),
                wanted,
            )


@pytest.mark.parametrize("kernel", op_cases("received_attention"), indirect=True)
def test_received_attention_in_tiles(kernel: Case) -> None:
    q, k = real(kernel, 140, 2, 64), real(kernel, 140, 1, 64)
    at = cu_seqlens([140]).to(q.device)
    lse = naive_attention(q, k, k, at, at, causal=False, return_lse=True)[1]
    wanted = naive_received(q, k, lse, at, at)
    for path in paths(kernel):
        with path:
            close(kernels.received_attention(far(q), far(k), lse, at, at), wanted)


@pytest.mark.parametrize("kernel", op_cases("attention"), indirect=True)
def test_attention_of_one_row(kernel: Case) -> None:
    q, k, v = real(kernel, 1, 4, 64), real(kernel, ROWS, 2, 64), real(kernel, ROWS, 2, 64)
    at_q, at_k = cu_seqlens([1]).to(q.device), cu_seqlens([ROWS]).to(q.device)
    found, _ = kernels.attention(q, far(k), far(v), at_q, at_k, causal=True, return_lse=True)
    wanted = naive_attention(q, k, v, at_q, at_k, causal=True)
    assert isinstance(wanted, Tensor)
    close(found, wanted)


@pytest.mark.parametrize("kernel", op_cases("received_attention"), indirect=True)
@pytest.mark.parametrize(("dim", "hq", "hkv"), APART)
def test_received_attention(kernel: Case, dim: int, hq: int, hkv: int) -> None:
    q, k = real(kernel, ROWS, hq, 64), real(kernel, ROWS, hkv, 64)
    at = cu_seqlens([2, 4]).to(q.device)
    lse = naive_attention(q, k, k, at, at, causal=False, return_lse=True)[1]
    close(
        kernels.received_attention(far(q, dim), far(k, dim), lse, at, at), naive_received(q, k, lse, at, at)
    )


@pytest.mark.parametrize("kernel", op_cases("decode_attention"), indirect=True)
@pytest.mark.parametrize(
    ("dim", "hq", "hkv"), [(0, 4, 2), (1, 4, 2), (2, 2 * ROWS, ROWS)], ids=["blocks", "slots", "heads"]
)
def test_decode_attention(kernel: Case, dim: int, hq: int, hkv: int) -> None:
    q, k, v = real(kernel, 2, hq, 64), real(kernel, ROWS, 4, hkv, 64), real(kernel, ROWS, 4, hkv, 64)
    table = torch.tensor([[5, 0, 4], [1, 3, 2]], dtype=torch.int32)
    lengths = torch.tensor([9, 12], dtype=torch.int32)
    found = kernels.decode_attention(q, far(k, dim), far(v, dim), table, lengths)
    close(found, naive_decode(q, k, v, table, lengths))


@pytest.mark.parametrize("kernel", op_cases("decode_attention"), indirect=True)
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "heads"])
def test_decode_attention_of_far_queries(kernel: Case, dim: int) -> None:
    """Queries, the block table and the result."""
    q, k, v = real(kernel, ROWS, ROWS, 64), real(kernel, ROWS, 16, 3, 64), real(kernel, ROWS, 16, 3, 64)
    table = torch.randperm(ROWS, device="cpu").int().to(kernel.device).repeat(ROWS, 1)
    lengths = torch.tensor([75, 0, 17, 1, 96, 16], dtype=torch.int32)
    wanted = naive_decode(q, k, v, table, lengths)
    for path in paths(kernel) if kernel.backend == "cuda" else [nullcontext()]:
        with path:
            out = far(torch.zeros_like(q), dim)
            kernels.decode_attention(far(q, dim), k, v, far(table), lengths, out=out)
            close(out, wanted)


@pytest.mark.parametrize("kernel", op_cases("decode_attention"), indirect=True)
def test_decode_attention_from_the_end_of_a_large_pool(kernel: Case) -> None:
    """The numbers of the blocks are large, not the strides."""
    blocks = 2**21
    q, k, v = real(kernel, 1, 4, 64), real(kernel, 3, 16, 2, 64), real(kernel, 3, 16, 2, 64)
    numbers = torch.tensor([blocks - 1, 5, blocks - 7])
    pools = []
    for part in (k, v):
        pool = sparse_tensor((blocks, 16, 2, 64), None, part.dtype)
        pool[numbers] = part
        pools.append(pool)
    lengths = torch.tensor([41], dtype=torch.int32)
    found = kernels.decode_attention(q, *pools, numbers.int()[None], lengths)
    near = torch.arange(3, dtype=torch.int32)[None]
    close(found, naive_decode(q, k, v, near, lengths))


@pytest.mark.parametrize("kernel", op_cases("glimpse_scores"), indirect=True)
@pytest.mark.parametrize(("dim", "hq", "hkv"), APART)
def test_glimpse_scores(kernel: Case, dim: int, hq: int, hkv: int) -> None:
    q, k = real(kernel, 2, hq, 64), real(kernel, ROWS, hkv, 64)
    index = torch.tensor([5, 0, 4, 2], dtype=torch.int32)
    seq = torch.tensor([0, 1, 1, 0], dtype=torch.int32)
    close(kernels.glimpse_scores(q, far(k, dim), index, seq), naive_scores(q, k, index, seq))


@pytest.mark.parametrize("kernel", op_cases("glimpse_scores"), indirect=True)
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "heads"])
def test_glimpse_scores_of_far_queries(kernel: Case, dim: int) -> None:
    q, k, lse = real(kernel, ROWS, ROWS, 64), real(kernel, ROWS, 3, 64), torch.randn(ROWS, ROWS)
    index = torch.tensor([5, 0, 4, 2, 1, 3], dtype=torch.int32)
    seq = torch.tensor([0, 1, 5, 3, 2, 4], dtype=torch.int32)
    out = far(torch.zeros(ROWS, ROWS))
    kernels.glimpse_scores(far(q, dim), k, index, seq, lse=far(lse), out=out)
    close(out, naive_scores(q, k, index, seq, lse=lse))


@pytest.mark.parametrize("kernel", op_cases("last_row_attention"), indirect=True)
@pytest.mark.parametrize(("dim", "hq", "hkv"), APART)
def test_last_row_attention(kernel: Case, dim: int, hq: int, hkv: int) -> None:
    q, k = real(kernel, 2, hq, 64), real(kernel, ROWS, hkv, 64)
    at = cu_seqlens([2, 4]).to(q.device)
    index = torch.tensor([1, 5, 3, 0], dtype=torch.int32)
    seq = torch.tensor([0, 1, 1, 0], dtype=torch.int32)
    close(kernels.last_row_attention(q, far(k, dim), at, index, seq), naive_last_row(q, k, at, index, seq))


def _compacted(kernel: Case, dtype: torch.dtype, dim: int) -> None:
    """Source, destination and rows far apart along layers (0) or rows (1)."""
    k, v = (torch.randn(4, ROWS, 2, 32).to(dtype) for _ in range(2))
    rows = torch.randn(ROWS, 40).to(dtype)
    index = torch.tensor([5, 0, -1, 4], dtype=torch.int32)
    slots = torch.tensor([1, 5, 3, 2], dtype=torch.int32)
    wanted = [torch.zeros_like(k), torch.zeros_like(v), torch.zeros(4, 40, dtype=dtype)]
    naive_compact(index, slots, k, v, wanted[0], wanted[1], [(rows, wanted[2])])
    # Interpreted kernels count in pieces of 8 bytes; on a GPU so much memory would be allocated.
    times = 8 // dtype.itemsize if kernel.interpreted else 1

    def apart(tensor: Tensor, dim: int) -> Tensor:
        return far(tensor, dim, times)

    found = [*(apart(torch.zeros_like(t), dim) for t in (k, v)), apart(torch.zeros_like(wanted[2]), 0)]
    pools = found[0], found[1]
    kernels.compact(index, slots, apart(k, dim), apart(v, dim), *pools, [(apart(rows, 0), found[2])])
    for ours, right in zip(found, wanted, strict=True):
        assert torch.equal(ours, right)


@pytest.mark.parametrize("kernel", op_cases("compact"), indirect=True)
@pytest.mark.parametrize("dim", [0, 1], ids=["layers", "rows"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_compact(kernel: Case, dtype: torch.dtype, dim: int) -> None:
    _compacted(kernel, dtype, dim)


@pytest.mark.parametrize("kernel", op_cases("compact"), indirect=True)
def test_compact_to_the_end_of_a_large_pool(kernel: Case) -> None:
    """The numbers of the slots are large, not the strides."""
    count = 2**27
    k = torch.randn(1, ROWS, 2, 64).bfloat16()
    index = torch.tensor([5, 0, 4], dtype=torch.int32)
    slots = torch.tensor([count - 1, 7, count - 3], dtype=torch.int32)
    pool = sparse_tensor((1, count, 2, 64), None, k.dtype)
    kernels.compact(index, slots, k, None, pool, None)
    assert torch.equal(pool[:, slots.long()], k[:, index.long()])


@pytest.mark.parametrize("kernel", op_cases("patchify"), indirect=True)
@pytest.mark.parametrize("patch", [14, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_patchify(kernel: Case, groups: int, patch: int) -> None:
    """A picture whose rows lie far apart: the last ones of its only group, or its second group, are past 2^31."""
    image = torch.randint(0, 256, (2 * patch * groups, 2 * patch, 3), dtype=torch.uint8)
    wanted: dict[str, Any] = {"mean": (0.5, 0.25, 0.125), "std": (0.5, 1.0, 2.0), "patch_size": patch}
    assert torch.equal(kernels.patchify(far(image), **wanted), naive_patchify(image, **wanted))


LONG = 46400
"""Tokens of a group whose matrix has more than 2^31 entries."""


def groups(*lengths: int) -> Tensor:
    return cu_seqlens(lengths).to(torch.get_default_device())


def behind_a_long_group(near: Tensor) -> Tensor:
    """The matrix of a group of LONG tokens, too long for any picks, and this one behind it."""
    similarity = sparse_tensor((LONG * LONG + near.numel(),), None, near.dtype)
    similarity[LONG * LONG :] = near.flatten()
    return similarity


def within_a_long_group(near: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix of a group of LONG tokens, 0 but for some of the first and last ones; these tokens."""
    at = torch.tensor([3, *range(LONG + 1 - near.shape[0], LONG)])
    similarity = sparse_tensor((LONG, LONG), None, near.dtype)
    similarity[at[:, None], at] = near
    return similarity.view(-1), at


def not_of_the_definition(op: str) -> list[Any]:
    """It would make a matrix of all tokens."""
    return [param for param in op_cases(op) if param.values[0].backend != "naive"]  # type: ignore[attr-defined]


def positive_definite() -> Tensor:
    features = torch.randn(ROWS, ROWS)
    return features @ features.T


@pytest.mark.parametrize("kernel", op_cases("farthest_points"), indirect=True)
def test_farthest_points(kernel: Case) -> None:
    near = real(kernel, ROWS, ROWS)
    picks, keep = kernels.farthest_points(
        behind_a_long_group(near),
        groups(LONG, ROWS),
        groups(0, 4),
        tokens=LONG + ROWS,
        capacity=4,
        max_seqlen=ROWS,
    )
    wanted, wanted_keep = naive_farthest(
        near.flatten(), groups(ROWS), groups(4), tokens=ROWS, capacity=4, repeat=True, max_seqlen=None
    )
    assert torch.equal(picks, wanted + LONG)
    assert torch.equal(keep[LONG:], wanted_keep) and not keep[:LONG].any()


@pytest.mark.parametrize("kernel", op_cases("greedy_dpp"), indirect=True)
def test_greedy_dpp(kernel: Case) -> None:
    near, relevance = positive_definite(), torch.ones(LONG + ROWS)
    picks, keep = kernels.greedy_dpp(
        behind_a_long_group(near), relevance, groups(LONG, ROWS), groups(0, 4), capacity=4, max_seqlen=ROWS
    )
    wanted, wanted_keep = naive_dpp(
        near.flatten(), relevance[:ROWS], groups(ROWS), groups(4), capacity=4, eps=1e-5, max_seqlen=None
    )
    assert torch.equal(picks, wanted + LONG)
    assert torch.equal(keep[LONG:], wanted_keep) and not keep[:LONG].any()


@pytest.mark.parametrize("kernel", not_of_the_definition("greedy_dpp"), indirect=True)
def test_greedy_dpp_in_a_long_group(kernel: Case) -> None:
    near = positive_definite()
    similarity, at = within_a_long_group(near)
    relevance = torch.zeros(LONG)
    relevance[at] = 1.0
    wanted, _ = naive_dpp(
        near.flatten(), relevance[at], groups(ROWS), groups(ROWS), capacity=ROWS, eps=1e-5, max_seqlen=None
    )
    for path in paths(kernel):
        with path:
            picks, _ = kernels.greedy_dpp(similarity, relevance, groups(LONG), groups(ROWS), capacity=16)
            assert torch.equal(picks[:ROWS].long(), at[wanted.long()]) and (picks[ROWS:] == -1).all()


@pytest.mark.parametrize("kernel", op_cases("drop_duplicates"), indirect=True)
def test_drop_duplicates(kernel: Case) -> None:
    near, order = real(kernel, ROWS, ROWS), torch.tensor([5, 0, 3, 1, 4, 2], dtype=torch.int32)
    survivors, keep = kernels.drop_duplicates(
        behind_a_long_group(near), groups(LONG, ROWS), order + LONG, groups(0, ROWS),
        torch.tensor([0, 3], dtype=torch.int32), tokens=LONG + ROWS, per_round=1, max_seqlen=ROWS,
    )  # fmt: skip
    wanted, wanted_keep = naive_duplicates(
        near.flatten(), groups(ROWS), order, groups(ROWS), torch.tensor([3], dtype=torch.int32),
        tokens=ROWS, per_round=1, max_seqlen=None,
    )  # fmt: skip
    assert torch.equal(survivors, torch.where(wanted < 0, -1, wanted + LONG))
    assert torch.equal(keep[LONG:], wanted_keep) and not keep[:LONG].any()


@pytest.mark.parametrize("kernel", not_of_the_definition("drop_duplicates"), indirect=True)
def test_drop_duplicates_in_a_long_group(kernel: Case) -> None:
    near, order = real(kernel, ROWS, ROWS), torch.tensor([5, 0, 3, 1, 4, 2], dtype=torch.int32)
    similarity, at = within_a_long_group(near)
    target = torch.tensor([3], dtype=torch.int32)
    wanted, _ = naive_duplicates(
        near.flatten(), groups(ROWS), order, groups(ROWS), target, tokens=ROWS, per_round=1, max_seqlen=None
    )
    for path in paths(kernel):
        with path:
            survivors, _ = kernels.drop_duplicates(
                similarity,
                groups(LONG),
                at[order.long()].int(),
                groups(ROWS),
                target,
                tokens=LONG,
                per_round=1,
            )
            assert torch.equal(survivors[:3].long(), at[wanted[:3].long()]) and (survivors[3:] == -1).all()


@pytest.mark.parametrize("kernel", op_cases("rope"), indirect=True)
@pytest.mark.parametrize(("dim", "hq", "hkv"), APART)
def test_rope_in_place(kernel: Case, dim: int, hq: int, hkv: int) -> None:
    q, k = real(kernel, ROWS, hq, 64), real(kernel, ROWS, hkv, 64)
    angles = torch.randn(ROWS, 32)
    found = far(q, dim), far(k, dim)
    kernels.rope(*found, angles.cos(), angles.sin())
    naive_rope(q, k, angles.cos(), angles.sin())
    close(found[0], q)
    close(found[1], k)


@pytest.mark.parametrize("kernel", op_cases("rope"), indirect=True)
@pytest.mark.parametrize("large", [False, True], ids=["strides", "slots"])
def test_rope_to_a_cache(kernel: Case, large: bool) -> None:
    q, k, v = real(kernel, ROWS, 4, 64), real(kernel, ROWS, 2, 64), real(kernel, ROWS, 2, 64)
    angles = torch.randn(ROWS, 32)
    near = torch.tensor([3, 5, 0, -1, 2, 4], dtype=torch.int32)
    wanted: dict[str, Any] = {"k_out": torch.zeros_like(k), "v_out": torch.zeros_like(v)}
    found: dict[str, Any]
    if large:
        count = 2**25
        places = torch.where(near < 0, near, count - ROWS + near)
        found = {name: sparse_tensor((count, 2, 64), None, k.dtype) for name in wanted}
    else:
        places = near
        found = {name: far(pool) for name, pool in wanted.items()}
    ours = q.clone()
    kernels.rope(ours, far(k), angles.cos(), angles.sin(), v=far(v), slots=places, **found)
    naive_rope(q, k, angles.cos(), angles.sin(), v=v, slots=near, **wanted)
    close(ours, q)
    for name, pool in wanted.items():
        close(found[name][-ROWS:], pool)


@pytest.mark.parametrize("kernel", op_cases("rms_norm"), indirect=True)
@pytest.mark.parametrize("add", [False, True], ids=["plain", "residual"])
def test_rms_norm(kernel: Case, add: bool) -> None:
    x, weight, residual = real(kernel, ROWS, 96), real(kernel, 96), real(kernel, ROWS, 96) if add else None
    ours = None if residual is None else far(residual)
    found = kernels.rms_norm(far(x), weight, 1e-6, residual=ours, out=far(torch.zeros_like(x)))
    close(found, naive_rms_norm(x, weight, 1e-6, residual=residual))
    if ours is not None and residual is not None:
        close(ours, residual)


@pytest.mark.parametrize("kernel", op_cases("swiglu"), indirect=True)
def test_swiglu(kernel: Case) -> None:
    gate, up = real(kernel, ROWS, 96), real(kernel, ROWS, 96)
    close(kernels.swiglu(far(gate), far(up), out=far(torch.zeros_like(up))), naive_swiglu(gate, up))


@pytest.mark.parametrize("kernel", op_cases("linear"), indirect=True)
@pytest.mark.parametrize("rows", [2, ROWS, 33])  # the last as a product of torch's on a GPU
def test_linear(kernel: Case, rows: int) -> None:
    x, weight, bias = real(kernel, rows, 64), real(kernel, ROWS, 64), real(kernel, ROWS)
    found = kernels.linear(far(x), far(weight), bias, out=far(torch.zeros_like(x[:, :ROWS])))
    close(found, naive_linear(x, weight, bias))


@pytest.mark.parametrize("kernel", op_cases("linear_group"), indirect=True)
def test_linear_group(kernel: Case) -> None:
    x, first, second = real(kernel, 3, 64), real(kernel, ROWS, 64), real(kernel, 4, 64)
    outs = [far(torch.zeros_like(x[:, :ROWS])), far(torch.zeros_like(x[:, :4]))]
    found = kernels.linear_group(far(x), [far(first), far(second)], outs=outs)
    for ours, weight in zip(found, (first, second), strict=True):
        close(ours, naive_linear(x, weight))


@pytest.mark.parametrize("kernel", op_cases("gated_linear"), indirect=True)
def test_gated_linear(kernel: Case) -> None:
    x, gate, up = real(kernel, 3, 64), real(kernel, ROWS, 64), real(kernel, ROWS, 64)
    found = kernels.gated_linear(far(x), far(gate), far(up), out=far(torch.zeros_like(x[:, :ROWS])))
    close(found, naive_gated(x, gate, up))

# SPDX-License-Identifier: Apache-2.0
"""`rope` in Triton: tiles of many rows, partly filled head blocks, odd strides and alignments, slots, addresses."""

from __future__ import annotations

import pytest
import torch

from glimpse_kernels import rope
from tests.kernels.kernel_cases import Case, op_cases
from tests.kernels.test_rope import close, random, tables

triton_cases = pytest.mark.parametrize(
    "kernel", [c for c in op_cases("rope") if c.id.startswith("triton-")], indirect=True
)


@triton_cases
@pytest.mark.parametrize("d, hq, hkv", [(128, 5, 2), (80, 3, 3), (64, 1, 1), (192, 28, 4), (2, 9, 3)])
@pytest.mark.parametrize("t", [1, 9, 129, 261])
def test_many_rows(kernel: Case, t: int, d: int, hq: int, hkv: int) -> None:
    """Few rows and many have different tiles; the last tile of rows and of heads is not full."""
    if t == 261 and d > 80:
        t = 140
    q, k, v = (random(t, h, n, dtype=kernel.dtype, seed=n + h) for h, n in ((hq, d), (hkv, d), (hkv, 24)))
    cos, sin = tables(t, d)
    before, k_out, v_out = q.clone(), torch.empty_like(k), torch.empty_like(v)
    rope(q, k, cos, sin, v=v, k_out=k_out, v_out=v_out)
    close(q, before, cos, sin)
    close(k_out, k, cos, sin)
    assert torch.equal(v_out, v)


@triton_cases
@pytest.mark.parametrize("t", [3, 130])
def test_without_queries(kernel: Case, t: int) -> None:
    """Keys of rows whose queries nobody wants."""
    k, v = random(t, 2, 16, dtype=kernel.dtype), random(t, 2, 16, dtype=kernel.dtype, seed=1)
    cos, sin = tables(t, 16)
    k_out, v_out = torch.empty_like(k), torch.empty_like(v)
    rope(k[:, :0], k, cos, sin, v=v, k_out=k_out, v_out=v_out)
    close(k_out, k, cos, sin)
    assert torch.equal(v_out, v)
    rope(k[:, :0], None, cos, sin)


@triton_cases
@pytest.mark.parametrize("shift", [1, 3, 8])
def test_unaligned_views(kernel: Case, shift: int) -> None:
    """Rows and heads that start at any element, tables that are columns of wider ones."""
    t, h, d = 9, 3, 20
    wide = random(t, shift + 2 * h * (d + 1), dtype=kernel.dtype)
    q, k = (part.unflatten(1, (h, d + 1))[:, :, 1:] for part in wide[:, shift:].chunk(2, dim=1))
    q0, k0, rest = q.clone(), k.clone(), wide[:, :shift].clone()
    cos, sin = tables(t, d)
    table = torch.full((t, d + shift), float("nan"))
    table[:, shift : shift + d // 2], table[:, shift + d // 2 :] = cos, sin
    rope(q, k, table[:, shift : shift + d // 2], table[:, shift + d // 2 :])
    close(q, q0, cos, sin)
    close(k, k0, cos, sin)
    assert torch.equal(wide[:, :shift], rest)


@triton_cases
def test_slots_that_are_not_there(kernel: Case) -> None:
    """Wrong slots are the caller's mistake; nothing outside of the caches is written for them. Their rows may hold NaN."""
    t, size = 7, 5
    q, k, v = (random(t, 2, 16, dtype=kernel.dtype, seed=i) for i in range(3))
    k[3], v[3] = float("nan"), float("nan")
    cos, sin = tables(t, 16)
    k_pool, v_pool = (torch.full((3, size, 2, 16), float("nan"), dtype=kernel.dtype) for _ in range(2))
    slots = torch.tensor([4, size, -2, -1, 2**31 - 1, -(2**31), 0], dtype=torch.int32)
    rope(q, k, cos, sin, v=v, k_out=k_pool[1], v_out=v_pool[1], slots=slots)
    close(k_pool[1, [4, 0]], k[[0, 6]], cos[[0, 6]], sin[[0, 6]])
    assert torch.equal(v_pool[1, [4, 0]], v[[0, 6]])
    for pool in (k_pool, v_pool):
        assert pool[[0, 2]].isnan().all() and pool[1, 1:4].isnan().all()


@triton_cases
def test_two_launches_are_equal(kernel: Case) -> None:
    x = random(150, 3, 80, dtype=kernel.dtype)
    cos, sin = tables(150, 80)
    first, second, alone = x.clone(), x.clone(), x.clone()
    rope(first, None, cos, sin)
    rope(second, None, cos, sin)
    rope(alone[149:], None, cos[149:], sin[149:])
    assert torch.equal(first, second) and torch.equal(alone[149], first[149])

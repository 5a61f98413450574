# SPDX-License-Identifier: Apache-2.0
"""`glimpse_scores` on every backend and instruction set against plain torch in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glimpse_kernels import attention, glimpse_scores
from tests.kernels.kernel_cases import Case, cu_seqlens, op_cases

CASES: list[Any] = op_cases("glimpse_scores")
all_cases = pytest.mark.parametrize("kernel", CASES, indirect=True)
cuda_cases = pytest.mark.parametrize(
    "kernel", [p for p in CASES if p.values[0].backend == "cuda"], indirect=True
)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def expected(q: Tensor, k: Tensor, index: Tensor, seq: Tensor, scale: float, lse: Tensor | None) -> Tensor:
    group = q.shape[1] // k.shape[1]
    keys = k.double()[index.long()].repeat_interleave(group, 1)
    out = scale * (q.double()[seq.long()] * keys).sum(-1)
    return out if lse is None else out - lse.double()[seq.long()]


@all_cases
@pytest.mark.parametrize("dim", [1, 16, 37, 80, 128])
@pytest.mark.parametrize("with_lse", [False, True])
def test_scores(kernel: Case, dim: int, with_lse: bool) -> None:
    assert kernel.dtype is not None
    q = torch.randn(3, 6, dim).to(kernel.dtype)
    k = torch.randn(150, 2, dim).to(kernel.dtype)
    index = torch.randperm(150)[:131].int()
    unlisted = torch.ones(150, dtype=torch.bool)
    unlisted[index.long()] = False
    k[unlisted] = float("nan")
    seq = torch.randint(0, 3, (131,)).int()
    lse = torch.randn(3, 6) if with_lse else None
    found = glimpse_scores(q, k, index, seq, lse=lse)
    assert found.dtype == torch.float32
    want = expected(q, k, index, seq, dim**-0.5, lse)
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)


@all_cases
def test_scale_output_and_strides(kernel: Case) -> None:
    assert kernel.dtype is not None
    wide = torch.randn(20, 5, 2, 24).to(kernel.dtype)
    q, k = wide[:4, 1:], wide[:, :2]  # [4, 4, 2, 24] and [20, 2, 2, 24]; one of the two inner slices each
    out = torch.full((3, 8), float("nan"))
    returned = glimpse_scores(
        q[:, :, 0], k[:, :, 1], ints(19, 0, 7), ints(3, 0, 3), scale=0.5, out=out[:, 2:6]
    )
    assert returned.data_ptr() == out[:, 2:6].data_ptr()
    want = expected(q[:, :, 0], k[:, :, 1], ints(19, 0, 7), ints(3, 0, 3), 0.5, None)
    torch.testing.assert_close(out[:, 2:6].double(), want, rtol=1e-5, atol=1e-5)
    assert out[:, :2].isnan().all() and out[:, 6:].isnan().all()


@all_cases
@pytest.mark.parametrize("heads", [(1, 1), (8, 2), (6, 1), (15, 3)], ids=str)
def test_a_token_does_not_depend_on_its_neighbours(kernel: Case, heads: tuple[int, int]) -> None:
    """Tokens of three sequences in any order and any number, one by one and together."""
    assert kernel.dtype is not None
    q = torch.randn(3, heads[0], 40).to(kernel.dtype)
    k = torch.randn(50, heads[1], 40).to(kernel.dtype)
    index, seq = torch.randint(50, (23,)).int(), torch.randint(3, (23,)).int()
    together = glimpse_scores(q, k, index, seq)
    alone = torch.cat([glimpse_scores(q, k, index[n : n + 1], seq[n : n + 1]) for n in range(23)])
    keys = k.double()[index.long()].repeat_interleave(heads[0] // heads[1], 1)
    exact = (q.double()[seq.long()] * keys).sum(-1) * 40**-0.5
    torch.testing.assert_close(together.double(), exact, rtol=1e-5, atol=1e-5)
    if (
        kernel.backend == "naive" or kernel.interpreted
    ):  # NumPy's products depend on a row's place in the matrix
        torch.testing.assert_close(together, alone)
    else:
        assert torch.equal(together, alone)


@all_cases
@pytest.mark.parametrize("heads", [(16, 2), (28, 4), (20, 1)], ids=str)
@pytest.mark.parametrize("count", [31, 32, 33, 97])
def test_heads_and_edges(kernel: Case, heads: tuple[int, int], count: int) -> None:
    """Head ratios of the published models (and more heads than one group of 16), tokens around the edges of a tile;
    sequences change inside a tile, come back, and one is never asked for: its row may hold anything."""
    assert kernel.dtype is not None
    q = torch.randn(4, heads[0], 24).to(kernel.dtype)
    q[2] = float("nan")
    k = torch.randn(count, heads[1], 24).to(kernel.dtype)
    k[7] = float("nan")
    index = torch.arange(count).flip(0).int()
    seq = torch.zeros(count, dtype=torch.int32)
    seq[20:29], seq[29:31], seq[31:] = 1, 0, 3
    lse = torch.randn(4, heads[0])
    found = glimpse_scores(q, k, index, seq, lse=lse)
    keys = k.double()[index.long()].repeat_interleave(heads[0] // heads[1], 1)
    want = (q.double()[seq.long()] * keys).sum(-1) * 24**-0.5 - lse.double()[seq.long()]
    assert torch.equal(found.isnan(), (index == 7)[:, None].expand(-1, heads[0]))
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5, equal_nan=True)


@cuda_cases
@pytest.mark.parametrize("heads", [(28, 4), (16, 2), (20, 1)], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 128, 200])
def test_cuda_aligned_and_not(kernel: Case, heads: tuple[int, int], dim: int) -> None:
    """16 bytes at once and one element at a time, whole runs of dimensions and parts of one, mixed sequences."""
    assert kernel.dtype is not None
    q_wide = torch.randn(3, heads[0], dim + 8).to(kernel.dtype)
    k_wide = torch.randn(30, heads[1], dim + 8).to(kernel.dtype)
    index, seq, lse = torch.randint(30, (37,)).int(), torch.randint(3, (37,)).int(), torch.randn(3, heads[0])
    for skip in (0, 8, 1):
        q, k = q_wide[..., skip : skip + dim], k_wide[..., skip : skip + dim]
        want = expected(q, k, index, seq, dim**-0.5, lse)
        torch.testing.assert_close(
            glimpse_scores(q, k, index, seq, lse=lse).double(), want, rtol=1e-5, atol=1e-5
        )


@all_cases
def test_no_tokens(kernel: Case) -> None:
    assert kernel.dtype is not None
    q, k = (torch.randn(1, 2, 8).to(kernel.dtype) for _ in range(2))
    assert glimpse_scores(q, k, ints(), ints()).shape == (0, 2)


def test_log_softmax_form_agrees_with_attention() -> None:
    """With the row's lse the exponentials are its attention weights: over all keys they sum to one."""
    q, k, v = torch.randn(1, 4, 16), torch.randn(50, 2, 16), torch.randn(50, 2, 16)
    result = attention(q, k, v, cu_seqlens([1]), cu_seqlens([50]), causal=True, return_lse=True)
    scores = glimpse_scores(q, k, torch.arange(50).int(), torch.zeros(50).int(), lse=result[1])
    torch.testing.assert_close(scores.exp().sum(0), torch.ones(4), rtol=1e-5, atol=1e-6)


@all_cases
@pytest.mark.parametrize(
    ("index", "seq", "words"), [(5, 0, "token_index"), (-1, 0, "token_index"), (0, 2, "token_seq")]
)
def test_rows_outside(kernel: Case, index: int, seq: int, words: str) -> None:
    """The host refuses them. A device cannot: there their scores are NaN and their neighbours' are right."""
    q, k = torch.ones(2, 2, 8, dtype=kernel.dtype), torch.ones(5, 1, 8, dtype=kernel.dtype)
    if kernel.backend in ("triton", "cuda"):
        found = glimpse_scores(q, k, ints(4, index, 0), ints(1, seq, 0), scale=1.0)
        assert found[1].isnan().all() and (found[::2] == 8.0).all()
    elif kernel.backend == "cpu":
        with pytest.raises(ValueError, match=words):
            glimpse_scores(q, k, ints(index), ints(seq))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k": torch.zeros(5, 1, 9)}, ValueError, "k: expected shape"),
        ({"k": torch.zeros(5, 1, 8).bfloat16()}, TypeError, "k: expected dtype float32"),
        ({"token_index": torch.zeros(3, dtype=torch.int64)}, TypeError, "token_index: expected dtype int32"),
        ({"token_seq": torch.zeros(4, dtype=torch.int32)}, ValueError, "token_seq: expected shape"),
        ({"lse": torch.zeros(2, 3)}, ValueError, "lse: expected shape"),
        ({"out": torch.zeros(3, 2).bfloat16()}, TypeError, "out: expected dtype float32"),
    ],
)
def test_wrong_arguments(change: dict[str, Tensor], error: type[Exception], words: str) -> None:
    arguments: dict[str, Tensor] = {
        "q": torch.zeros(2, 2, 8),
        "k": torch.zeros(5, 1, 8),
        "token_index": torch.zeros(3, dtype=torch.int32),
        "token_seq": torch.zeros(3, dtype=torch.int32),
    }
    arguments.update(change)
    with pytest.raises(error, match=words):
        glimpse_scores(**arguments)  # type: ignore[arg-type]

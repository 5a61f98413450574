# SPDX-License-Identifier: Apache-2.0
"""`last_row_attention` on every backend against a softmax in fp64, and against recorded methods."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from glimpse_kernels import last_row_attention
from tests.kernels.kernel_cases import Case, compiled_cases, cu_seqlens, fused_views, on_threads, op_cases

METHODS = Path(__file__).parents[1] / "golden" / "methods"
all_cases = pytest.mark.parametrize("kernel", op_cases("last_row_attention"), indirect=True)
compiled = pytest.mark.parametrize("kernel", compiled_cases("last_row_attention"), indirect=True)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def expected(
    q: Tensor, k: Tensor, cu: Tensor, index: Tensor, seq: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """[N] weights and [B, Hq] lse in fp64, from whole rows."""
    factor = q.shape[2] ** -0.5 if scale is None else scale
    keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    weights = torch.zeros(k.shape[0], dtype=torch.float64)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=torch.float64)
    ends = cu.tolist()
    for b, (start, stop) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        if start < stop:
            logits = factor * torch.einsum("hd,jhd->hj", q[b].double(), keys[start:stop])
            weights[start:stop] = torch.softmax(logits, -1).mean(0)
            lse[b] = torch.logsumexp(logits, -1)
    return weights[index.long()], lse


def close(found: Tensor, want: Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), want, rtol=2e-5, atol=1e-8)


@all_cases
@pytest.mark.parametrize(
    ("heads", "dim"),
    [((2, 2), 1), ((20, 1), 24), ((4, 2), 64), ((4, 4), 80), ((16, 2), 128), ((28, 4), 128), ((4, 2), 200)],
    ids=str,
)
def test_weights(kernel: Case, heads: tuple[int, int], dim: int) -> None:
    """Sequences of many lengths, one of them empty, some tokens of each in any order; strangers hold NaN."""
    lengths = [33, 0, 140, 1] if kernel.interpreted else [140, 0, 257, 1]
    cu = cu_seqlens(lengths) + 9
    q = torch.randn(4, heads[0], dim).to(kernel.dtype)
    k = torch.randn(sum(lengths) + 20, heads[1], dim).to(kernel.dtype)
    k[:9], k[9 + sum(lengths) :] = float("nan"), float("nan")
    index = 9 + torch.randperm(sum(lengths))[: 25 if kernel.interpreted else 203].int()
    seq = (torch.bucketize(index, cu, right=True) - 1).int()
    want, lse = expected(q, k, cu, index, seq)
    close(last_row_attention(q, k, cu, index, seq), want)
    close(last_row_attention(q, k, cu, index, seq, lse=lse.float()), want)


@all_cases
def test_all_tokens_sum_to_one(kernel: Case) -> None:
    lengths = [128, 127, 129, 300] if kernel.interpreted else [128, 127, 129, 3000, 8192 + 65]
    cu = cu_seqlens(lengths)
    q, k = (
        torch.randn(len(lengths), 6, 32).to(kernel.dtype),
        torch.randn(sum(lengths), 2, 32).to(kernel.dtype),
    )
    seq = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).int()
    found = last_row_attention(q, k, cu, torch.arange(sum(lengths)).int(), seq)
    sums = torch.zeros(len(lengths)).index_add_(0, seq.long(), found)
    torch.testing.assert_close(sums, torch.ones(len(lengths)), rtol=1e-5, atol=0)


@all_cases
def test_scale_out_views_and_large_logits(kernel: Case) -> None:
    """q and k are views of a fused projection, lse of a wider buffer; logits of hundreds neither overflow nor vanish."""
    rows = (20 * torch.randn(60, 4, 24)).to(kernel.dtype)
    fused, k, _ = fused_views(rows, (5 * torch.randn(60, 2, 24)).to(kernel.dtype), rows)
    cu, q = cu_seqlens([40, 20]), fused[39:60:20]
    index, seq = ints(3, 41, 2, 59, 59), ints(0, 1, 0, 1, 1)
    want, lse = expected(q, k, cu, index, seq, 0.2)
    wide = torch.full((2, 10), float("nan"))
    wide[:, 3:7] = lse.float()
    out = torch.full((5,), float("nan"))
    returned = last_row_attention(q, k, cu, index, seq, scale=0.2, out=out)
    assert returned.data_ptr() == out.data_ptr()
    torch.testing.assert_close(
        out.double(), want, rtol=1e-3, atol=1e-7
    )  # an fp32 logit of 500 is known to 3e-5
    found = last_row_attention(q, k, cu, index, seq, scale=0.2, lse=wide[:, 3:7])
    torch.testing.assert_close(found.double(), want, rtol=1e-3, atol=1e-7)


@all_cases
def test_lse_of_nothing_gives_nothing(kernel: Case) -> None:
    q, k = torch.randn(2, 4, 16).to(kernel.dtype), torch.randn(10, 2, 16).to(kernel.dtype)
    lse = torch.zeros(2, 4)
    lse[1] = float("-inf")
    found = last_row_attention(q, k, cu_seqlens([10, 0]), ints(1, 2, 3), ints(1, 1, 1), lse=lse)
    assert torch.equal(found, torch.zeros(3))


@all_cases
def test_a_sequence_does_not_depend_on_its_neighbours(kernel: Case) -> None:
    lengths = [30, 300, 64]
    cu = cu_seqlens(lengths)
    q, k = torch.randn(3, 6, 40).to(kernel.dtype), torch.randn(394, 2, 40).to(kernel.dtype)
    seq = torch.arange(3).repeat_interleave(torch.tensor(lengths)).int()
    together = last_row_attention(q, k, cu, torch.arange(394).int(), seq)
    alone = []
    for b, (start, stop) in enumerate(((0, 30), (30, 330), (330, 394))):
        zeros, index = torch.zeros(stop - start).int(), torch.arange(stop - start).int()
        alone.append(
            last_row_attention(q[b : b + 1], k[start:stop], cu_seqlens([stop - start]), index, zeros)
        )
    if (
        kernel.backend == "naive" or kernel.interpreted
    ):  # products of torch and NumPy depend on the place in a matrix
        torch.testing.assert_close(together, torch.cat(alone), rtol=2e-6, atol=1e-8)
    else:
        assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together, last_row_attention(q, k, cu, torch.arange(394).int(), seq))


@all_cases
def test_no_tokens(kernel: Case) -> None:
    q, k = (torch.randn(1, 2, 8).to(kernel.dtype) for _ in range(2))
    assert last_row_attention(q, k, cu_seqlens([1]), ints(), ints()).shape == (0,)
    assert last_row_attention(q[:0], k, cu_seqlens([]), ints(), ints()).shape == (0,)


@all_cases
def test_keys_that_are_not_numbers(kernel: Case) -> None:
    """They reach the rows of their own sequence."""
    q, k = torch.randn(2, 4, 16).to(kernel.dtype), torch.randn(40, 2, 16).to(kernel.dtype)
    cu, index, seq = cu_seqlens([25, 15]), ints(3, 24, 25, 39), ints(0, 0, 1, 1)
    want, lse = expected(q, k, cu, index, seq)
    k[7, 1, 5] = float("nan")
    found = last_row_attention(q, k, cu, index, seq)
    assert found[:2].isnan().all()
    close(found[2:], want[2:])
    close(last_row_attention(q, k, cu, index, seq, lse=lse.float()), want)  # row 7 is not listed


@all_cases
def test_heads_that_give_nothing(kernel: Case) -> None:
    """The mean is over all heads, those with an lse of -inf too."""
    q, k = torch.randn(1, 4, 16).to(kernel.dtype), torch.randn(25, 2, 16).to(kernel.dtype)
    cu, index, seq = cu_seqlens([25]), ints(3, 24), ints(0, 0)
    _, lse = expected(q, k, cu, index, seq)
    lse = lse.float()
    lse[0, 2:] = float("-inf")
    two = torch.softmax(torch.einsum("hd,jd->hj", q[0, :2].double(), k[:, 0].double()) / 4, -1)
    close(last_row_attention(q, k, cu, index, seq, lse=lse), two.sum(0)[[3, 24]] / 4)


@compiled
def test_threads(kernel: Case) -> None:
    """Enough keys for all of them; the chunks of a sequence and the tiles of listed keys fall together in many ways."""
    lengths = [700, 0, 1, 1500, 131]
    cu = cu_seqlens(lengths)
    q = torch.randn(5, 14, 72).to(kernel.dtype)
    k = torch.randn(sum(lengths), 2, 72).to(kernel.dtype)
    index = torch.randperm(sum(lengths))[:1501].int()
    seq = (torch.bucketize(index, cu, right=True) - 1).int()
    want, lse = expected(q, k, cu, index, seq)
    for given in (None, lse.float()):
        found = on_threads(lambda given=given: last_row_attention(q, k, cu, index, seq, lse=given))  # type: ignore[misc]
        close(found[0], want)
        assert all(torch.equal(found[0], other) for other in found[1:])


@compiled
@pytest.mark.parametrize(
    ("index", "seq", "cu", "words"),
    [
        (5, 0, [0, 3, 5], r"token_index\[1\]: expected a row of k in \[0, 5\), found 5"),
        (-1, 0, [0, 3, 5], r"token_index\[1\]"),
        (0, 2, [0, 3, 5], r"token_seq\[1\]: expected a row of q in \[0, 2\), found 2"),
        (0, -1, [0, 3, 5], r"token_seq\[1\]"),
        (0, 0, [0, 3, 6], "cu_seqlens_k: expected at most 5 rows, found 6"),
        (0, 0, [0, 3, 2], "cu_seqlens_k: expected ascending values, found 2 after 3"),
        (0, 0, [-1, 3, 5], r"cu_seqlens_k\[0\]: expected >= 0, found -1"),
    ],
)
def test_rows_outside(kernel: Case, index: int, seq: int, cu: list[int], words: str) -> None:
    q, k = torch.ones(2, 2, 8, dtype=kernel.dtype), torch.ones(5, 1, 8, dtype=kernel.dtype)
    with pytest.raises(ValueError, match=f"last_row_attention: {words}"):
        last_row_attention(q, k, ints(*cu), ints(0, index), ints(0, seq))


def projected(data: dict[str, Tensor], stage: str, heads: int, kv: int, eps: float) -> tuple[Tensor, Tensor]:
    """q and k [L, heads, D] of a decoder layer, before rotary position: RMSNorm and the two projections."""
    x = data[f"in.{stage}hidden"] if f"in.{stage}hidden" in data else data["in.hidden"]
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * data[f"in.{stage}norm_weight"]
    q, k = (
        x @ data[f"in.{stage}{name}_weight"].T + data.get(f"in.{stage}{name}_bias", torch.zeros(1))
        for name in "qk"
    )
    return q.unflatten(1, (heads, -1)), k.unflatten(1, (kv, -1))


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    half = x.shape[2] // 2
    angles = positions[:, None].float() / 10000.0 ** (torch.arange(half) / half)
    cos, sin = angles.cos().repeat(1, 2)[:, None], angles.sin().repeat(1, 2)[:, None]
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def assert_score(kernel: Case, q: Tensor, k: Tensor, first: int, score: Tensor) -> None:
    index = torch.arange(first, first + len(score)).int()
    found = last_row_attention(
        q[-1:].to(kernel.dtype), k.to(kernel.dtype), cu_seqlens([len(k)]), index, torch.zeros_like(index)
    )
    tolerance = 1e-4 if kernel.dtype is torch.float32 else 2e-2
    assert (found - score).abs().max() <= tolerance * score.abs().max()


def recorded(kernel: Case, name: str) -> dict[str, Tensor]:
    return {key: t.to(kernel.device) for key, t in load_file(METHODS / f"{name}.safetensors").items()}


@all_cases
@pytest.mark.parametrize(("name", "kv", "first"), [("fastv_mha_k2_r05", 4, 6), ("fastv_gqa_k3_r075", 2, 5)])
def test_fastv(kernel: Case, name: str, kv: int, first: int) -> None:
    """Scores of the original implementation, which forms the whole matrix of that layer."""
    data = recorded(kernel, name)
    q, k = projected(data, "", 4, kv, 1e-6)
    q, k = rotated(q, data["in.position_ids"]), rotated(k, data["in.position_ids"])
    assert_score(kernel, q, k, first, data["out.score"])


@all_cases
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_pyramiddrop(kernel: Case, stage: int) -> None:
    """Scores of the original implementation over three drops, with positions renumbered at each."""
    data = recorded(kernel, "pdrop_3stages_n144")
    for earlier in range(stage):
        kept = data[f"out.stage{earlier}_kept_of_current"]
        count = len(data[f"out.stage{earlier}_score"])
        x = data["in.hidden"]
        data["in.hidden"] = torch.cat([x[:5], x[5 : 5 + count][kept], x[5 + count :]])
    q, k = projected(data, f"stage{stage}_", 4, 4, 1e-6)
    positions = torch.arange(len(q))
    assert_score(kernel, rotated(q, positions), rotated(k, positions), 5, data[f"out.stage{stage}_score"])


@all_cases
@pytest.mark.parametrize("name", ["pdrop_qwen_16x24", "vscan_qwen_double_22x18"])
@pytest.mark.parametrize("stage", [0, 1])
def test_second_stage_on_qwen(kernel: Case, name: str, stage: int) -> None:
    """Scores of the original implementation: no rotary position, grouped heads, biases."""
    data = recorded(kernel, name)
    q, k = projected(data, f"stage{stage}_", 4, 2, 1e-6)
    assert_score(kernel, q, k, 4, data[f"out.stage{stage}_score"])


def test_gradients() -> None:
    q, k = torch.randn(1, 2, 4, requires_grad=True), torch.randn(6, 1, 4, requires_grad=True)
    found = last_row_attention(q, k, cu_seqlens([6]), ints(4, 0), ints(0, 0))
    got = torch.autograd.grad(found[0], (q, k))
    want = torch.autograd.grad(torch.softmax(q[0] @ k[:, 0].T / 2, -1).mean(0)[4], (q, k))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k": torch.zeros(5, 1, 9)}, ValueError, "k: expected shape"),
        ({"k": torch.zeros(5, 3, 8)}, ValueError, "q: expected a multiple of Hkv = 3"),
        ({"k": torch.zeros(5, 1, 8).bfloat16()}, TypeError, "k: expected dtype float32"),
        ({"cu_seqlens_k": torch.zeros(2, dtype=torch.int32)}, ValueError, "cu_seqlens_k: expected shape"),
        ({"token_index": torch.zeros(3, dtype=torch.int64)}, TypeError, "token_index: expected dtype int32"),
        ({"token_seq": torch.zeros(4, dtype=torch.int32)}, ValueError, "token_seq: expected shape"),
        ({"lse": torch.zeros(2, 3)}, ValueError, "lse: expected shape"),
        ({"out": torch.zeros(3).bfloat16()}, TypeError, "out: expected dtype float32"),
        ({"out": torch.zeros(6)[::2]}, ValueError, "out: expected a contiguous"),
    ],
)
def test_wrong_arguments(change: dict[str, Tensor], error: type[Exception], words: str) -> None:
    arguments: dict[str, Tensor] = {
        "q": torch.zeros(2, 2, 8),
        "k": torch.zeros(5, 1, 8),
        "cu_seqlens_k": torch.zeros(3, dtype=torch.int32),
        "token_index": torch.zeros(3, dtype=torch.int32),
        "token_seq": torch.zeros(3, dtype=torch.int32),
    }
    arguments.update(change)
    with pytest.raises(error, match=words):
        last_row_attention(**arguments)  # type: ignore[arg-type]

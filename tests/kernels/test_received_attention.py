# SPDX-License-Identifier: Apache-2.0
"""`received_attention` on every backend against column sums of the whole matrix in fp64, and against recorded methods."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from glimpse_kernels import _triton, attention, received_attention
from glimpse_kernels.attention.naive import attention as naive_attention
from tests.kernels.kernel_cases import (
    Case,
    compiled_cases,
    cu_seqlens,
    fused_views,
    growths,
    measures_memory,
    needs_compiled,
    on_threads,
    op_cases,
)

METHODS = Path(__file__).parents[1] / "golden" / "methods"
all_cases = pytest.mark.parametrize("kernel", op_cases("received_attention"), indirect=True)
compiled = pytest.mark.parametrize("kernel", compiled_cases("received_attention"), indirect=True)
AMPERE, HOPPER = _triton.Chip(80, 3), _triton.Chip(90, 3)


@pytest.fixture(autouse=True)
def tiles_of_a_gpu() -> Iterator[None]:
    """Interpreted, fp32 takes the large tiles of 16-bit types: programs cost time there, registers do not."""
    if not _triton.interpreting():
        yield
        return
    from glimpse_kernels.received_attention.triton import CONFIGS, Tiles

    with CONFIGS.forced(Tiles(warps=8, stages=3, keys=128, queries=64)):
        yield


def bounds(cu: Tensor) -> list[tuple[int, int]]:
    ends = cu.tolist()
    return list(zip(ends[:-1], ends[1:], strict=True))


def visible(lq: int, lk: int, causal: bool, positions: Tensor | None = None) -> Tensor:
    """[lq, lk] bool."""
    last = torch.arange(lq)[:, None] + lk - lq if positions is None else positions[:, None]
    return torch.arange(lk)[None, :] <= last if causal else torch.ones(lq, lk, dtype=torch.bool)


def expected(
    q: Tensor, k: Tensor, lse: Tensor | None, cu_q: Tensor, cu_k: Tensor, *, causal: bool = False,
    positions: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[Tk] received and [Tq, Hq] lse in fp64, from whole matrices; with lse None, that of the keys of the call."""
    factor = q.shape[2] ** -0.5 if scale is None else scale
    keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    received = torch.zeros(k.shape[0], dtype=torch.float64)
    found = torch.full(q.shape[:2], float("-inf"), dtype=torch.float64)
    for (q0, q1), (k0, k1) in zip(bounds(cu_q), bounds(cu_k), strict=True):
        if q0 == q1 or k0 == k1:
            continue
        logits = factor * torch.einsum("ihd,jhd->hij", q[q0:q1].double(), keys[k0:k1])
        part = None if positions is None else positions[q0:q1]
        logits = logits.masked_fill(~visible(q1 - q0, k1 - k0, causal, part), float("-inf"))
        found[q0:q1] = torch.logsumexp(logits, -1).T
        rows = (found if lse is None else lse.double())[q0:q1].T[..., None]
        weights = torch.where(rows == float("-inf"), 0.0, torch.exp(logits - rows))
        received[k0:k1] = weights.sum(1).mean(0)
    return received, found


def close(found: Tensor, want: Tensor) -> None:
    """Sums of positive terms in fp32: relative error of each; a floor for those that almost vanish."""
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), want, rtol=2e-5, atol=2e-7)


@all_cases
@pytest.mark.parametrize(
    ("heads", "dim"),
    [((2, 2), 1), ((7, 1), 24), ((4, 2), 64), ((4, 4), 80), ((16, 2), 128), ((28, 4), 128), ((2, 1), 200)],
    ids=str,
)
@pytest.mark.parametrize("causal", [False, True])
def test_columns(kernel: Case, heads: tuple[int, int], dim: int, causal: bool) -> None:
    """Segments of many lengths, one without keys, one without queries, one with more queries than keys."""
    if kernel.interpreted and heads[0] > 8:  # few programs: a head costs one a key tile
        cu_q, cu_k = cu_seqlens([5, 0, 40, 3]), cu_seqlens([30, 9, 55, 0])
    else:
        cu_q, cu_k = cu_seqlens([5, 0, 130, 3, 40]), cu_seqlens([70, 9, 200, 0, 33])
    q = torch.randn(int(cu_q[-1]), heads[0], dim).to(kernel.dtype)
    k = torch.randn(int(cu_k[-1]), heads[1], dim).to(kernel.dtype)
    want, lse = expected(q, k, None, cu_q, cu_k, causal=causal)
    close(received_attention(q, k, lse.float(), cu_q, cu_k, causal=causal), want)


@all_cases
@pytest.mark.parametrize("chip", [AMPERE, HOPPER], ids=["plain", "descriptor"])
@pytest.mark.parametrize("causal", [False, True])
def test_tile_edges(kernel: Case, chip: _triton.Chip, causal: bool) -> None:
    """Lengths just below, at and above those of tiles; strangers on both sides of a segment are NaN."""
    for length in (1, 63, 64, 65, 127, 128, 129) if not kernel.interpreted else (1, 64, 65, 128, 129):
        q = torch.randn(length + 40, 2, 80).to(kernel.dtype)
        k = torch.randn(length + 70, 2, 80).to(kernel.dtype)
        lse = torch.full((length + 40, 2), float("nan"))
        cu_q = torch.tensor([11, 11 + length], dtype=torch.int32)
        cu_k = torch.tensor([50, 50 + length], dtype=torch.int32)
        q[:11], q[11 + length :], k[:50], k[50 + length :] = (float("nan"),) * 4
        want, exact = expected(q, k, None, cu_q, cu_k, causal=causal)
        lse[11 : 11 + length] = exact[11 : 11 + length].float()
        with _triton.force_chip(chip):
            close(received_attention(q, k, lse, cu_q, cu_k, causal=causal), want)


@all_cases
@pytest.mark.parametrize("chip", [AMPERE, HOPPER], ids=["plain", "descriptor"])
def test_many_windows(kernel: Case, chip: _triton.Chip) -> None:
    """Windows of a vision tower, whole and cut, several to a tile, in views of a fused projection."""
    lengths = [64, 64, 32, 4, 16, 64, 8, 64, 4, 4, 4, 60]
    cu = cu_seqlens(lengths)
    q, k, _ = (torch.randn(sum(lengths), 2, 80).to(kernel.dtype) for _ in range(3))
    want, lse = expected(q, k, None, cu, cu)
    q, k, _ = fused_views(q, k, k)
    with _triton.force_chip(chip):
        found = received_attention(q, k, lse.float(), cu, cu)
    close(found, want)
    sums = torch.stack([found[a:b].sum() for a, b in bounds(cu)])
    torch.testing.assert_close(sums, torch.tensor(lengths).float(), rtol=1e-5, atol=0)


@all_cases
def test_more_segments_than_are_searched_at_once(kernel: Case) -> None:
    lengths = torch.randint(0, 3, (600,)).tolist()
    cu = cu_seqlens(lengths)
    q, k = (torch.randn(sum(lengths), 1, 16).to(kernel.dtype) for _ in range(2))
    if kernel.interpreted:  # an iteration a segment
        cu = cu[:1].repeat(601)
        cu[300:] = 40
        cu[520:] = 50
    want, lse = expected(q, k, None, cu, cu)
    close(received_attention(q, k, lse.float(), cu, cu), want)


@all_cases
def test_positions(kernel: Case) -> None:
    """Queries gathered out of a longer sequence; a negative position sees nothing, whatever its row holds."""
    q, k = torch.randn(75, 4, 32).to(kernel.dtype), torch.randn(160, 2, 32).to(kernel.dtype)
    cu_q, cu_k = cu_seqlens([70, 5]), cu_seqlens([150, 10])
    positions = torch.cat([torch.randint(-1, 150, (70,)), torch.randint(0, 10, (5,))]).int()
    want, lse = expected(q, k, None, cu_q, cu_k, causal=True, positions=positions)
    q[positions < 0] = float("nan")
    found = received_attention(q, k, lse.float(), cu_q, cu_k, causal=True, q_positions=positions)
    close(found, want)


@all_cases
def test_rows_that_give_nothing_and_rows_that_count_twice(kernel: Case) -> None:
    q, k = (torch.randn(90, 2, 16).to(kernel.dtype) for _ in range(2))
    cu = cu_seqlens([90])
    _, lse = expected(q, k, None, cu, cu)
    lse = lse.float()
    raters = torch.arange(90) % 3 == 0
    some = lse.masked_fill(~raters[:, None], float("-inf"))
    want, _ = expected(q[raters], k, lse[raters], cu_seqlens([30]), cu)
    close(received_attention(q, k, some, cu, cu), want)
    close(received_attention(q, k, some - torch.tensor(2.0).log(), cu, cu), 2 * want)


@all_cases
def test_lse_of_more_keys_and_views_of_it(kernel: Case) -> None:
    """A score of image columns only: the softmax was over the text too. The lse may be a view of any strides."""
    q, k = torch.randn(40, 4, 24).to(kernel.dtype), torch.randn(100, 2, 24).to(kernel.dtype)
    whole, lse = expected(q, k, None, cu_seqlens([40]), cu_seqlens([100]), scale=0.3)
    lse = lse.float().T.contiguous().T
    found = received_attention(q, k[10:77], lse, cu_seqlens([40]), cu_seqlens([67]), scale=0.3)
    close(found, whole[10:77])


@all_cases
@pytest.mark.parametrize("group", [1, 3, 4])
def test_groups_order_and_out(kernel: Case, group: int) -> None:
    q, k = (torch.randn(180, 3, 16).to(kernel.dtype) for _ in range(2))
    cu = cu_seqlens([121, 47])  # the groups do not care where a segment ends; the last 12 rows are in none
    want, lse = expected(q, k, None, cu, cu)
    order = torch.randperm(180 // group).int()
    out = torch.full((180 // group,), float("nan"))
    returned = received_attention(q, k, lse.float(), cu, cu, group=group, order=order, out=out)
    assert returned.data_ptr() == out.data_ptr()
    close(out[order.long()], want.view(-1, group).mean(1))


@all_cases
@pytest.mark.parametrize("chip", [AMPERE, HOPPER], ids=["plain", "descriptor"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_segment_does_not_depend_on_its_neighbours(kernel: Case, chip: _triton.Chip, causal: bool) -> None:
    lengths = [30, 145, 0, 7, 64]
    cu = cu_seqlens(lengths)
    q, k = (torch.randn(sum(lengths), 2, 32).to(kernel.dtype) for _ in range(2))
    _, lse = expected(q, k, None, cu, cu, causal=causal)
    lse = lse.float()
    with _triton.force_chip(chip):
        together = received_attention(q, k, lse, cu, cu, causal=causal)
        again = received_attention(q, k, lse, cu, cu, causal=causal)
        alone = [
            received_attention(
                q[a:b], k[a:b], lse[a:b], cu_seqlens([b - a]), cu_seqlens([b - a]), causal=causal
            )
            for a, b in bounds(cu)
        ]
    assert torch.equal(together, again)
    if (
        kernel.backend == "naive" or kernel.interpreted
    ):  # products of torch and NumPy depend on the place in a matrix
        torch.testing.assert_close(together, torch.cat(alone), rtol=2e-6, atol=1e-7)
    else:
        assert torch.equal(together, torch.cat(alone))


@all_cases
def test_nothing_to_do(kernel: Case) -> None:
    q, k, lse = (
        torch.randn(6, 2, 8).to(kernel.dtype),
        torch.randn(4, 1, 8).to(kernel.dtype),
        torch.randn(6, 2),
    )
    assert received_attention(q, k[:0], lse, cu_seqlens([6]), cu_seqlens([0])).shape == (0,)
    for rows, queries, keys in ((0, [0], [4]), (6, [], []), (6, [0, 6], [4, 0]), (6, [6], [0])):
        cu_q, cu_k = cu_seqlens(queries), cu_seqlens(keys)
        assert torch.equal(received_attention(q[:rows], k, lse[:rows], cu_q, cu_k), torch.zeros(4))


@all_cases
def test_with_the_lse_of_attention(kernel: Case) -> None:
    """The two calls as they are used, in the dtype of the model, against autograd-free softmax in fp64."""
    q, k, v = (torch.randn(96, 2, 80).to(kernel.dtype) for _ in range(3))
    cu = cu_seqlens([96])
    _, lse = naive_attention(q, k, v, cu, cu, causal=False, return_lse=True)
    logits = torch.einsum("ihd,jhd->hij", q.double(), k.double()) * 80**-0.5
    want = torch.softmax(logits, -1).mean(0).sum(0).view(-1, 4).mean(1)
    close(received_attention(q, k, lse, cu, cu, group=4), want)


@compiled
@pytest.mark.parametrize("causal", [False, True])
def test_threads(kernel: Case, causal: bool) -> None:
    """The number of threads decides how many keys a task has; whole tiles, parts of one, and segments without keys."""
    q_lengths, k_lengths = [300, 7, 97, 0, 1], [517, 0, 300, 40, 1]
    cu_q, cu_k = cu_seqlens(q_lengths), cu_seqlens(k_lengths)
    q = torch.randn(sum(q_lengths), 6, 40).to(kernel.dtype)
    k = torch.randn(sum(k_lengths), 3, 40).to(kernel.dtype)
    want, lse = expected(q, k, None, cu_q, cu_k, causal=causal)
    lse = lse.float()
    found = on_threads(lambda: received_attention(q, k, lse, cu_q, cu_k, causal=causal), (1, 2, 3, 64))
    close(found[0], want)
    assert all(torch.equal(found[0], other) for other in found[1:])


@compiled
def test_sums_of_many_small_terms(kernel: Case) -> None:
    """Added one after the other in fp32, forty thousand equal terms are off by thirty times as much as is allowed."""
    n = 40000
    q, k = torch.zeros(n, 2, 4).to(kernel.dtype), torch.zeros(3, 2, 4).to(kernel.dtype)
    lse = torch.full((n, 2), 1.1).log()
    found = received_attention(q, k, lse, cu_seqlens([n]), cu_seqlens([3]))
    want = n * torch.exp(-lse[0, 0].double())
    torch.testing.assert_close(found.double(), want.expand(3), rtol=1e-5, atol=0)


@compiled
@pytest.mark.parametrize(
    ("cu_q", "cu_k", "order", "words"),
    [
        ([0, 7], [0, 8], None, "cu_seqlens_q: expected at most 6 rows, found 7"),
        ([0, 6], [0, 9], None, "cu_seqlens_k: expected at most 8 rows, found 9"),
        ([0, 4, 3], [0, 8, 8], None, "cu_seqlens_q: expected ascending values, found 3 after 4"),
        ([0, 6], [-2, 8], None, r"cu_seqlens_k\[0\]: expected >= 0, found -2"),
        ([0, 6], [0, 8], [0, 1, 4, 3], r"order\[2\]: expected a place in \[0, 4\), found 4"),
        ([0, 6], [0, 8], [0, 1, 2, -1], r"order\[3\]: expected a place in \[0, 4\), found -1"),
    ],
)
def test_places_outside(
    kernel: Case, cu_q: list[int], cu_k: list[int], order: list[int] | None, words: str
) -> None:
    q, k, lse = torch.ones(6, 2, 8).to(kernel.dtype), torch.ones(8, 1, 8).to(kernel.dtype), torch.ones(6, 2)
    places = None if order is None else torch.tensor(order).int()
    with pytest.raises(ValueError, match=f"received_attention: {words}"):
        received_attention(
            q, k, lse, torch.tensor(cu_q).int(), torch.tensor(cu_k).int(), group=2, order=places
        )


TOWER = """
from glimpse_kernels import received_attention

def bounds(n):
    return torch.tensor([0, n], dtype=torch.int32)

n = 32768
torch.set_num_threads(2)
for dtype in (torch.float32, torch.bfloat16):
    q, k = (torch.randn(n, 1, 16).to(dtype) for _ in range(2))
    lse = 10 + torch.rand(n, 1)
    received_attention(q[:300], k[:300], lse[:300], bounds(300), bounds(300))  # pages of the library and of its threads
    found = growth(lambda: received_attention(q, k, lse, bounds(n), bounds(n), group=4))
    for token in (0, 1234, 8191):
        logits = q[:, 0].double() @ k[4 * token : 4 * token + 4, 0].double().T / 4
        want = torch.exp(logits - lse.double()).sum(0).mean()
        torch.testing.assert_close(found[token].double(), want, rtol=2e-5, atol=0)
"""


@needs_compiled
@measures_memory
def test_memory_of_a_long_segment() -> None:
    """32,768 patches in one segment, whose matrix is 4 GiB a head: two threads take less than 4 MiB."""
    found = growths(TOWER)
    assert len(found) == 2 and max(found) < 4096


def rotated_again(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


@all_cases
@pytest.mark.parametrize("case", ["visionzip_qwen_eager_16x24", "visionzip_qwen_flash_20x14"])
def test_visionzip_on_qwen(kernel: Case, case: str) -> None:
    """Scores of the original implementation: mean over heads, sum over rows, mean of 4, raster order."""
    data = {name: t.to(kernel.device) for name, t in load_file(METHODS / f"{case}.safetensors").items()}
    _golden(kernel, data["in.q_rot"], data["in.k_rot"], data["in.window_index"], data["out.score"], 1.0)


@all_cases
@pytest.mark.parametrize("which", ["local", "global"])
def test_vscan_on_qwen(kernel: Case, which: str) -> None:
    """Scores of the original implementation with its second rotation: sum over heads, mean over rows."""
    data = {
        name: t.to(kernel.device)
        for name, t in load_file(METHODS / "vscan_qwen_double_22x18.safetensors").items()
    }
    q, k = (rotated_again(data[f"in.{which}_{x}_rot"], data["in.cos"], data["in.sin"]) for x in "qk")
    _golden(kernel, q, k, data["in.window_index"], data[f"out.score_{which}"], q.shape[1] / q.shape[0])


def _golden(kernel: Case, q: Tensor, k: Tensor, window_index: Tensor, score: Tensor, factor: float) -> None:
    q, k = q.to(kernel.dtype), k.to(kernel.dtype)
    cu = cu_seqlens([q.shape[0]])
    lse = torch.logsumexp(torch.einsum("ihd,jhd->ihj", q.float(), k.float()) * q.shape[2] ** -0.5, -1)
    found = factor * received_attention(q, k, lse, cu, cu, group=4, order=window_index.int())
    tolerance = 1e-5 if kernel.dtype is torch.float32 else 2e-2
    assert (found - score).abs().max() <= tolerance * score.abs().max()


def test_gradients() -> None:
    """The definition is differentiable in all three tensors."""
    q, k = torch.randn(5, 2, 4, requires_grad=True), torch.randn(6, 1, 4, requires_grad=True)
    lse = torch.randn(5, 2, requires_grad=True)
    weight = torch.randn(3)
    found = received_attention(
        q, k, lse, cu_seqlens([5]), cu_seqlens([6]), group=2, order=torch.tensor([2, 0, 1]).int()
    )
    got = torch.autograd.grad((found * weight).sum(), (q, k, lse))
    weights = torch.exp(torch.einsum("ihd,jd->hij", q, k[:, 0]) / 2 - lse.T[..., None])
    pooled = weights.mean(0).sum(0).view(3, 2).mean(1)
    want = torch.autograd.grad((pooled * weight[torch.tensor([2, 0, 1])]).sum(), (q, k, lse))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_agrees_with_attention_of_a_one_hot_value() -> None:
    """The column of key j is what attention returns, summed over rows, when v picks j."""
    q, k = torch.randn(20, 1, 8), torch.randn(12, 1, 8)
    cu_q, cu_k = cu_seqlens([20]), cu_seqlens([12])
    out, lse = attention(q, k, torch.eye(12)[:, None], cu_q, cu_k, causal=False, return_lse=True)
    torch.testing.assert_close(received_attention(q, k, lse, cu_q, cu_k), out[:, 0].sum(0))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k": torch.zeros(8, 2, 9)}, ValueError, "k: expected shape"),
        ({"k": torch.zeros(8, 3, 8)}, ValueError, "q: expected a multiple of Hkv = 3"),
        ({"k": torch.zeros(8, 2, 8).bfloat16()}, TypeError, "k: expected dtype float32"),
        ({"lse": torch.zeros(6, 3)}, ValueError, "lse: expected shape"),
        ({"lse": torch.zeros(6, 4).double()}, TypeError, "lse: expected dtype float32"),
        ({"cu_seqlens_k": torch.zeros(3, dtype=torch.int32)}, ValueError, "cu_seqlens_k: expected shape"),
        ({"cu_seqlens_q": torch.zeros(2)}, TypeError, "cu_seqlens_q: expected dtype int32"),
        ({"q_positions": torch.zeros(6, dtype=torch.int32)}, ValueError, "q_positions: expected None"),
        ({"group": 3}, ValueError, "group: expected a divisor of Tk = 8, found 3"),
        ({"group": 0}, ValueError, "group: expected a divisor"),
        ({"order": torch.zeros(8)}, TypeError, "order: expected dtype int32"),
        ({"group": 2, "order": torch.zeros(8, dtype=torch.int32)}, ValueError, "order: expected shape"),
        ({"out": torch.zeros(16)[::2]}, ValueError, "out: expected a contiguous"),
    ],
)
def test_wrong_arguments(change: dict[str, object], error: type[Exception], words: str) -> None:
    arguments: dict[str, object] = {
        "q": torch.zeros(6, 4, 8),
        "k": torch.zeros(8, 2, 8),
        "lse": torch.zeros(6, 4),
        "cu_seqlens_q": torch.tensor([0, 6], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 8], dtype=torch.int32),
    }
    arguments.update(change)
    with pytest.raises(error, match=words):
        received_attention(**arguments)  # type: ignore[arg-type]

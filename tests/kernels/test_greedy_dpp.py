# SPDX-License-Identifier: Apache-2.0
"""`greedy_dpp` on every backend: each pick against the best gain in fp64, exact cases, and recorded runs of CDPruner."""

from __future__ import annotations

import importlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from glimpse_kernels import _ext, cosine_similarity, force_backend, greedy_dpp
from tests.kernels.arena import sparse_tensor
from tests.kernels.kernel_cases import Case, cu_seqlens, forced_isa, forced_threads, isas_here, op_cases

METHODS = Path(__file__).parents[1] / "golden" / "methods"
RECORDED = {
    n: c for n, c in json.loads((METHODS / "manifest.json").read_text()).items() if c["method"] == "cdpruner"
}
all_cases = pytest.mark.parametrize("kernel", op_cases("greedy_dpp"), indirect=True)
compiled = pytest.mark.skipif(_ext.compiled() is None, reason="compiled extension not available")


def gains(kernel: Tensor, picks: list[int]) -> Tensor:
    """Schur complement of the picked block on the diagonal, fp64: what each token would add."""
    if not picks:
        return kernel.diagonal().clone()
    cross = kernel[picks]
    solved = torch.linalg.solve(kernel[picks][:, picks], cross)
    found = kernel.diagonal() - (cross * solved).sum(0)
    found[picks] = float("-inf")
    return found


def assert_greedy(similarity: Tensor, relevance: Tensor, picks: list[int], eps: float) -> None:
    """Each pick's gain is within rounding of the best one, given the picks before it; a stop is where none is above the floor."""
    similarity, relevance = similarity.double().cpu(), relevance.double().cpu()
    kernel = relevance[:, None] * similarity * relevance
    own = kernel.diagonal()
    done = picks.index(-1) if -1 in picks else len(picks)
    assert all(p == -1 for p in picks[done:]) and len(set(picks[:done])) == done
    for i in range(done):
        gain = gains(kernel, picks[:i])
        assert gain[picks[i]] > 0.5 * eps * own[picks[i]]
        allowed = gain[gain > 2 * eps * own].max()
        assert gain[picks[i]] >= allowed * (1 - 1e-4) - 1e-6 * own.max()
    if done < min(len(picks), len(own)):
        assert (gains(kernel, picks[:done]) <= 2 * eps * own + 1e-12).all()


@all_cases
def test_every_pick_is_the_best(kernel: Case) -> None:
    """Groups of many sizes, with more picks than tokens and with none; one has fewer directions than picks."""
    sizes, counts, dims = (
        [40, 0, 1, 33, 2, 150, 7, 60],
        [12, 3, 4, 40, 1, 50, 0, 30],
        [64, 8, 8, 40, 8, 96, 8, 10],
    )
    features = [torch.randn(n, d) + torch.randn(d) for n, d in zip(sizes, dims, strict=True)]
    blocks = [cosine_similarity(x, [x.shape[0]]).view(x.shape[0], x.shape[0]) for x in features]
    relevance = torch.rand(sum(sizes)) + 0.01
    packed = torch.cat([*(b.flatten() for b in blocks), torch.full((9,), float("nan"))])
    cu, places = cu_seqlens(sizes), cu_seqlens(counts)
    capacity = sum(counts) + 5
    picks, keep = greedy_dpp(packed, relevance, cu, places, capacity=capacity)
    assert picks.dtype == torch.int32 and keep.dtype == torch.bool and keep.shape == (sum(sizes),)
    found, first, place = picks.tolist(), 0, 0
    for n, count, block in zip(sizes, counts, blocks, strict=True):
        mine = [p - first if p >= 0 else -1 for p in found[place : place + count]]
        assert all(-1 <= p < n for p in mine)
        if n:
            assert_greedy(block, relevance[first : first + n], mine, 1e-5)
        first, place = first + n, place + count
    assert found[sum(counts) :] == [-1] * 5
    assert keep.nonzero().flatten().tolist() == sorted(p for p in found if p >= 0)
    assert sum(p >= 0 for p in found[-35:]) == 10
    # Nothing depends on the neighbours or on what is known about the longest group.
    again, _ = greedy_dpp(packed, relevance, cu, places, capacity=capacity, max_seqlen=150)
    assert torch.equal(picks, again)
    alone, _ = greedy_dpp(
        packed[: 40 * 40], relevance[:40], cu_seqlens([40]), cu_seqlens([12]), capacity=12, max_seqlen=40
    )
    assert alone.tolist() == found[:12]


@all_cases
@pytest.mark.parametrize("n", [5, 64, 201])
def test_classes(kernel: Case, n: int) -> None:
    """Tokens of a few classes, alike inside and strange to each other, small whole relevances: everything is exact. The best of each class
    is picked, the first of equals, and then nothing is left."""
    draw = random.Random(n)
    classes = [draw.randrange(1 + n // 4) for _ in range(n)]
    relevance = [float(draw.choice([-3, -2, -1, 1, 2, 3])) for _ in range(n)]
    best: dict[int, int] = {}
    for i in sorted(range(n), key=lambda i: (-abs(relevance[i]), i)):
        best.setdefault(classes[i], i)
    want = sorted(best.values(), key=lambda i: (-abs(relevance[i]), i))
    label = torch.tensor(classes)
    similarity = (label[:, None] == label).float()
    for count in (len(want) + 3, 2):
        picks, keep = greedy_dpp(
            similarity.flatten(),
            torch.tensor(relevance),
            cu_seqlens([n]),
            cu_seqlens([count]),
            capacity=count,
        )
        assert picks.tolist() == (want + [-1] * 3)[:count]
        assert keep.nonzero().flatten().tolist() == sorted(want[:count])


@pytest.mark.parametrize("kernel", op_cases("greedy_dpp", "triton"), indirect=True)
def test_groups_longer_than_a_block(kernel: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so short that the gains of the longer groups are in memory, and that threads share columns: the same picks, as sums
    run in one order."""
    module = importlib.import_module("glimpse_kernels.greedy_dpp.triton")
    sizes, counts = [40, 1, 16, 0, 17, 33], [14, 3, 20, 1, 17, 5]
    features = [torch.randn(n, 12) + 1 for n in sizes]
    packed = torch.cat([cosine_similarity(x, [x.shape[0]]) for x in features])
    relevance = torch.randn(sum(sizes))
    arguments = packed, relevance, cu_seqlens(sizes), cu_seqlens(counts)
    want = greedy_dpp(*arguments, capacity=sum(counts))
    monkeypatch.setattr(module, "LEAST_BLOCK", 16)
    monkeypatch.setattr(module, "MOST_BLOCK", 16)
    for flight in (1, 4):
        with module.CONFIGS.forced(module.Rows(warps=4, stages=1, flight=flight)):
            found = greedy_dpp(*arguments, capacity=sum(counts))
        assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1])
    picks, place, first = want[0].tolist(), 0, 0
    for x, count in zip(features, counts, strict=True):
        n = x.shape[0]
        mine = [p - first if p >= 0 else -1 for p in picks[place : place + count]]
        if n:
            assert_greedy(cosine_similarity(x, [n]).view(n, n), relevance[first : first + n], mine, 1e-5)
        place, first = place + count, first + n


@all_cases
def test_squares_are_rounded_before_they_are_taken_away(kernel: Case) -> None:
    """Tokens that tie at 1/4 after the first pick. Of their c the square of the earlier one is rounded down, that of the later one up:
    taken away unrounded, they would make the later one the better."""
    down, up = 0.81, 0.8
    squares = torch.tensor([down, up]) * torch.tensor([down, up])
    errors = squares.double() - torch.tensor([down, up]).double() ** 2
    assert errors[0] < 0 < errors[1]
    similarity = torch.zeros(3, 3)
    similarity[0, 0] = 4.0
    similarity[0, 1:] = similarity[1:, 0] = 2 * torch.tensor([down, up])
    similarity[1, 1], similarity[2, 2] = (0.25 + squares).tolist()
    assert torch.equal(similarity.diagonal()[1:] - squares, torch.full((2,), 0.25))
    picks, _ = greedy_dpp(similarity.flatten(), torch.ones(3), cu_seqlens([3]), cu_seqlens([2]), capacity=2)
    assert picks.tolist() == [0, 1]


@compiled
@pytest.mark.parametrize("isa", isas_here())
def test_many_picks_in_long_groups(isa: str) -> None:
    """Tokens wait as long as they cannot be the best, many where few are relevant. Each pick is the best all the same, on any number
    of threads."""
    sizes, count = [700, 333, 333, 333], 120
    features = [torch.randn(n, 160) + torch.randn(160) for n in sizes]
    packed = torch.cat([cosine_similarity(x, [x.shape[0]]) for x in features])
    relevance = torch.rand(sum(sizes)) ** 3
    found = []
    with force_backend("cpu"), forced_isa(isa):
        for threads in (1, 2, 5):
            with forced_threads(threads):
                picks, _ = greedy_dpp(
                    packed, relevance, cu_seqlens(sizes), cu_seqlens([count] * 4), capacity=4 * count
                )
            found.append(picks)
    assert all(torch.equal(found[0], other) for other in found[1:])
    block, mine = packed[: 700 * 700].view(700, 700), found[0][:count].tolist()
    assert min(mine) >= 0
    assert_greedy(block, relevance[:700], mine, 1e-5)


@all_cases
def test_floor(kernel: Case) -> None:
    """Two directions at an angle of 0.01: the second adds 1e-4 of itself. The floor is relative: the least relevant token is
    no rounding error."""
    x = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.01, 0.0], [0.0, 0.0, 1.0]])
    similarity = cosine_similarity(x, [3])
    relevance = torch.tensor([1.0, 0.9, 1e-6])
    for eps, want in ((1e-5, [0, 1, 2]), (1e-3, [0, 2, -1])):
        picks, _ = greedy_dpp(similarity, relevance, cu_seqlens([3]), cu_seqlens([3]), capacity=3, eps=eps)
        assert picks.tolist() == want


@all_cases
def test_nan_and_zero_are_never_picked(kernel: Case) -> None:
    nan = float("nan")
    similarity = torch.eye(6)
    similarity[2, 2], similarity[0, 5] = nan, nan
    relevance = torch.tensor([3.0, nan, 1.0, 0.0, 2.0, 1.0])
    picks, keep = greedy_dpp(similarity.flatten(), relevance, cu_seqlens([6]), cu_seqlens([6]), capacity=6)
    assert picks.tolist() == [0, 4, -1, -1, -1, -1]
    assert keep.tolist() == [True, False, False, False, True, False]


@all_cases
def test_more_directions_than_features_stops(kernel: Case) -> None:
    """Where the original runs into NaN: 24 directions, 64 picks."""
    x = torch.randn(100, 24)
    picks, _ = greedy_dpp(
        cosine_similarity(x, [100]), torch.ones(100), cu_seqlens([100]), cu_seqlens([64]), capacity=64
    )
    found = picks.tolist()
    assert len(set(found[:24])) == 24 and min(found[:24]) >= 0 and found[24:] == [-1] * 40


@all_cases
def test_capacity_and_longest_group(kernel: Case) -> None:
    similarity = torch.eye(5).flatten().repeat(3)
    relevance = torch.arange(15).float() + 1
    full = [4, 3, 2, 9, 8, 7, 14, 13, 12]
    for capacity in (0, 1, 4, 9, 12):
        picks, keep = greedy_dpp(
            similarity, relevance, cu_seqlens([5] * 3), cu_seqlens([3] * 3), capacity=capacity
        )
        assert picks.tolist() == (full + [-1] * 3)[:capacity]
        assert keep.nonzero().flatten().tolist() == sorted(full[:capacity])
    uneven = torch.cat((torch.eye(5).flatten(), torch.eye(4).flatten()))
    picks, keep = greedy_dpp(
        uneven, relevance[:9], cu_seqlens([5, 4]), cu_seqlens([2, 2]), capacity=4, max_seqlen=4
    )
    assert picks.tolist() == [-1, -1, 8, 7] and keep.nonzero().flatten().tolist() == [7, 8]
    picks, keep = greedy_dpp(torch.zeros(0), torch.zeros(0), cu_seqlens([]), cu_seqlens([]), capacity=2)
    assert picks.tolist() == [-1, -1] and keep.shape == (0,)


@all_cases
def test_far_group(kernel: Case) -> None:
    """A matrix past 2^31 elements, behind one of a group that is too long to be looked at."""
    long, n = 46_400, 20
    similarity = sparse_tensor((long * long + n * n,), dtype=torch.float32)
    block = torch.eye(n)
    similarity[long * long :] = block.flatten()
    relevance = torch.arange(long + n).float()
    picks, keep = greedy_dpp(
        similarity, relevance, cu_seqlens([long, n]), cu_seqlens([1, 3]), capacity=4, max_seqlen=n
    )
    want = [long + n - 1, long + n - 2, long + n - 3]
    assert picks.tolist() == [-1, *want] and keep.nonzero().flatten().tolist() == want[::-1]


@all_cases
@pytest.mark.parametrize("name", RECORDED)
def test_recorded(kernel: Case, name: str) -> None:
    """The set of CDPruner's own code, from the relevance that it computed."""
    data = {k: v.to(kernel.device) for k, v in load_file(METHODS / RECORDED[name]["file"]).items()}
    images, n = data["out.relevance"].shape
    count = RECORDED[name]["params"]["T"]
    similarity = cosine_similarity(
        data["in.projected_features"].flatten(0, 1), [n] * images, dtype=torch.float32
    )
    picks, keep = greedy_dpp(
        similarity,
        data["out.relevance"].flatten(),
        cu_seqlens([n] * images),
        cu_seqlens([count] * images),
        capacity=count * images,
    )
    assert torch.equal(keep.view(images, n), data["out.kept_mask"])
    assert sorted(picks.tolist()) == keep.nonzero().flatten().tolist()


@compiled
@pytest.mark.parametrize(
    ("rows", "places", "words"),
    [
        ([0, 4], [0, 1], r"cu_seqlens\[1\]: expected a value in \[0, 3\], found 4"),
        ([0, 3], [0, 1], r"similarity: expected at least 9 entries .* found 8"),
        ([0, 1, 2], [0, 2, 1], r"cu_picks\[2\]: expected at least 2, found 1"),
    ],
)
def test_lengths_that_do_not_fit(rows: list[int], places: list[int], words: str) -> None:
    """The C++ kernel says so before it reads or writes anything."""
    bounds = [torch.tensor(x, dtype=torch.int32) for x in (rows, places)]
    with force_backend("cpu"), pytest.raises(ValueError, match=f"greedy_dpp: {words}"):
        greedy_dpp(torch.zeros(8), torch.zeros(3), *bounds, capacity=2)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"similarity": torch.zeros(2, 2)}, ValueError, "similarity: expected shape"),
        ({"similarity": torch.zeros(4).bfloat16()}, TypeError, "greedy_dpp"),
        ({"relevance": torch.zeros(2).bfloat16()}, TypeError, "relevance: expected dtype float32"),
        ({"relevance": torch.zeros(4)[::2]}, ValueError, "relevance: expected a contiguous"),
        ({"cu_picks": torch.zeros(3, dtype=torch.int32)}, ValueError, "cu_picks: expected shape"),
        ({"capacity": -2}, ValueError, "capacity: expected at least 0, found -2"),
        ({"eps": 1.0}, ValueError, "eps: expected at least 0 and below 1, found 1.0"),
        ({"eps": float("nan")}, ValueError, "eps: expected"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments: dict[str, Any] = {
        "similarity": torch.zeros(4),
        "relevance": torch.zeros(2),
        "cu_seqlens": torch.zeros(2, dtype=torch.int32),
        "cu_picks": torch.zeros(2, dtype=torch.int32),
        "capacity": 1,
    }
    arguments.update(change)
    with pytest.raises(error, match=words):
        greedy_dpp(**arguments)

# SPDX-License-Identifier: Apache-2.0
"""`farthest_points` on every backend against the selection as its paper states it, and against recorded runs of DivPrune."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from glimpse_kernels import _ext, cosine_similarity, farthest_points, force_backend
from glimpse_kernels._triton import Launch
from tests.kernels.arena import sparse_tensor
from tests.kernels.kernel_cases import Case, cu_seqlens, forced_threads, op_cases

METHODS = Path(__file__).parents[1] / "golden" / "methods"
RECORDED = {
    n: c for n, c in json.loads((METHODS / "manifest.json").read_text()).items() if c["method"] == "divprune"
}
all_cases = pytest.mark.parametrize("kernel", op_cases("farthest_points"), indirect=True)
compiled = pytest.mark.skipif(_ext.compiled() is None, reason="compiled extension not available")


def expected(matrix: Tensor, count: int, repeat: bool) -> list[int]:
    """Every step from all picked rows anew. `matrix` is one group's similarity in its dtype."""
    n = matrix.shape[0]
    distance = (1 - matrix).double().cpu().numpy()
    distance = np.where(np.isnan(distance), -1e300, distance)
    picks: list[int] = []
    while n and len(picks) < count and (repeat or len(picks) < n):
        if picks:
            score = distance[picks].min(0)
        else:
            score = np.partition(distance, min(1, n - 1), axis=0)[min(1, n - 1)]
        if not repeat:
            score[picks] = np.nan
        picks.append(int(np.nanargmax(score)))  # the first of the largest
    return picks


def check(
    kernel: Case,
    matrices: Sequence[Tensor],
    counts: Sequence[int],
    *,
    repeat: bool = True,
    capacity: int | None = None,
    **more: Any,
) -> None:
    """Groups with these similarities; NaN behind the last matrix."""
    sizes = [m.shape[0] for m in matrices]
    packed = torch.cat([*(m.flatten() for m in matrices), torch.full((37,), float("nan"))]).to(kernel.dtype)
    places = cu_seqlens(counts)
    capacity = int(places[-1]) if capacity is None else capacity
    picks, keep = farthest_points(
        packed, cu_seqlens(sizes), places, tokens=sum(sizes), capacity=capacity, repeat=repeat, **more
    )
    want = [-1] * capacity
    want_keep = [False] * sum(sizes)
    first, place = 0, 0
    for matrix, count in zip(matrices, counts, strict=True):
        for i, pick in enumerate(
            expected(matrix.to(kernel.dtype), max(0, min(count, capacity - place)), repeat)
        ):
            want[place + i] = first + pick
            want_keep[first + pick] = True
        first, place = first + matrix.shape[0], place + count
    assert picks.dtype == torch.int32 and keep.dtype == torch.bool
    assert picks.tolist() == want
    assert keep.tolist() == want_keep


def cosines(n: int, dim: int = 6) -> Tensor:
    return cosine_similarity(torch.randn(n, dim), [n]).view(n, n)


@all_cases
@pytest.mark.parametrize("repeat", [True, False])
def test_groups(kernel: Case, repeat: bool) -> None:
    """Of many sizes, odd ones among them, with one token, with none, with fewer tokens than picks, with no picks."""
    sizes, counts = [40, 0, 1, 33, 2, 130, 7, 5], [9, 3, 4, 40, 1, 30, 0, 5]
    check(kernel, [cosines(n) for n in sizes], counts, repeat=repeat)
    check(kernel, [cosines(n) for n in sizes], counts, repeat=repeat, max_seqlen=130)


@all_cases
@pytest.mark.parametrize("repeat", [True, False])
@pytest.mark.parametrize("steps", [2, 5, 1000])
def test_ties_go_to_the_lower_index(kernel: Case, steps: int, repeat: bool) -> None:
    """Similarities on a coarse grid; not symmetric, which says that rows are those of the picks and columns the candidates."""
    matrices = [torch.randint(-steps, steps + 1, (n, n)) / steps for n in (50, 23, 64)]
    check(kernel, matrices, [25, 23, 40], repeat=repeat)


@all_cases
def test_duplicates(kernel: Case) -> None:
    """Three distinct directions: the fourth pick of the original is one of the three again, ours without `repeat` is not."""
    rows = torch.eye(3)[[0, 0, 1, 1, 2, 2, 2, 0]]
    matrix = rows @ rows.T
    places = cu_seqlens([6])
    for repeat, want in ((True, [0, 2, 4, 0, 0, 0]), (False, [0, 2, 4, 1, 3, 5])):
        picks, keep = farthest_points(
            matrix.flatten().to(kernel.dtype), cu_seqlens([8]), places, tokens=8, capacity=6, repeat=repeat
        )
        assert picks.tolist() == want
        assert keep.tolist() == [i in want for i in range(8)]


@all_cases
@pytest.mark.parametrize("repeat", [True, False])
def test_nan_is_last(kernel: Case, repeat: bool) -> None:
    nan, inf = float("nan"), float("inf")
    matrix = cosines(20)
    matrix[:, 3], matrix[3, :], matrix[5, 7], matrix[8, 2] = nan, nan, nan, -inf
    check(kernel, [matrix, torch.full((4, 4), nan)], [20, 4], repeat=repeat)


@all_cases
def test_capacity_and_longest_group(kernel: Case) -> None:
    matrices = [cosines(12), cosines(9), cosines(12)]
    for capacity in (0, 1, 5, 11, 40):
        check(kernel, matrices, [5, 5, 5], capacity=capacity)
    packed = torch.cat([m.flatten() for m in matrices]).to(kernel.dtype)
    picks, keep = farthest_points(
        packed, cu_seqlens([12, 9, 12]), cu_seqlens([2, 2, 2]), tokens=33, capacity=6, max_seqlen=9
    )
    found = picks.tolist()
    assert found[:2] == [-1, -1] and found[4:] == [-1, -1] and min(found[2:4]) >= 12
    assert keep.nonzero().flatten().tolist() == sorted(found[2:4])


@all_cases
def test_large(kernel: Case) -> None:
    """More columns than a block has threads; a size that 4 and 8 divide, and one that they do not."""
    sizes = (1032, 2103) if kernel.backend != "triton" else (264, 517)  # interpreted, or by the definition
    for n in (4096, 4099) if kernel.device == "cuda" and not kernel.interpreted else sizes:
        matrix = torch.randint(-400, 400, (n, n)).to(kernel.dtype) / 512
        check(kernel, [matrix], [4])


@pytest.mark.parametrize("kernel", op_cases("farthest_points", "triton"), indirect=True)
@pytest.mark.parametrize("repeat", [True, False])
def test_groups_longer_than_a_block(kernel: Case, repeat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so short that the running minimum of the longer groups is in memory, and that threads share columns."""
    module = importlib.import_module("glimpse_kernels.farthest_points.triton")
    monkeypatch.setattr(module, "LEAST_BLOCK", 16)
    monkeypatch.setattr(module, "MOST_BLOCK", 16)
    sizes, counts = [40, 1, 16, 0, 17, 33], [12, 3, 2, 1, 20, 6]
    with module.CONFIGS.forced(Launch(warps=4, stages=1)):
        check(kernel, [torch.randint(-9, 10, (n, n)) / 9 for n in sizes], counts, repeat=repeat)


@all_cases
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads(kernel: Case, threads: int) -> None:
    """Columns and groups that are shared out: in the C++ kernel the first of them, and with many picks the others."""
    if kernel.backend != "cpu":
        return
    with forced_threads(threads):
        check(kernel, [torch.randint(-90, 91, (n, n)) / 128 for n in (301, 1500, 0, 777)], [3, 2, 1, 4])
        check(kernel, [cosines(300) for _ in range(7)], [150] * 7, repeat=False)


@all_cases
def test_far_group(kernel: Case) -> None:
    """A matrix past 2^31 elements, behind one of a group that is too long to be looked at."""
    long, n = 46_400, 20
    similarity = sparse_tensor((long * long + n * n,), dtype=kernel.dtype)
    block = cosines(n).to(kernel.dtype)
    similarity[long * long :] = block.flatten()
    picks, keep = farthest_points(
        similarity, cu_seqlens([long, n]), cu_seqlens([1, 5]), tokens=long + n, capacity=6, max_seqlen=n
    )
    want = [long + i for i in expected(block, 5, True)]
    assert picks.tolist() == [-1, *want] and keep.nonzero().flatten().tolist() == sorted(set(want))


@all_cases
def test_nothing(kernel: Case) -> None:
    picks, keep = farthest_points(
        torch.zeros(0).to(kernel.dtype), cu_seqlens([]), cu_seqlens([]), tokens=0, capacity=3
    )
    assert picks.tolist() == [-1] * 3 and keep.shape == (0,)


@all_cases
@pytest.mark.parametrize("name", RECORDED)
def test_recorded(kernel: Case, name: str) -> None:
    """Order and set of DivPrune's own code (float32; in other dtypes the recipe is the same, the rounding is not)."""
    if kernel.dtype is not torch.float32:
        return
    data = {k: v.to(kernel.device) for k, v in load_file(METHODS / RECORDED[name]["file"]).items()}
    features, want = data["in.features"], data["out.pick_order"]
    n, count = features.shape[0], want.shape[0]
    assert count == int(round(RECORDED[name]["params"]["ratio"] * n))
    picks, keep = farthest_points(
        cosine_similarity(features, [n]), cu_seqlens([n]), cu_seqlens([count]), tokens=n, capacity=count
    )
    assert picks.tolist() == want.tolist()
    assert keep.nonzero().flatten().tolist() == data["out.kept_indices"].tolist()


@compiled
@pytest.mark.parametrize(
    ("rows", "places", "words"),
    [
        ([1, 3], [0, 1], r"cu_seqlens\[0\]: expected a value in \[0, 0\], found 1"),
        ([0, 2, 1], [0, 1, 1], r"cu_seqlens\[2\]: expected a value in \[2, 3\], found 1"),
        ([0, 4], [0, 1], r"cu_seqlens\[1\]: expected a value in \[0, 3\], found 4"),
        ([0, 3], [0, 1], r"similarity: expected at least 9 entries .* found 8"),
        ([0, 2], [-1, 1], r"cu_picks\[0\]: expected at least 0, found -1"),
        ([0, 1, 2], [0, 2, 1], r"cu_picks\[2\]: expected at least 2, found 1"),
    ],
)
def test_lengths_that_do_not_fit(rows: list[int], places: list[int], words: str) -> None:
    """The C++ kernel says so before it reads or writes anything."""
    bounds = [torch.tensor(x, dtype=torch.int32) for x in (rows, places)]
    with force_backend("cpu"), pytest.raises(ValueError, match=f"farthest_points: {words}"):
        farthest_points(torch.zeros(8), *bounds, tokens=3, capacity=2)


def test_similarity_of_zero_rows_and_groups() -> None:
    """Rounded to the dtype step by step; a zero row is like itself alone."""
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-6.0, -8.0], [0.0, 5.0], [0.0, 0.0], [1.0, 0.0]])
    packed = cosine_similarity(x, [3, 0, 2, 1])
    first = [[1, 0, -1], [0, 1, 0], [-1, 0, 1]]
    torch.testing.assert_close(packed[:9].view(3, 3), torch.tensor(first).float())
    assert packed[9:].tolist() == [1, 0, 0, 1, 1]
    half = torch.randn(9, 40).half()
    unit = half / half.norm(dim=1, keepdim=True)
    assert cosine_similarity(half, [9]).dtype == torch.float16
    found = cosine_similarity(half, [9], dtype=torch.float32)
    torch.testing.assert_close(found.view(9, 9), unit.float() @ unit.float().T)
    with pytest.raises(ValueError, match="lengths: expected numbers of rows that add up to 9, found"):
        cosine_similarity(half, [4, 4])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"similarity": torch.zeros(2, 2)}, ValueError, "similarity: expected shape"),
        ({"similarity": torch.zeros(4, dtype=torch.int32)}, TypeError, "farthest_points"),
        ({"similarity": torch.zeros(8)[::2]}, ValueError, "similarity: expected a contiguous"),
        ({"cu_seqlens": torch.zeros(2)}, TypeError, "cu_seqlens: expected dtype int32"),
        ({"cu_picks": torch.zeros(3, dtype=torch.int32)}, ValueError, "cu_picks: expected shape"),
        ({"tokens": -1}, ValueError, "tokens: expected at least 0, found -1"),
        ({"capacity": -2}, ValueError, "capacity: expected at least 0, found -2"),
        ({"max_seqlen": -2}, ValueError, "max_seqlen: expected at least 0, found -2"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments: dict[str, Any] = {
        "similarity": torch.zeros(4),
        "cu_seqlens": torch.zeros(2, dtype=torch.int32),
        "cu_picks": torch.zeros(2, dtype=torch.int32),
        "tokens": 2,
        "capacity": 1,
    }
    arguments.update(change)
    with pytest.raises(error, match=words):
        farthest_points(**arguments)

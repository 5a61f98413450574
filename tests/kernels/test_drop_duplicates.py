# SPDX-License-Identifier: Apache-2.0
"""`drop_duplicates` on every backend against its rounds in plain Python, and against recorded runs of VisPruner."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from glimpse_kernels import _ext, cosine_similarity, drop_duplicates, force_backend
from tests.kernels.arena import sparse_tensor
from tests.kernels.kernel_cases import Case, cu_seqlens, forced_threads, op_cases

METHODS = Path(__file__).parents[1] / "golden" / "methods"
RECORDED = {
    n: c for n, c in json.loads((METHODS / "manifest.json").read_text()).items() if c["method"] == "vispruner"
}
all_cases = pytest.mark.parametrize("kernel", op_cases("drop_duplicates"), indirect=True)
compiled = pytest.mark.skipif(_ext.compiled() is None, reason="compiled extension not available")
LEAST = float("-inf")
INTERPRETED = {
    torch.float32: [(1, 8), (3, 1), (8, 1000), (100, 1)],
    torch.float16: [(3, 8)],
    torch.bfloat16: [(8, 1)],
}
"""What Triton's interpreter is asked of `test_groups`: tokens of a round, and steps of the grid."""
LONG_RUNS = {"fastervlm_n576_t64", "vispruner_n576_t128_r05_b2"}
"""Recorded runs of some hundred rounds, or of two pictures: not interpreted."""


def expected(matrix: list[list[float]], left: list[int], target: int, per_round: int) -> list[int]:
    """The rounds as the contract states them; `left` holds rows of the group, or strangers."""

    def like(a: int, b: int) -> float:
        x = matrix[a][b] if a in range(len(matrix)) and b in range(len(matrix)) else LEAST
        return LEAST if x != x else x

    left = left[: len(matrix)]
    while True:
        a, b = left[::2], left[1::2]
        drop = min(per_round, len(left) - max(target, 0), len(a))
        if drop <= 0:
            return left
        worth = [max((like(i, j) for j in b), default=LEAST) for i in a]
        by_worth = sorted(range(len(a)), key=lambda i: (-worth[i], i))
        left = [a[i] for i in by_worth[drop:]] + b


def expected_of_many(matrix: Tensor, left: list[int], target: int, per_round: int) -> list[int]:
    """The same with arrays, for lists of rows inside their group."""
    values = np.nan_to_num(matrix.double().cpu().numpy(), nan=LEAST, posinf=np.inf, neginf=LEAST)
    listed = np.array(left)
    while True:
        a, b = listed[::2], listed[1::2]
        drop = min(per_round, len(listed) - max(target, 0), len(a))
        if drop <= 0:
            return [int(i) for i in listed]
        worth = values[np.ix_(a, b)].max(axis=1, initial=LEAST)
        listed = np.concatenate((a[np.argsort(-worth, kind="stable")][drop:], b))


def check(
    kernel: Case,
    matrices: Sequence[Tensor],
    lists: Sequence[Sequence[int]],
    targets: Sequence[int],
    per_round: int = 8,
    **more: Any,
) -> None:
    """`lists` hold rows of their group, counted from its first."""
    sizes = [m.shape[0] for m in matrices]
    packed = torch.cat([*(m.flatten() for m in matrices), torch.full((37,), float("nan"))]).to(kernel.dtype)
    order, want, want_keep, first = [], [], [False] * sum(sizes), 0
    for matrix, listed, target in zip(matrices, lists, targets, strict=True):
        order += [first + i for i in listed]
        left = expected(matrix.to(kernel.dtype).double().tolist(), list(listed), target, per_round)
        want += [first + i for i in left] + [-1] * (len(listed) - len(left))
        for i in left:
            if 0 <= i < matrix.shape[0]:
                want_keep[first + i] = True
        first += matrix.shape[0]
    survivors, keep = drop_duplicates(
        packed,
        cu_seqlens(sizes),
        torch.tensor(order, dtype=torch.int32),
        cu_seqlens([len(x) for x in lists]),
        torch.tensor(targets, dtype=torch.int32),
        tokens=sum(sizes),
        per_round=per_round,
        **more,
    )
    assert survivors.dtype == torch.int32 and keep.dtype == torch.bool
    assert survivors.tolist() == want
    assert keep.tolist() == want_keep


def drawn(n: int, steps: int) -> Tensor:
    """Similarities on a grid, full of ties where it is coarse; not symmetric: rows are A's, columns B's."""
    return torch.randint(-steps, steps + 1, (n, n)) / steps


def shuffled(n: int, length: int) -> list[int]:
    return torch.randperm(n)[:length].tolist()


def interpreted(kernel: Case) -> bool:
    """By Triton, whose interpreter takes milliseconds for a round."""
    return kernel.backend == "triton" and kernel.interpreted


def in_small_tiles(kernel: Case) -> AbstractContextManager[None]:
    """Lists and groups of some dozens are several tiles of a Triton kernel, and interpreted it has less to look at."""
    if kernel.backend != "triton":
        return nullcontext()
    module = importlib.import_module("glimpse_kernels.drop_duplicates.triton")
    found: AbstractContextManager[None] = module.CONFIGS.forced(
        module.Tile(warps=4, stages=1, rows=16, columns=32)
    )
    return found


@all_cases
@pytest.mark.parametrize("steps", [1, 8, 1000])
@pytest.mark.parametrize("per_round", [1, 3, 8, 100])
def test_groups(kernel: Case, steps: int, per_round: int) -> None:
    """Odd and even lists, short ones, none; targets of zero, below zero, above the length, and small enough for the bound by |A|."""
    slow = interpreted(kernel)
    if slow and (per_round, steps) not in INTERPRETED[kernel.dtype or torch.float32]:
        return
    sizes = [50, 0, 1, 30, 30, 9, 64, 17]
    lengths = [37, 0, 1, 30, 29, 9, 64, 1]
    lists = [shuffled(n, m) for n, m in zip(sizes, lengths, strict=True)]
    matrices = [drawn(n, steps) for n in sizes]
    with in_small_tiles(kernel):
        for targets in ([5, 0, 0, 30, 2, 100, 7, 1], [36, 2, 1, 1, 0, -4, 16, 0]):
            if not slow or targets[0] > 5 or per_round > 1:
                check(kernel, matrices, lists, targets, per_round)
            if not slow:
                check(kernel, matrices, lists, targets, per_round, max_seqlen=64)
    if kernel.backend == "triton":
        check(kernel, matrices, lists, [34, 0, 0, 22, 25, 8, 60, 1], per_round, max_seqlen=64)


@all_cases
@pytest.mark.parametrize("length", range(1, 21))
def test_every_length(kernel: Case, length: int) -> None:
    if interpreted(kernel) and kernel.dtype is not torch.float32:
        return
    check(kernel, [drawn(20, 3)], [shuffled(20, length)], [length // 4])
    check(kernel, [drawn(20, 3)], [shuffled(20, length)], [0], 3)


@all_cases
def test_nan_and_strangers(kernel: Case) -> None:
    """NaN is below everything; rows outside the group are like nothing, and nowhere in the mask; what is listed twice may be."""
    nan = float("nan")
    matrix = drawn(24, 2)
    matrix[4], matrix[:, 9], matrix[3, 8], matrix[2, 11] = nan, nan, LEAST, -nan
    listed = [4, 9, 3, 8, 2, 11, 30, 1, -7, 0, 1, 5, 40, 20]
    for target in (0, 3, 9, 13):
        check(
            kernel,
            [drawn(5, 2), matrix, torch.full((6, 6), nan)],
            [[4, 2, 0, 1], listed, [5, 4, 3, 2, 1, 0]],
            [2, target, 3],
            2,
        )


@all_cases
def test_one_row_many_times(kernel: Case) -> None:
    """In A and in B at once, at places that are written side by side."""
    check(kernel, [drawn(12, 2)], [[3] * 7 + [5] * 5], [2], 3)


@all_cases
def test_long_lists_and_long_groups(kernel: Case) -> None:
    """A list longer than its group is cut; a group longer than the caller said has nothing."""
    check(kernel, [drawn(5, 4), drawn(7, 4)], [[0, 1, 2, 3, 4], [6, 5, 4, 3, 2, 1, 0, 6, 5, 4]], [3, 4], 1)
    packed = torch.cat((drawn(5, 4).flatten(), drawn(3, 4).flatten())).to(kernel.dtype)
    order = torch.tensor([0, 1, 2, 7, 6], dtype=torch.int32)
    survivors, keep = drop_duplicates(
        packed,
        cu_seqlens([5, 3]),
        order,
        cu_seqlens([3, 2]),
        torch.tensor([3, 2], dtype=torch.int32),
        tokens=8,
        max_seqlen=4,
    )
    assert survivors.tolist() == [-1, -1, -1, 7, 6] and keep.nonzero().flatten().tolist() == [6, 7]


@all_cases
def test_large(kernel: Case) -> None:
    n = 1500 if kernel.device == "cuda" and not kernel.interpreted else 300
    for size in (n, n + 1):
        check(kernel, [drawn(size, 50)], [shuffled(size, size - 7)], [size - 40])


def clusters(n: int, kinds: int) -> Tensor:
    """Tokens of a few kinds: their likes go first, so a token is asked for others again and again."""
    features = torch.randn(kinds, 24)[torch.arange(n) % kinds] + 0.2 * torch.randn(n, 24)
    return cosine_similarity(features, [n]).view(n, n)


def check_many_rounds(kernel: Case, steps: int) -> None:
    """Long lists down to a few, one of them with a row twice."""
    n = 90 if kernel.interpreted else 900
    matrix = (drawn(n, steps) if steps else clusters(n, n // 12)).to(kernel.dtype)
    matrix[7], matrix[:, 11], matrix[5, :9] = float("nan"), float("inf"), LEAST
    for listed, target, per_round in (
        (shuffled(n, n), n // 40, 8),
        (shuffled(n, n - 2) + [3, 7], n // 8, 30),
    ):
        packed, bounds = matrix.flatten(), cu_seqlens([n])
        survivors, keep = drop_duplicates(
            packed,
            bounds,
            torch.tensor(listed, dtype=torch.int32),
            bounds,
            torch.tensor([target], dtype=torch.int32),
            tokens=n,
            per_round=per_round,
        )
        want = expected_of_many(matrix, listed, target, per_round)
        assert survivors.tolist() == want + [-1] * (n - len(want))
        assert keep.nonzero().flatten().tolist() == sorted(set(want))


@all_cases
@pytest.mark.parametrize("steps", [0, 2, 300], ids=lambda n: f"grid of {n}" if n else "clusters")
def test_many_rounds(kernel: Case, steps: int) -> None:
    """What was known about a token in one round has to do for the next, and does no longer at some time."""
    check_many_rounds(kernel, steps)


@all_cases
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads(kernel: Case, threads: int) -> None:
    """Groups that are shared out, and the rows of a long one."""
    if kernel.backend != "cpu":
        return
    with forced_threads(threads):
        sizes, targets = [150, 180, 0, 90, 210, 40], [100, 150, 0, 40, 160, 7]
        check(kernel, [drawn(n, 40) for n in sizes], [shuffled(n, n) for n in sizes], targets)
        check_many_rounds(kernel, 0)


@all_cases
def test_far_group(kernel: Case) -> None:
    """A matrix past 2^31 elements, behind one of a group that is too long to be looked at."""
    long, n = 46_400, 20
    similarity = sparse_tensor((long * long + n * n,), dtype=kernel.dtype)
    block = drawn(n, 8).to(kernel.dtype)
    similarity[long * long :] = block.flatten()
    order = torch.arange(long, long + n, dtype=torch.int32)
    survivors, keep = drop_duplicates(
        similarity,
        cu_seqlens([long, n]),
        order,
        cu_seqlens([0, n]),
        torch.tensor([0, 5], dtype=torch.int32),
        tokens=long + n,
        max_seqlen=n,
    )
    want = [long + i for i in expected(block.double().tolist(), list(range(n)), 5, 8)]
    assert survivors.tolist() == want + [-1] * 15
    assert keep.nonzero().flatten().tolist() == sorted(want)


@all_cases
def test_nothing(kernel: Case) -> None:
    none = torch.zeros(0, dtype=torch.int32)
    survivors, keep = drop_duplicates(
        torch.zeros(0).to(kernel.dtype), cu_seqlens([]), none, cu_seqlens([]), none, tokens=0
    )
    assert survivors.shape == keep.shape == (0,)


@all_cases
@pytest.mark.parametrize("name", RECORDED)
def test_recorded(kernel: Case, name: str) -> None:
    """Mask and final list of VisPruner's own code (FasterVLM is the one that lets no list survive). float32 alone, as recorded."""
    if kernel.dtype is not torch.float32 or (interpreted(kernel) and name in LONG_RUNS):
        return
    data = {k: v.to(kernel.device) for k, v in load_file(METHODS / RECORDED[name]["file"]).items()}
    params = RECORDED[name]["params"]
    images, n, total = params["B"], params["N"], params["T"]
    best = int(total * params["r"])
    order = data["in.cls_attn"].mean(1).argsort(dim=1, descending=True)
    start = n * torch.arange(images)[:, None]
    survivors, keep = drop_duplicates(
        cosine_similarity(data["in.features"].flatten(0, 1), [n] * images),
        cu_seqlens([n] * images),
        (order[:, best:] + start).int().flatten(),
        cu_seqlens([n - best] * images),
        torch.full((images,), total - best, dtype=torch.int32),
        tokens=images * n,
    )
    kept = keep.view(images, n).scatter(1, data["out.important_indices"], True)
    assert torch.equal(kept, data["out.kept_mask"])
    lists = survivors.view(images, n - best)
    assert (lists[:, total - best :] == -1).all()
    if "out.residual_list_final" in data:
        assert torch.equal(lists[:, : total - best] - start, data["out.residual_list_final"])


@compiled
@pytest.mark.parametrize(
    ("rows", "places", "words"),
    [
        ([0, 4], [0, 1], r"cu_seqlens\[1\]: expected a value in \[0, 3\], found 4"),
        ([0, 3], [0, 1], r"similarity: expected at least 9 entries .* found 8"),
        ([0, 1, 2], [0, 2, 1], r"cu_order\[2\]: expected at least 2, found 1"),
    ],
)
def test_lengths_that_do_not_fit(rows: list[int], places: list[int], words: str) -> None:
    """The C++ kernel says so before it reads or writes anything."""
    bounds, listed = (torch.tensor(x, dtype=torch.int32) for x in (rows, places))
    order, targets = torch.zeros(2, dtype=torch.int32), torch.zeros(len(rows) - 1, dtype=torch.int32)
    with force_backend("cpu"), pytest.raises(ValueError, match=f"drop_duplicates: {words}"):
        drop_duplicates(torch.zeros(8), bounds, order, listed, targets, tokens=3)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"similarity": torch.zeros(2, 2)}, ValueError, "similarity: expected shape"),
        ({"similarity": torch.zeros(4, dtype=torch.int32)}, TypeError, "drop_duplicates"),
        ({"order": torch.zeros(2, dtype=torch.int64)}, TypeError, "order: expected dtype int32"),
        ({"order": torch.zeros(4, dtype=torch.int32)[::2]}, ValueError, "order: expected a contiguous"),
        ({"cu_order": torch.zeros(3, dtype=torch.int32)}, ValueError, "cu_order: expected shape"),
        ({"targets": torch.zeros(2, dtype=torch.int32)}, ValueError, "targets: expected shape"),
        ({"tokens": -1}, ValueError, "tokens: expected at least 0, found -1"),
        ({"per_round": 0}, ValueError, "per_round: expected at least 1, found 0"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments: dict[str, Any] = {
        "similarity": torch.zeros(4),
        "cu_seqlens": torch.zeros(2, dtype=torch.int32),
        "order": torch.zeros(2, dtype=torch.int32),
        "cu_order": torch.zeros(2, dtype=torch.int32),
        "targets": torch.zeros(1, dtype=torch.int32),
        "tokens": 2,
    }
    arguments.update(change)
    with pytest.raises(error, match=words):
        drop_duplicates(**arguments)

# SPDX-License-Identifier: Apache-2.0
"""`window_topk` on every backend against the scan as VScan has it, one token after another, and against recorded runs of VScan."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from glimpse_kernels import force_backend, window_topk
from tests.kernels.kernel_cases import Case, cu_seqlens, op_cases
from tests.stand_in import stand_in_gpu

METHODS = Path(__file__).parents[1] / "golden" / "methods"
RECORDED = {
    n: c
    for n, c in json.loads((METHODS / "manifest.json").read_text()).items()
    if c["method"] in ("vscan_stage1", "vscan_qwen")
}
all_cases = pytest.mark.parametrize("kernel", op_cases("window_topk"), indirect=True)
NAN, INF = float("nan"), float("inf")


def window_of(place: int, height: int, width: int, window: int) -> tuple[int, int]:
    """What is left over joins the last one."""
    last = max(1, height // window) - 1, max(1, width // window) - 1
    return min(place // width // window, last[0]), min(place % width // window, last[1])


def expected(
    scores: Sequence[float], height: int, width: int, budget: int, window: int, share: str
) -> list[int]:
    """The scan: by falling score, while the window of the token has room."""
    windows = max(1, height // window) * max(1, width // window)
    cap = math.ceil(budget / windows) if share == "up" else budget // windows
    # Python compares -0.0 and 0.0 as equal, and its sort is stable.
    order = sorted(
        range(min(len(scores), height * width)),
        key=lambda i: -INF if scores[i] != scores[i] else scores[i],
        reverse=True,
    )
    taken: dict[tuple[int, int], int] = {}
    picks: list[int] = []
    for i in order:
        at = window_of(i, height, width, window)
        if len(picks) < budget and taken.get(at, 0) < cap:
            taken[at] = taken.get(at, 0) + 1
            picks.append(i)
    return picks


def check(
    kernel: Case,
    scores: Sequence[Tensor],
    grids: Sequence[tuple[int, int]],
    budgets: Sequence[int],
    *,
    window: int,
    share: str = "up",
    capacity: int | None = None,
    behind: int = 0,
    **more: Any,
) -> None:
    """Groups with these scores; `behind`: rows after the last group."""
    sizes = [len(s) for s in scores]
    places = cu_seqlens(budgets)
    capacity = int(places[-1]) if capacity is None else capacity
    packed = torch.cat([*(s.to(kernel.device) for s in scores), torch.full((behind,), INF)])
    picks, keep = window_topk(
        packed,
        cu_seqlens(sizes),
        torch.tensor(grids, dtype=torch.int32).view(len(grids), 2),
        places,
        window=window,
        capacity=capacity,
        share=share,
        **more,
    )
    want, want_keep, first, place = [-1] * capacity, [False] * (sum(sizes) + behind), 0, 0
    for values, (height, width), budget in zip(scores, grids, budgets, strict=True):
        for i, pick in enumerate(expected(values.tolist(), height, width, budget, window, share)):
            if place + i < capacity:
                want[place + i] = first + pick
                want_keep[first + pick] = True
        first, place = first + len(values), place + budget
    assert picks.dtype == torch.int32 and keep.dtype == torch.bool
    assert picks.tolist() == want
    assert keep.tolist() == want_keep


def coarse(n: int, steps: int = 6) -> Tensor:
    """Few values, so that many tie; zeros of both signs."""
    values = torch.randint(-steps, steps + 1, (n,)) / steps
    return torch.where(torch.rand(n) < 0.5, values, -values)


@all_cases
@pytest.mark.parametrize("share", ["up", "down"])
@pytest.mark.parametrize("window", [1, 2, 4, 6, 50])
def test_groups(kernel: Case, window: int, share: str) -> None:
    """Grids that the window divides and that it does not, smaller than it one way or both, of one token, of none, with no
    budget, with more than they have."""
    grids = [(12, 12), (11, 9), (0, 0), (1, 1), (3, 13), (13, 3), (2, 2), (1, 30), (7, 24), (8, 8)]
    budgets = [36, 24, 3, 2, 19, 10, 3, 15, 0, 80]
    for steps in (1, 6, 100_000):
        scores = [coarse(h * w, steps) for h, w in grids]
        check(kernel, scores, grids, budgets, window=window, share=share)
        check(kernel, scores, grids, budgets, window=window, share=share, max_seqlen=168, behind=5)


@all_cases
@pytest.mark.parametrize("share", ["up", "down"])
def test_every_small_grid(kernel: Case, share: str) -> None:
    """VScan's window on all grids from one token to 9 x 9, a third and all of the tokens."""
    grids = [(h, w) for h in range(1, 10) for w in range(1, 10)]
    scores = [coarse(h * w, 4) for h, w in grids]
    for part in (3, 1):
        budgets = [h * w // part for h, w in grids]
        # Without the longest length a launch has programs for groups of any.
        check(kernel, scores, grids, budgets, window=4, share=share, max_seqlen=81)


@all_cases
def test_the_cap_comes_before_the_score(kernel: Case) -> None:
    """All of the best tokens are in one window; the budget is shared nonetheless."""
    scores = torch.zeros(8, 8)
    scores[:4, :4] = torch.arange(16).view(4, 4) + 1.0
    scores[6, 1], scores[5, 5], scores[0, 7] = 0.5, 0.25, 0.125
    for share, budget, want in (
        ("up", 8, [27, 26, 49, 45, 7, 4, 32, 36]),
        ("up", 5, [27, 26, 49, 45, 7]),
        ("down", 7, [27, 49, 45, 7, -1, -1, -1]),
        ("down", 3, [-1, -1, -1]),
    ):
        picks, _ = window_topk(
            scores.flatten(),
            cu_seqlens([64]),
            torch.tensor([[8, 8]], dtype=torch.int32),
            cu_seqlens([budget]),
            window=4,
            capacity=budget,
            share=share,
        )
        assert picks.tolist() == want


@all_cases
def test_nan_and_infinity(kernel: Case) -> None:
    """NaN is below everything, as -inf is, and picked where nothing else is left."""
    scores = coarse(40, 3)
    scores[3], scores[9], scores[10], scores[11], scores[38] = NAN, -INF, -NAN, INF, INF
    for budget in (0, 6, 38, 40):
        check(kernel, [scores, torch.full((9,), NAN)], [(5, 8), (3, 3)], [budget, 5], window=2)


@all_cases
def test_grids_that_do_not_fit(kernel: Case) -> None:
    """Tokens behind the grid are never picked; a grid that is larger than its group ends with it; none of no extent."""
    scores = [coarse(n, 9) for n in (20, 20, 6, 6, 20)]
    check(kernel, scores, [(3, 4), (9, 7), (0, 5), (4, 0), (4, 5)], [8, 9, 4, 4, 6], window=2)
    most = 2**31 - 1
    for window in (2, most):
        check(kernel, scores[:3], [(2, most), (most, 3), (most, most)], [5, 7, 3], window=window)
    picks, keep = window_topk(
        torch.rand(12),
        cu_seqlens([6, 6]),
        torch.tensor([[-2, -3], [3, 2]], dtype=torch.int32),
        cu_seqlens([2, 6]),
        window=2,
        capacity=8,
    )
    assert picks[:2].tolist() == [-1, -1] and sorted(picks[2:].tolist()) == [6, 7, 8, 9, 10, 11]
    assert keep.tolist() == [False] * 6 + [True] * 6


@all_cases
def test_capacity_and_longest_group(kernel: Case) -> None:
    scores, grids = [coarse(n, 50) for n in (12, 20, 12)], [(3, 4), (4, 5), (4, 3)]
    for capacity in (0, 1, 5, 11, 40):
        check(kernel, scores, grids, [5, 5, 5], window=2, capacity=capacity)
    picks, keep = window_topk(
        torch.cat(scores),
        cu_seqlens([12, 20, 12]),
        torch.tensor(grids, dtype=torch.int32),
        cu_seqlens([2, 2, 2]),
        window=2,
        capacity=6,
        max_seqlen=12,
    )
    found = picks.tolist()
    assert found[2:4] == [-1, -1] and max(found[:2]) < 12 and min(found[4:]) >= 32
    assert keep.nonzero().flatten().tolist() == sorted(found[:2] + found[4:])


@all_cases
def test_never_across_images(kernel: Case) -> None:
    """Each group of a batch as if it were alone."""
    grids, budgets = [(6, 7), (1, 1), (9, 4), (2, 11)], [14, 1, 12, 9]
    scores = [coarse(h * w, 5) for h, w in grids]
    shape = {"window": 4, "capacity": sum(budgets)}
    together, _ = window_topk(
        torch.cat(scores),
        cu_seqlens([len(s) for s in scores]),
        torch.tensor(grids, dtype=torch.int32),
        cu_seqlens(budgets),
        **shape,
    )
    alone, first = [], 0
    for values, grid, budget in zip(scores, grids, budgets, strict=True):
        picks, _ = window_topk(
            values,
            cu_seqlens([len(values)]),
            torch.tensor([grid], dtype=torch.int32),
            cu_seqlens([budget]),
            **shape,
        )
        alone += [p + first for p in picks[:budget].tolist()]
        first += len(values)
    assert together.tolist() == alone


@all_cases
def test_large(kernel: Case) -> None:
    """More tokens than a block has threads: a 16k grid on a GPU, a smaller one where kernels are interpreted."""
    side = 33 if kernel.interpreted else 128
    scores = torch.randperm(side * side).float() / 3
    check(kernel, [scores], [(side, side)], [side * side // 12], window=4)
    check(kernel, [coarse(side * side, 20)], [(side, side)], [side * side // 12], window=4)


@pytest.mark.parametrize(
    "kernel", [p for p in op_cases("window_topk") if "cpu" in str(p.id)][:1], indirect=True
)  # type: ignore[attr-defined]
@pytest.mark.parametrize(
    ("rows", "places", "words"),
    [([0, 5], [0, 2], "cu_seqlens"), ([0, 3, 2], [0, 1, 2], "cu_seqlens"), ([-1, 4], [0, 2], "cu_seqlens"),
     ([0, 4], [2, 1], "cu_picks"), ([0, 4], [-1, 1], "cu_picks")],
)  # fmt: skip
def test_bounds_outside_the_rows(kernel: Case, rows: list[int], places: list[int], words: str) -> None:
    cu, cu_picks = (torch.tensor(x, dtype=torch.int32) for x in (rows, places))
    with pytest.raises(ValueError, match=words):
        window_topk(
            torch.zeros(4),
            cu,
            torch.full((len(cu) - 1, 2), 2, dtype=torch.int32),
            cu_picks,
            window=2,
            capacity=2,
        )


def test_the_definition_reads_nothing_on_the_host() -> None:
    """It is what serves on a GPU as long as there is no kernel."""
    with stand_in_gpu() as seen, torch.device("cuda"), force_backend("naive"):
        arguments = [torch.tensor(x, dtype=torch.int32) for x in ([0, 12, 30], [[3, 4], [3, 6]], [0, 4, 10])]
        window_topk(torch.rand(30), *arguments, window=2, capacity=10, max_seqlen=18)
    assert not seen.reads


@all_cases
def test_nothing(kernel: Case) -> None:
    picks, keep = window_topk(
        torch.zeros(0),
        cu_seqlens([]),
        torch.zeros(0, 2, dtype=torch.int32),
        cu_seqlens([]),
        window=4,
        capacity=3,
    )
    assert picks.tolist() == [-1] * 3 and keep.shape == (0,)


@all_cases
@pytest.mark.parametrize("name", RECORDED)
def test_recorded(kernel: Case, name: str) -> None:
    """The local picks of VScan's own code and, with the best of what they leave by the global score, the tokens that it keeps."""
    data = {k: v.to(kernel.device) for k, v in load_file(METHODS / RECORDED[name]["file"]).items()}
    params = RECORDED[name]["params"]
    if RECORDED[name]["method"] == "vscan_qwen":
        local, everywhere = data["out.score_local"][None], data["out.score_global"][None]
        height, width = params["grid_h_patches"] // 2, params["grid_w_patches"] // 2
        total, window, share = int(params["ratio"] * height * width), 4, "up"
    else:
        local, everywhere = data["in.cls_attn_shallow"].mean(1), data["in.cls_attn_deep"].mean(1)
        height = width = math.isqrt(params["N"])
        total, window, share = params["T"], params["window"], "down"
    images, n = local.shape
    budget = total // 2
    picks, keep = window_topk(
        local.flatten(),
        cu_seqlens([n] * images),
        torch.tensor([[height, width]] * images, dtype=torch.int32),
        cu_seqlens([budget] * images),
        window=window,
        capacity=budget * images,
        share=share,
    )
    keep = keep.view(images, n)
    if "out.local_mask" in data:
        assert torch.equal(keep, data["out.local_mask"])
        each = budget // ((height // window) * (width // window))
        assert (keep.sum(1) == each * (height // window) * (width // window)).all()
    else:  # two scores next to each other may differ by less than the original's rounding
        assert sorted(picks.tolist()) == sorted(data["out.local_indices"].tolist())
    best = everywhere.masked_fill(keep, 0.0).topk(total - budget, dim=1).indices
    assert torch.equal(keep.scatter(1, best, True), data["out.kept_mask"].view(images, n))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"scores": torch.zeros(2, 2)}, ValueError, "scores: expected shape"),
        ({"scores": torch.zeros(4).bfloat16()}, TypeError, "scores: expected dtype float32"),
        ({"scores": torch.zeros(8)[::2]}, ValueError, "scores: expected a contiguous"),
        ({"cu_seqlens": torch.zeros(2)}, TypeError, "cu_seqlens: expected dtype int32"),
        ({"grids": torch.zeros(2, dtype=torch.int32)}, ValueError, "grids: expected shape"),
        ({"grids": torch.zeros(2, 2, dtype=torch.int32)}, ValueError, "grids: expected shape"),
        ({"grids": torch.zeros(1, 2)}, TypeError, "grids: expected dtype int32"),
        ({"cu_picks": torch.zeros(3, dtype=torch.int32)}, ValueError, "cu_picks: expected shape"),
        ({"cu_picks": [0, 2]}, TypeError, "cu_picks: expected a torch.Tensor"),
        ({"window": 0}, ValueError, "window: expected at least 1, found 0"),
        ({"capacity": -2}, ValueError, "capacity: expected at least 0, found -2"),
        ({"max_seqlen": -2}, ValueError, "max_seqlen: expected at least 0, found -2"),
        ({"share": "even"}, ValueError, "share: expected one of up, down; found 'even'"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments: dict[str, Any] = {
        "scores": torch.zeros(4),
        "cu_seqlens": torch.zeros(2, dtype=torch.int32),
        "grids": torch.zeros(1, 2, dtype=torch.int32),
        "cu_picks": torch.zeros(2, dtype=torch.int32),
        "window": 4,
        "capacity": 1,
    }
    arguments.update(change)
    with pytest.raises(error, match=words):
        window_topk(**arguments)

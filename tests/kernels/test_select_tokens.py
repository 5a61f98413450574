# SPDX-License-Identifier: Apache-2.0
"""select_tokens: threshold, cap, floor and anchors against plain Python sorting and against recorded runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glimpse_kernels import Selection, select_tokens
from tests.kernels.kernel_cases import Case, op_cases

all_cases = pytest.mark.parametrize("kernel", op_cases("select_tokens"), indirect=True)


GOLDEN = Path(__file__).parents[1] / "golden" / "glimpse"
CASES: dict[str, Any] = json.loads((GOLDEN / "manifest.json").read_text())["cases"]


def expected(
    logits: list[float],
    cu_groups: list[int],
    threshold: float,
    caps: list[int],
    floors: list[int],
    forced: list[bool] | None,
    token_rows: list[int],
    row_keep: list[bool],
    cu_seqlens: list[int],
    capacity: int,
) -> tuple[list[bool], list[int], list[int], list[int]]:
    """The contract in plain Python."""
    score = [-math.inf if math.isnan(x) else x for x in logits]
    kept: set[int] = set()
    for g in range(len(cu_groups) - 1):
        tokens = range(cu_groups[g], cu_groups[g + 1])
        best = sorted(tokens, key=lambda i: (-score[i], i))
        above = [i for i in tokens if score[i] > threshold]
        kept.update(above if len(above) <= caps[g] else best[: caps[g]])
        kept.update(best[: floors[g]])
    if forced is not None:
        kept.update(i for i, f in enumerate(forced) if f)
    counts = [sum(i in kept for i in range(a, b)) for a, b in zip(cu_groups, cu_groups[1:], strict=False)]
    stays = list(row_keep)
    for i in kept:
        stays[token_rows[i]] = True
    index = [r for r, s in enumerate(stays) if s]
    cu = [sum(stays[:c]) for c in cu_seqlens]
    index = (index + [-1] * capacity)[:capacity]
    return [i in kept for i in range(len(logits))], counts, index, cu


def run(
    logits: list[float],
    cu_groups: list[int],
    threshold: float,
    caps: list[int],
    floors: list[int],
    forced: list[bool] | None,
    token_rows: list[int],
    row_keep: list[bool],
    cu_seqlens: list[int],
    capacity: int,
) -> Selection:
    def ints(x: list[int]) -> torch.Tensor:
        return torch.tensor(x, dtype=torch.int32)

    return select_tokens(
        torch.tensor(logits, dtype=torch.float32),
        ints(cu_groups),
        threshold=threshold,
        caps=ints(caps),
        floors=ints(floors),
        forced=None if forced is None else torch.tensor(forced, dtype=torch.bool),
        token_rows=ints(token_rows),
        row_keep=torch.tensor(row_keep, dtype=torch.bool),
        cu_seqlens=ints(cu_seqlens),
        capacity=capacity,
    )


def check(**case: Any) -> None:
    got = run(**case)
    keep, counts, index, cu = expected(**case)
    assert got.keep.dtype == torch.bool and got.keep.tolist() == keep
    assert got.counts.dtype == torch.int32 and got.counts.tolist() == counts
    assert got.index.dtype == torch.int32 and got.index.tolist() == index
    assert got.cu_seqlens.dtype == torch.int32 and got.cu_seqlens.tolist() == cu


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, Any]:
    """Packed sequences of text and visual tokens; groups of any size, also empty; scores full of ties and oddities."""
    few = st.sampled_from([-1.5, -0.0, 0.0, 0.5, 1.0, 1.0000001, math.inf, -math.inf, math.nan])
    many = st.floats(-8, 8, width=32)
    scores = draw(st.sampled_from([few, many]))
    sizes = draw(st.lists(st.integers(0, 12), min_size=0, max_size=5))
    cu_groups, token_rows, row_keep, cu_seqlens = [0], [], [], [0]
    for size in sizes:
        row_keep += [True] * draw(st.integers(0, 3))
        for _ in range(size):
            token_rows.append(len(row_keep))
            row_keep.append(draw(st.integers(0, 9)) == 0)  # now and then a visual row that stays anyway
        row_keep += [draw(st.booleans()) for _ in range(draw(st.integers(0, 2)))]
        cu_groups.append(len(token_rows))
        if draw(st.booleans()):
            cu_seqlens.append(len(row_keep))
    if cu_seqlens[-1] != len(row_keep):
        cu_seqlens.append(len(row_keep))
    n = len(token_rows)
    bounds = st.lists(st.integers(0, 14), min_size=len(sizes), max_size=len(sizes))
    return {
        "logits": draw(st.lists(scores, min_size=n, max_size=n)),
        "cu_groups": cu_groups,
        "threshold": draw(st.sampled_from([-math.inf, -1.0, 0.0, -0.0, 0.5, 1.0, math.inf])),
        "caps": draw(bounds),
        "floors": draw(bounds),
        "forced": draw(st.none() | st.lists(st.booleans(), min_size=n, max_size=n)),
        "token_rows": token_rows,
        "row_keep": row_keep,
        "cu_seqlens": cu_seqlens,
        "capacity": draw(st.integers(0, len(row_keep) + 3)),
    }


@all_cases
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=layouts())
def test_against_sorting(kernel: Case, case: dict[str, Any]) -> None:
    check(**case)


def simple(logits: list[float], **change: Any) -> dict[str, Any]:
    n = len(logits)
    case: dict[str, Any] = {
        "logits": logits,
        "cu_groups": [0, n],
        "threshold": 0.0,
        "caps": [n],
        "floors": [0],
        "forced": None,
        "token_rows": list(range(1, n + 1)),
        "row_keep": [True] + [False] * n + [True],
        "cu_seqlens": [0, n + 2],
        "capacity": n + 2,
    }
    return case | change


@all_cases
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 255, 1000, 4097])
@pytest.mark.parametrize("cap", [0, 1, 7, 10**6])
def test_sizes(kernel: Case, n: int, cap: int) -> None:
    generator = torch.Generator().manual_seed(n)
    # quarter steps: many ties, also across the cut
    logits = (torch.randn(n, generator=generator) * 8).round().div(4).tolist()
    check(**simple(logits, caps=[cap], floors=[3]))


@all_cases
def test_ties_go_to_the_lower_index(kernel: Case) -> None:
    got = run(**simple([1.0, 2.0, 1.0, 2.0, 1.0], caps=[3]))
    assert got.keep.tolist() == [True, True, False, True, False]
    got = run(**simple([0.0, -0.0, 0.0, -0.0], threshold=-1.0, caps=[2]))
    assert got.keep.tolist() == [True, True, False, False]


@all_cases
def test_nan_is_last_and_never_above_the_threshold(kernel: Case) -> None:
    nan, inf = math.nan, math.inf
    assert run(**simple([nan, 1.0, -inf], threshold=-inf)).keep.tolist() == [False, True, False]
    # NaN and -inf are equals, so the floor takes the lower index
    assert run(**simple([nan, -5.0, -inf, nan], threshold=9.0, floors=[2])).keep.tolist() == [
        True,
        True,
        False,
        False,
    ]
    # a NaN with its sign bit set is no different
    logits = torch.tensor([1.0, 0.5, 2.0])
    logits.view(torch.int32)[0] = -1
    got = run(**simple(logits.tolist(), threshold=-3.0, caps=[1]))
    assert got.keep.tolist() == [False, False, True]


@all_cases
def test_cap_replaces_and_floor_and_forced_add(kernel: Case) -> None:
    logits = [3.0, 2.0, 1.0, -1.0]
    assert run(**simple(logits, caps=[2])).keep.tolist() == [True, True, False, False]
    assert run(**simple(logits, caps=[0])).keep.tolist() == [False] * 4
    assert run(**simple(logits, caps=[1], floors=[3])).keep.tolist() == [True, True, True, False]
    forced = [False, False, False, True]
    assert run(**simple(logits, caps=[1], forced=forced)).keep.tolist() == [True, False, False, True]


@all_cases
def test_capacity_is_never_exceeded(kernel: Case) -> None:
    case = simple([1.0] * 9, capacity=4)
    got = run(**case)
    assert got.index.tolist() == [0, 1, 2, 3]
    assert got.cu_seqlens.tolist() == [0, 11]  # the truth, so that the caller can see that it did not fit


def test_bad_arguments() -> None:
    case = simple([1.0, 2.0])
    with pytest.raises(ValueError, match="threshold"):
        run(**case | {"threshold": math.nan})
    with pytest.raises(ValueError, match="caps"):
        run(**case | {"caps": [1, 2]})
    with pytest.raises(ValueError, match="capacity"):
        run(**case | {"capacity": -1})
    with pytest.raises(ValueError, match="token_rows"):
        run(**case | {"token_rows": [0]})


def logit(p: float) -> float:
    return math.inf if p >= 1 else -math.inf if p <= 0 else math.log(p / (1 - p))


def anchors(grids: list[tuple[int, int]], names: list[str]) -> list[bool]:
    """Corner tokens of every picture, raster order."""
    forced: list[bool] = []
    for h, w in grids:
        corner = {"tl": 0, "tr": w - 1, "bl": (h - 1) * w, "br": h * w - 1}
        chosen = {corner[name] for name in names}
        forced += [i in chosen for i in range(h * w)]
    return forced


@all_cases
@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c["do_selection"]])
def test_recorded_masks(kernel: Case, name: str) -> None:
    """Mask and remaining rows of the original, from its own scores."""
    case = CASES[name]
    recorded = np.load(GOLDEN / case["file"])
    inputs = np.load(GOLDEN / f"inputs_{case['input']}.npz")
    setting = case["settings"]
    sizes = case["image_tokens_per_group"]
    if case["use_ref_masks"]:
        logits = np.where(recorded["ref_masks"], 1.0, -1.0).astype(np.float32)
    else:
        logits = recorded["vip_logits"]
    grids = [(h // 2, w // 2) for _, h, w in inputs["image_grid_thw"].tolist()]
    ratio = setting["max_remain_ratio"]
    present = inputs["attention_mask"].astype(bool)
    is_image = (inputs["input_ids"] == 606)[present]
    lengths = present.sum(1)
    got = select_tokens(
        torch.from_numpy(logits),
        torch.tensor(np.cumsum([0, *sizes]), dtype=torch.int32),
        threshold=logit(setting["reduce_threshold"]),
        caps=torch.tensor([n if ratio is None else math.floor(ratio * n) for n in sizes], dtype=torch.int32),
        floors=torch.tensor([setting["min_remain_num"] for _ in sizes], dtype=torch.int32),
        forced=torch.tensor(anchors(grids, setting["anchor_positions"]))
        if setting["anchor_positions"]
        else None,
        token_rows=torch.tensor(np.flatnonzero(is_image), dtype=torch.int32),
        row_keep=torch.tensor(~is_image),
        cu_seqlens=torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32),
        capacity=int(lengths.sum()),
    )
    assert got.counts.tolist() == case["kept_image_tokens_per_group"]
    if case["margins"].get("mask_depends_on_tie_order"):
        return  # which of the equals stay is left open there
    differing = int((got.keep.numpy() != recorded["keep_image_tokens"]).sum())
    # bfloat16: the original rounds the sigmoid before it compares, which may move a token at the threshold
    assert differing <= (2 if case["dtype"] == "bfloat16" else 0)
    if differing == 0:
        rows = np.flatnonzero(recorded["keep_mask"][present])
        assert got.index[: rows.size].tolist() == rows.tolist()
        assert (got.index[rows.size :] == -1).all()
        kept = recorded["keep_mask"].sum(1)
        assert got.cu_seqlens.tolist() == np.cumsum([0, *kept]).tolist()

# SPDX-License-Identifier: Apache-2.0
"""`merge_nearest` on every backend against loops over tokens in fp64, and against recorded runs of VisionZip and VScan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from glimpse_kernels import _triton, force_backend, merge_nearest
from glimpse_kernels.merge_nearest import MERGES
from glimpse_kernels.merge_nearest import naive as definition
from tests.kernels.arena import spread
from tests.kernels.kernel_cases import (
    Case,
    compiled_cases,
    cu_seqlens,
    growths,
    measures_memory,
    needs_compiled,
    on_threads,
    op_cases,
)
from tests.stand_in import stand_in_gpu

METHODS = Path(__file__).parents[1] / "golden" / "methods"
all_cases = pytest.mark.parametrize("kernel", op_cases("merge_nearest"), indirect=True)
compiled = pytest.mark.parametrize("kernel", compiled_cases("merge_nearest"), indirect=True)
SIZES = [40, 0, 1, 33, 2, 90, 7, 1]


def cosine(a: Tensor, b: Tensor) -> float:
    """Of two fp64 rows; lengths of at least 1e-8."""
    return float(a @ b) / (max(float(a.norm()), 1e-8) * max(float(b.norm()), 1e-8))


def expected(
    values: Tensor,
    targets: Sequence[bool],
    sources: Sequence[bool],
    metric: Tensor,
    bounds: Sequence[int],
    how: str,
) -> tuple[Tensor, list[int]]:
    """Token by token: merged [N, C] fp64 and the joined rows."""
    like, merged = metric.double().cpu(), values.double().cpu().clone()
    nearest = [-1] * len(targets)
    for first, end in zip(bounds[:-1], bounds[1:], strict=True):
        kept = [j for j in range(first, end) if targets[j]]
        for i in range(first, end):
            if kept and sources[i] and not targets[i]:
                nearest[i] = max(kept, key=lambda j: (cosine(like[i], like[j]), -j))
    for j in set(nearest) - {-1}:
        joined = values.double().cpu()[[i for i, n in enumerate(nearest) if n == j]]
        own, count = merged[j].clone(), len(joined)
        if how == "mean":
            merged[j] = (own + joined.sum(0)) / (1 + count)
        else:
            merged[j] = own + joined.sum(0) / count
    return merged, nearest


def close(found: Tensor, want: Tensor, nearest: Sequence[int]) -> None:
    """One rounding to the dtype, and that of fp32 sums; rows that nothing joined are exact."""
    eps = torch.finfo(found.dtype).eps
    found, want = found.double().cpu(), want.double().cpu()
    torch.testing.assert_close(found, want, rtol=0.51 * eps + 1e-6, atol=1e-6)
    rest = [j for j in range(len(want)) if j not in set(nearest)]
    assert torch.equal(found[rest], want[rest])


def check(
    values: Tensor,
    targets: Tensor,
    sizes: Sequence[int],
    *,
    sources: Tensor | None = None,
    metric: Tensor | None = None,
    how: str = "mean",
) -> tuple[Tensor, Tensor]:
    cu = cu_seqlens(sizes)
    found = merge_nearest(values, targets, cu, sources=sources, metric=metric, how=how)
    merged, nearest = found
    want, want_nearest = expected(
        values,
        targets.tolist(),
        (~targets if sources is None else sources).tolist(),
        values if metric is None else metric,
        cu.tolist(),
        how,
    )
    assert merged.dtype == values.dtype and nearest.dtype == torch.int32
    assert nearest.tolist() == want_nearest
    close(merged, want, want_nearest)
    return found


@all_cases
@pytest.mark.parametrize("how", MERGES)
def test_groups(kernel: Case, how: str) -> None:
    """Of many sizes, one without tokens, one without targets, one with nothing else; values of an odd width."""
    n = sum(SIZES)
    values = torch.randn(n, 37).to(kernel.dtype)
    few = torch.rand(n) < 0.15
    few[40:41], few[74:76] = True, False  # the third group is one target, the fifth has none
    for targets in (few, ~few):
        check(values, targets, SIZES, how=how)
        check(values, targets, SIZES, how=how, sources=torch.rand(n) < 0.5)
        check(values, targets, SIZES, how=how, metric=torch.randn(n, 20))
        check(values, targets, SIZES, how=how, metric=torch.randn(n, 9).to(kernel.dtype))


@all_cases
@pytest.mark.parametrize("how", MERGES)
def test_wide_rows(kernel: Case, how: str) -> None:
    """More columns, dimensions and targets than a tile holds; the metric is the values."""
    check(torch.randn(100, 1100).to(kernel.dtype), torch.rand(100) < 0.8, [95, 5], how=how)


@all_cases
def test_many_rows(kernel: Case) -> None:
    """One long group behind a short one, and more groups than are looked at together. Once: the metric has its own dtype."""
    if kernel.dtype is not torch.float32:
        return
    few = torch.zeros(2100, dtype=torch.bool)
    few[[0, 5, 1023, 1024, 1700, 2047, 2048, 2099]] = True
    check(torch.randn(2100, 3).to(kernel.dtype), few, [3, 2097], metric=torch.randn(2100, 8))
    check(torch.randn(900, 3).to(kernel.dtype), torch.rand(900) < 0.5, [3] * 300, metric=torch.randn(900, 8))


@all_cases
@pytest.mark.parametrize("dim", [1, 16, 64])
def test_ties_go_to_the_lower_row(kernel: Case, dim: int) -> None:
    """Rows of signs have few cosines, all of them exact; most sources are as near to several targets."""
    n = sum(SIZES)
    metric = torch.where(torch.rand(n, dim) < 0.5, 1.0, -1.0)
    metric[:, dim // 4 :] = 1.0
    check(torch.randn(n, 5).to(kernel.dtype), torch.rand(n) < 0.4, SIZES, metric=metric)
    # The length of a row has no part: powers of two change no digit.
    scale = 2.0 ** torch.randint(-3, 4, (n, 1)).float()
    check(torch.randn(n, 5).to(kernel.dtype), torch.rand(n) < 0.4, SIZES, metric=(metric * scale))


@all_cases
def test_rows_of_zeros(kernel: Case) -> None:
    """At 0 from everything: such a source takes the first target; such a target is nearer than one on the other side."""
    metric = torch.tensor([[1.0, 0], [0, 0], [-1, 0], [-1, 1e-12], [0, 0], [1e-20, 0], [2, 1]])
    targets = torch.tensor([True, True, False, False, False, False, False])
    for way in (metric, metric.to(kernel.dtype)):
        values = torch.randn(7, 3).to(kernel.dtype)
        _, nearest = check(values, targets, [7], metric=way)
        assert nearest.tolist() == [-1, -1, 1, 1, 0, 0, 0]


@all_cases
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy, interpreting
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_rows_without_a_length(kernel: Case, bad: float) -> None:
    """A source without one joins nothing, a target without one gets nothing, alone or beside others."""
    metric = torch.randn(30, 6).float()
    targets = torch.arange(30) % 5 == 0
    metric[3, 2], metric[7, 0], metric[10, 5], metric[20, 1], metric[25, 3] = (bad,) * 5
    values = torch.randn(30, 4).to(kernel.dtype)
    cu = cu_seqlens([20, 10])  # both targets of the second group are bad
    merged, nearest = merge_nearest(values, targets, cu, metric=metric)
    usable = targets.clone()
    usable[10], usable[20:] = False, False
    sources = ~targets
    sources[[3, 7]] = False
    want, want_nearest = expected(
        values,
        usable.tolist(),
        sources.tolist(),
        metric.nan_to_num(posinf=0, neginf=0),
        cu.tolist(),
        "mean",
    )
    assert nearest.tolist() == want_nearest
    close(merged, want, want_nearest)


@all_cases
@pytest.mark.parametrize("how", MERGES)
def test_values_that_are_not_numbers_stay_where_they_belong(kernel: Case, how: str) -> None:
    """A NaN or an infinity reaches the target that its row joins, and no other."""
    values, metric, targets = torch.randn(60, 8), torch.randn(60, 6), torch.arange(60) % 6 == 0
    values[7, 3], values[20, 5], values[33, 0] = float("nan"), float("inf"), -float("inf")
    values = values.to(kernel.dtype)
    cu = cu_seqlens([24, 36])
    merged, nearest = merge_nearest(values, targets, cu, metric=metric, how=how)
    finite = values.nan_to_num(0, 0, 0)
    want, found = merge_nearest(finite, targets, cu, metric=metric, how=how)
    assert torch.equal(nearest, found)
    for row, column in ((7, 3), (20, 5), (33, 0)):
        want[[row, int(nearest[row])], column] = values[row, column]
    assert torch.equal(merged.nan_to_num(nan=3e4), want.nan_to_num(nan=3e4))


@all_cases
def test_rows_outside_all_groups(kernel: Case) -> None:
    """They keep what they hold, are no targets and join nothing."""
    values = torch.randn(50, 6).to(kernel.dtype)
    targets, sources = torch.rand(50) < 0.3, torch.rand(50) < 0.6
    targets[[0, 15, 49]], sources[[1, 16, 48]] = True, True
    values[:11], values[41:] = float("nan"), float("nan")
    cu = torch.tensor([11, 20, 20, 41], dtype=torch.int32)
    merged, nearest = merge_nearest(values, targets, cu, sources=sources)
    want, want_nearest = check(values[11:41], targets[11:41], [9, 0, 21], sources=sources[11:41])
    assert torch.equal(merged[11:41], want)
    assert merged[:11].isnan().all() and merged[41:].isnan().all()
    inside = torch.where(want_nearest < 0, -1, want_nearest + 11)
    assert nearest.tolist() == [-1] * 11 + inside.tolist() + [-1] * 9


@all_cases
def test_a_group_alone(kernel: Case) -> None:
    """Nothing in a group's result depends on its neighbours."""
    n = sum(SIZES)
    values, targets = torch.randn(n, 24).to(kernel.dtype), torch.rand(n) < 0.3
    merged, nearest = merge_nearest(values, targets, cu_seqlens(SIZES))
    first = 0
    for size in SIZES:
        rows = slice(first, first + size)
        alone, joined = merge_nearest(values[rows], targets[rows], cu_seqlens([size]))
        assert torch.equal(alone, merged[rows])
        assert torch.equal(torch.where(joined < 0, -1, joined + first), nearest[rows])
        first += size


@all_cases
@pytest.mark.parametrize("how", MERGES)
def test_sums_are_in_the_order_of_the_rows(kernel: Case, how: str) -> None:
    """Bit by bit, with terms of which many cancel: no other order gives these."""
    n = 70
    values = (torch.randn(n, 9) * 10.0 ** torch.randint(-3, 4, (n, 9))).to(kernel.dtype)
    targets = torch.zeros(n, dtype=torch.bool)
    targets[[30, 31]] = True
    side = torch.rand(n) < 0.5
    side[30], side[31] = True, False
    metric = torch.stack((side.float(), 1 - side.float()), 1)
    merged, nearest = merge_nearest(values, targets, cu_seqlens([n]), metric=metric, how=how)
    for target in (30, 31):
        rows = [i for i in range(n) if side[i] == side[target] and i != target]
        assert (nearest == target).nonzero()[:, 0].tolist() == [i for i in rows if i not in (30, 31)]
        total = torch.zeros(9)
        for i in rows:
            total = total + values[i].float()
        own = values[target].float()
        want = (own + total) / (1 + len(rows)) if how == "mean" else own + total / len(rows)
        assert torch.equal(merged[target], want.to(kernel.dtype))


@all_cases
def test_memory_of_the_caller(kernel: Case) -> None:
    """Rows with gaps, into another tensor or in place; a row that is target and source is a target."""
    n = 80
    wide, metric = torch.randn(n, 40).to(kernel.dtype), torch.randn(n, 30)
    values, like = wide[:, 5:22], metric[:, 3:12]
    targets = torch.rand(n) < 0.2
    sources = torch.rand(n) < 0.7
    sources |= targets
    cu = cu_seqlens([50, 30])
    want, nearest = merge_nearest(
        values.contiguous(), targets, cu, sources=sources & ~targets, metric=like.contiguous()
    )
    room = torch.full((n, 20), float("nan")).to(kernel.dtype)
    out = room[:, 1:18]
    merged, found = merge_nearest(values, targets, cu, sources=sources, metric=like, out=out)
    assert merged.data_ptr() == out.data_ptr()
    assert torch.equal(out, want) and torch.equal(found, nearest)
    assert room[:, :1].isnan().all() and room[:, 18:].isnan().all()
    twin = wide.clone()
    merge_nearest(values, targets, cu, sources=sources, metric=like, out=values)
    assert torch.equal(values, want)
    assert torch.equal(wide[:, :5], twin[:, :5]) and torch.equal(wide[:, 22:], twin[:, 22:])
    # Without a metric the values are one, in place, too.
    again, joined = merge_nearest(want, targets, cu)
    assert torch.equal(merge_nearest(want, targets, cu, out=want)[1], joined) and torch.equal(want, again)


@all_cases
def test_the_result_is_new_memory(kernel: Case) -> None:
    """Also where nothing is merged."""
    values = torch.randn(4, 3).to(kernel.dtype)
    for targets in (torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)):
        merged, nearest = merge_nearest(values, targets, cu_seqlens([4]))
        assert torch.equal(merged, values) and merged.data_ptr() != values.data_ptr()
        assert nearest.tolist() == [-1] * 4


@all_cases
def test_nothing(kernel: Case) -> None:
    for rows, sizes in ((0, []), (0, [0, 0]), (3, [])):
        targets = torch.ones(rows, dtype=torch.bool)
        merged, nearest = merge_nearest(torch.ones(rows, 4).to(kernel.dtype), targets, cu_seqlens(sizes))
        assert merged.shape == (rows, 4) and (merged == 1).all() and nearest.tolist() == [-1] * rows
    merged, nearest = merge_nearest(
        torch.zeros(3, 0).to(kernel.dtype), torch.ones(3, dtype=torch.bool), cu_seqlens([3])
    )
    assert merged.shape == (3, 0)


@all_cases
def test_far_rows(kernel: Case) -> None:
    """Rows so far apart that their offsets do not fit 32 bits."""
    step = 2**28 + 64
    values, metric = torch.randn(12, 8).to(kernel.dtype), torch.randn(12, 6).to(kernel.dtype)
    targets, cu = torch.arange(12) % 4 == 3, cu_seqlens([5, 7])
    want, nearest = merge_nearest(values, targets, cu, metric=metric)
    far = spread(values, 0, step)
    merged, found = merge_nearest(far, targets, cu, metric=spread(metric, 0, step), out=far)
    assert torch.equal(found, nearest) and torch.equal(merged, want)


@pytest.mark.skipif(not _triton.interpreting(), reason="a stand-in for a GPU needs Triton's interpreter")
@pytest.mark.parametrize("how", MERGES)
def test_the_host_learns_nothing(how: str) -> None:
    values, targets, cu = torch.randn(20, 4), torch.rand(20) < 0.4, cu_seqlens([12, 8])
    want = merge_nearest(values, targets, cu, how=how)
    with stand_in_gpu() as gpu, force_backend("triton"):
        arguments = [x.to("cuda") for x in (values, targets, cu, ~targets, values)]
        with gpu.nothing_waits():
            x, goal, bounds, rest, like = arguments
            found = merge_nearest(x, goal, bounds, how=how)
            again = merge_nearest(x, goal, bounds, sources=rest, metric=like, how=how, out=like)
        assert [x.tolist() for x in found] == [x.tolist() for x in again] == [x.tolist() for x in want]


@compiled
@pytest.mark.parametrize("how", MERGES)
def test_threads_and_tiles(kernel: Case, how: str) -> None:
    """Groups with many tiles of sources and of targets, a metric of several steps and an odd rest, few and many targets."""
    sizes = [700, 0, 63, 64, 65, 1]
    n, cu = sum(sizes), cu_seqlens(sizes)
    values, metric = torch.randn(n, 1031).to(kernel.dtype), torch.randn(n, 391)
    targets, owner, first = torch.zeros(n, dtype=torch.bool), torch.full((n,), -1), 0
    for size in sizes:
        kept = first + torch.randperm(size)[: size // 2].sort().values
        rest = torch.tensor(
            [i for i in range(first, first + size) if i not in set(kept.tolist())], dtype=torch.long
        )
        if len(kept):  # near to one target, and far from all others
            owner[rest] = kept[torch.randint(0, len(kept), (len(rest),))]
            metric[rest] = metric[owner[rest]] + 0.3 * metric[rest]
        targets[kept] = True
        first += size
    found = on_threads(lambda: merge_nearest(values, targets, cu, metric=metric.to(kernel.dtype), how=how))
    assert torch.equal(found[0][1].long(), owner)
    joined = owner >= 0
    total = torch.zeros(n, 1031).double().index_add_(0, owner[joined], values[joined].double())
    count = torch.bincount(owner[joined], minlength=n)[:, None].double()
    want = (values + total) / (1 + count) if how == "mean" else values + total / count.clamp(min=1)
    close(found[0][0], want, owner.tolist())
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


GROUP = """
from glimpse_kernels import merge_nearest

n = 16384
torch.set_num_threads(2)
targets, bounds = torch.arange(n) % 2 == 0, torch.tensor([0, n], dtype=torch.int32)
for dtype in (torch.float32, torch.bfloat16):
    # 128 places on a circle, far enough from each other for bf16, and 128 rows at each.
    angle = torch.arange(n // 128).repeat_interleave(128) * (2 * torch.pi / (n // 128))
    values = torch.stack([angle.cos(), angle.sin()], 1).to(dtype)
    merge_nearest(values[:300], targets[:300], torch.tensor([0, 300], dtype=torch.int32))
    merged, nearest = growth(lambda: merge_nearest(values, targets, bounds))
    assert torch.equal(nearest[1::2], torch.arange(n, dtype=torch.int32)[1::2] // 128 * 128)
    torch.testing.assert_close(merged, values)
"""


@needs_compiled
@measures_memory
def test_memory_of_a_long_group() -> None:
    """8,192 sources and as many targets, whose cosines are 256 MiB: two threads take less than 4 MiB."""
    found = growths(GROUP)
    assert len(found) == 2 and max(found) < 4096


@compiled
def test_metric_of_another_dtype(kernel: Case) -> None:
    """Also float16, which no C++ kernel reads."""
    values, targets = torch.randn(60, 5).to(kernel.dtype), torch.rand(60) < 0.3
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check(values, targets, [25, 35], metric=torch.randn(60, 17).to(dtype))


@compiled
@pytest.mark.parametrize(
    ("cu", "words"),
    [
        ([0, 5], "expected at most 4 rows, found 5"),
        ([0, 3, 2], "expected ascending values, found 2 after 3"),
        ([-1, 4], "expected >= 0, found -1"),
    ],
)
def test_groups_outside(kernel: Case, cu: list[int], words: str) -> None:
    values, targets = torch.ones(4, 3).to(kernel.dtype), torch.ones(4, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"merge_nearest: cu_seqlens.*: {words}"):
        merge_nearest(values, targets, torch.tensor(cu).int())


def replay(
    kernel: Case,
    values: Tensor,
    targets: Tensor,
    sources: Tensor,
    sizes: Sequence[int],
    metric: Tensor,
    how: str,
    tokens: Tensor,
) -> Tensor:
    """Runs with values in the case's dtype and the recorded metric; rows of the targets are `tokens`. Returns nearest."""
    merged, nearest = merge_nearest(
        values.to(kernel.dtype), targets, cu_seqlens(sizes), sources=sources, metric=metric, how=how
    )
    tolerance = 1e-5 if kernel.dtype is torch.float32 else 2e-2
    assert (merged[targets] - tokens).abs().max() <= tolerance * tokens.abs().max()
    assert torch.equal(merged[~targets], values.to(kernel.dtype)[~targets])
    return nearest


def recorded(kernel: Case, name: str) -> dict[str, Tensor]:
    return {k: v.to(kernel.device) for k, v in load_file(METHODS / f"{name}.safetensors").items()}


@all_cases
@pytest.mark.parametrize("name", ["visionzip_qwen_eager_16x24", "visionzip_qwen_flash_20x14"])
def test_visionzip_on_qwen(kernel: Case, name: str) -> None:
    """Contextual tokens of its own code, at their own place among the kept ones; dominant ones are neither."""
    data = recorded(kernel, name)
    dominant, contextual = data["out.dominant_indices"], data["out.contextual_indices"]
    values = data["in.merged_embeds"]
    targets, sources = torch.zeros(2, len(values), dtype=torch.bool).unbind()
    targets[contextual] = True
    sources[:] = ~targets
    sources[dominant] = False
    kept = data["out.kept_mask"]
    tokens = data["out.tokens"][targets[kept]]
    nearest = replay(
        kernel, values, targets, sources, [len(values)], data["out.metric"], "target_plus_mean", tokens
    )
    assert torch.equal(nearest[sources].long(), contextual[data["out.assignment"]])


@all_cases
def test_visionzip(kernel: Case) -> None:
    """Three tiles with a class token, which has no part in the merging; contextual tokens come last."""
    data = recorded(kernel, "visionzip_d24_c6_n144_b3")
    hidden, dominant = data["in.hidden"], data["out.dominant_indices_sorted"]
    tiles, n, width = hidden.shape
    sources = torch.ones(tiles, n, dtype=torch.bool).scatter(1, dominant, False)
    rest = sources.nonzero()[:, 1].view(tiles, -1)
    contextual = rest[:, data["out.contextual_targets"]]
    targets = torch.zeros(tiles, n, dtype=torch.bool).scatter(1, contextual, True)
    nearest = replay(
        kernel,
        hidden.reshape(-1, width),
        targets.flatten(),
        sources.flatten(),
        [n] * tiles,
        data["in.metric"].flatten(0, 1),
        "target_plus_mean",
        data["out.tokens"][:, dominant.shape[1] :].flatten(0, 1),
    )
    joined = contextual.gather(1, data["out.assignment"]) + n * torch.arange(tiles)[:, None]
    assert torch.equal(nearest[(sources & ~targets).flatten()].long(), joined.flatten())


@all_cases
@pytest.mark.parametrize(
    "name",
    ["vscan_qwen_double_22x18", "vscan_qwen_single_16x24", "vscan_stage1_t200_b2", "vscan_stage1_t96"],
)
def test_vscan(kernel: Case, name: str) -> None:
    """The kept tokens of its own code, on Qwen2.5-VL and on two tiles of LLaVA."""
    data = recorded(kernel, name)
    values = data.get("in.merged_embeds", data.get("in.projected_features"))
    assert values is not None
    keep = data["out.kept_mask"]
    n = keep.shape[-1]
    tiles = keep.numel() // n
    keep, values = keep.flatten(), values.reshape(tiles * n, -1)
    tokens = data["out.tokens"].reshape(-1, values.shape[1])
    nearest = replay(kernel, values, keep, ~keep, [n] * tiles, values, "mean", tokens)
    rows = keep.nonzero().view(tiles, -1)
    assert torch.equal(
        nearest[~keep].long(), rows.gather(1, data["out.assignment"].view(tiles, -1)).flatten()
    )


def test_cosines_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    values, targets, cu = torch.randn(100, 8), torch.rand(100) < 0.2, cu_seqlens([60, 40])
    want = merge_nearest(values, targets, cu)
    for chunk in (1, 50, 333):
        monkeypatch.setattr(definition, "CHUNK", chunk)
        for a, b in zip(merge_nearest(values, targets, cu), want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("how", MERGES)
def test_gradients(how: str) -> None:
    """The definition is differentiable in the values; the metric only chooses."""
    values = torch.randn(30, 5, dtype=torch.float32, requires_grad=True)
    metric, targets = torch.randn(30, 6), torch.rand(30) < 0.3
    merged, nearest = merge_nearest(values, targets, cu_seqlens([18, 12]), metric=metric, how=how)
    weight = torch.randn(30, 5)
    (got,) = torch.autograd.grad((merged * weight).sum(), values)
    share = torch.eye(30)
    for i, j in enumerate(nearest.tolist()):
        if j >= 0:
            count = nearest.tolist().count(j)
            share[j, j], share[j, i] = (1 / (1 + count),) * 2 if how == "mean" else (1, 1 / count)
    torch.testing.assert_close(got, share.T @ weight)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"values": torch.zeros(4)}, ValueError, "values: expected shape"),
        ({"values": torch.zeros(4, 3, dtype=torch.int32)}, TypeError, "merge_nearest"),
        ({"values": torch.zeros(3, 4).T}, ValueError, "values: expected a contiguous last dimension"),
        ({"targets": torch.zeros(4)}, TypeError, "targets: expected dtype bool"),
        ({"targets": torch.zeros(5, dtype=torch.bool)}, ValueError, "targets: expected shape"),
        ({"sources": torch.zeros(4, dtype=torch.int32)}, TypeError, "sources: expected dtype bool"),
        ({"sources": torch.zeros(8, dtype=torch.bool)[::2]}, ValueError, "sources: expected a contiguous"),
        ({"cu_seqlens": torch.zeros(2)}, TypeError, "cu_seqlens: expected dtype int32"),
        ({"metric": torch.zeros(3, 3)}, ValueError, "metric: expected shape"),
        ({"metric": torch.zeros(4, 3).double()}, TypeError, "metric: expected dtype float32 or bfloat16"),
        ({"how": "sum"}, ValueError, "how: expected one of mean, target_plus_mean, found 'sum'"),
        ({"out": torch.zeros(4, 2)}, ValueError, "out: expected shape"),
        ({"out": torch.zeros(4, 3).bfloat16()}, TypeError, "out: expected dtype float32"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments: dict[str, Any] = {
        "values": torch.zeros(4, 3),
        "targets": torch.ones(4, dtype=torch.bool),
        "cu_seqlens": torch.zeros(2, dtype=torch.int32),
    }
    arguments.update(change)
    with pytest.raises(error, match=words):
        merge_nearest(**arguments)

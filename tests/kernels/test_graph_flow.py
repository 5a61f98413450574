# SPDX-License-Identifier: Apache-2.0
"""`graph_flow` on every backend against the flow written out edge by edge in Python, and against recorded runs of G-Prune."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from glimpse_kernels import _ext, force_backend, graph_flow
from tests.kernels.kernel_cases import Case, cu_seqlens, op_cases

METHODS = Path(__file__).parents[1] / "golden" / "methods"
RECORDED = {
    n: c for n, c in json.loads((METHODS / "manifest.json").read_text()).items() if c["method"] == "gprune"
}
all_cases = pytest.mark.parametrize("kernel", op_cases("graph_flow"), indirect=True)


def exact(x: float) -> float:
    return x


def rounding(dtype: torch.dtype) -> Callable[[float], float]:
    return lambda x: torch.tensor(x, dtype=torch.float64, device="cpu").to(dtype).item()


def expected(
    features: Sequence[Sequence[float]],
    *,
    threshold: float = 0.5,
    temperature: float = 0.03,
    steps: int = 5,
    degree: str = "edges",
    rounded: Callable[[float], float] = exact,
) -> tuple[list[float], list[int]]:
    """One group: scores and degrees in Python's arithmetic, `rounded` wherever the contract says so."""
    n = len(features)
    norms = [rounded(math.sqrt(math.fsum(x * x for x in row))) for row in features]
    units = [[rounded(x / (norm or 1.0)) for x in row] for row, norm in zip(features, norms, strict=True)]
    shares: list[dict[int, float]] = []
    degrees = []
    for a in units:
        alike = [rounded(math.fsum(x * y for x, y in zip(a, b, strict=True))) for b in units]
        logits = {j: rounded(s / temperature) for j, s in enumerate(alike) if s >= threshold}
        most = max(logits.values(), default=0.0)
        total = math.fsum(math.exp(z - most) for z in logits.values())
        share = {j: math.exp(z - most) / total for j, z in logits.items()}
        degrees.append(sum(p > 2.0**-25 or degree == "edges" for p in share.values()))
        shares.append({j: rounded(p) for j, p in share.items()})
    flow = norms
    for _ in range(steps):
        flow = [math.fsum(flow[i] * shares[i].get(j, 0.0) for i in range(n)) for j in range(n)]
    return [v / max(1, d) for v, d in zip(flow, degrees, strict=True)], degrees


def close(found: Tensor, want: Sequence[float], tolerance: float = 1e-4) -> None:
    """Relative to the largest."""
    assert found.dtype == torch.float32
    truth = torch.tensor(want, dtype=torch.float64, device=found.device)
    most = truth.nan_to_num().abs().max().item() if len(want) else 1.0
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=tolerance * most, equal_nan=True)


def check(
    kernel: Case, groups: Sequence[Tensor], *, behind: int = 0, tolerance: float = 1e-4, **options: Any
) -> None:
    """`behind`: rows of NaN after the last group."""
    dim = groups[0].shape[1]
    packed = torch.cat([*groups, torch.full((behind, dim), float("nan"))]).to(kernel.dtype)
    scores, degrees = graph_flow(packed, cu_seqlens([len(g) for g in groups]), **options)
    rounded = rounding(kernel.dtype) if options.pop("rounded", True) else exact
    want, want_degrees = [], []
    for group in groups:
        values = group.to(kernel.dtype).double().tolist()
        found = expected(values, rounded=exact if kernel.dtype is torch.float32 else rounded, **options)
        want, want_degrees = want + found[0], want_degrees + found[1]
    assert degrees.dtype == torch.int32
    assert degrees.tolist() == want_degrees + [0] * behind
    close(scores, want + [0.0] * behind, tolerance)


def clear(n: int, dim: int, dtype: torch.dtype, threshold: float = 0.5) -> Tensor:
    """Clusters with noise, no cosine so close to the threshold that fp32 could take it for the other side."""
    while True:
        centre = torch.randn(max(1, n // 8), dim)
        x = centre[torch.randint(len(centre), (n,))] + 0.5 * torch.randn(n, dim)
        x = (x * (0.5 + 2 * torch.rand(n, 1))).to(dtype).float()
        unit = torch.nn.functional.normalize(x.double(), dim=1)
        if not n or ((unit @ unit.T) - threshold).abs().min() > 2e-6:
            return x


def exact_rows(n: int) -> Tensor:
    """Four entries of one size, a power of two: norms, unit rows and cosines (quarters) are exact in every dtype."""
    x = torch.zeros(n, 7)
    for i in range(n):
        x[i, torch.randperm(7)[:4]] = 1.0
    sign = torch.where(torch.rand(n, 7) < 0.15, -1.0, 1.0)
    return x * sign * 2.0 ** torch.randint(-2, 3, (n, 1))


@all_cases
@pytest.mark.parametrize("degree", ["edges", "float16"])
def test_groups(kernel: Case, degree: str) -> None:
    """Without the roundings, so that only fp32 stands between this and the truth; of many sizes, with one token and with none."""
    sizes = [40, 0, 1, 33, 2, 65, 7]
    groups = [clear(n, 6, kernel.dtype) for n in sizes]
    check(kernel, groups, rounded=False, degree=degree)
    check(kernel, groups, rounded=False, degree=degree, behind=5)


@all_cases
@pytest.mark.parametrize("steps", [0, 1, 2, 5, 9])
def test_steps(kernel: Case, steps: int) -> None:
    check(kernel, [clear(21, 5, kernel.dtype)], rounded=False, steps=steps)


@all_cases
@pytest.mark.parametrize(("threshold", "temperature"), [(0.2, 0.03), (0.9, 0.5), (0.7, 0.01), (0.01, 4.0)])
def test_constants(kernel: Case, threshold: float, temperature: float) -> None:
    groups = [clear(n, 5, kernel.dtype, threshold) for n in (30, 9)]
    check(kernel, groups, rounded=False, threshold=threshold, temperature=temperature)


@all_cases
@pytest.mark.parametrize("degree", ["edges", "float16"])
@pytest.mark.parametrize("temperature", [0.03, 0.02])
def test_roundings(kernel: Case, temperature: float, degree: str) -> None:
    """Every rounding of the contract, where cosines are exact and many lie on the threshold: it counts as reached. A share may round
    to the other neighbour where fp32 is not the truth, hence the tolerance. At 0.02 float16 loses every edge of one half."""
    groups = [exact_rows(n) for n in (50, 31)]
    tolerance = 1e-4 if kernel.dtype is torch.float32 else torch.finfo(kernel.dtype).eps
    check(kernel, groups, temperature=temperature, degree=degree, tolerance=tolerance, behind=3)


@all_cases
@pytest.mark.parametrize("degree", ["edges", "float16"])
@pytest.mark.parametrize(("n", "times"), [(200, 256), (4500, 1)])
def test_large(kernel: Case, n: int, times: int, degree: str) -> None:
    """Rows of 1792 dimensions, and more rows than the C++ kernel keeps tiles of; cosines are exact, as every row stands there 4^k
    times. Against matrices in float64."""
    if kernel.interpreted:
        n, times = n // 30 + 90, min(times, 16)
    rows = exact_rows(n)
    x = rows.repeat(1, times).to(kernel.dtype)
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    alike = unit @ unit.T
    edge = alike >= 0.5
    share = (alike / 0.02).masked_fill_(~edge, float("-inf")).softmax(1)
    flow = rows.double().norm(dim=1) * math.sqrt(times)
    for _ in range(3):
        flow = flow @ share
    want = (edge if degree == "edges" else share > 2.0**-25).sum(1)
    scores, degrees = graph_flow(x, cu_seqlens([n]), temperature=0.02, steps=3, rounded=False, degree=degree)
    assert torch.equal(degrees.long(), want)
    close(scores, (flow / want).tolist())


@pytest.mark.parametrize("kernel", [p for p in op_cases("graph_flow") if "cpu" in str(p.id)], indirect=True)  # type: ignore[attr-defined]
def test_any_number_of_threads(kernel: Case) -> None:
    """The same bits; and by C++ as by the definition."""
    x = clear(300, 40, kernel.dtype).to(kernel.dtype)
    arguments = x, cu_seqlens([190, 0, 110])
    with force_backend("naive"):
        want, want_degrees = graph_flow(*arguments, rounded=False)
    module = _ext.extension()
    found = []
    try:
        for threads in (1, 2, 3):
            module.set_num_threads(threads)
            found.append(graph_flow(*arguments, rounded=False))
    finally:
        module.set_num_threads(0)
    for scores, degrees in found:
        assert torch.equal(scores, found[0][0]) and torch.equal(degrees, found[0][1])
    assert torch.equal(found[0][1], want_degrees)
    close(found[0][0], want.double().tolist())


@pytest.mark.parametrize(
    "kernel", [p for p in op_cases("graph_flow") if "cpu" in str(p.id)][:1], indirect=True
)  # type: ignore[attr-defined]
@pytest.mark.parametrize("bounds", [[0, 5], [0, 3, 2, 4], [-1, 4]])
def test_bounds_outside_the_rows(kernel: Case, bounds: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens"):
        graph_flow(torch.zeros(4, 2, dtype=kernel.dtype), torch.tensor(bounds, dtype=torch.int32))


@all_cases
def test_what_is_too_little_for_float16(kernel: Case) -> None:
    """Two tokens at a cosine of 1/2: the share of the other is exp(-16.67) > 2^-25 at 0.03 and exp(-25) at 0.02."""
    x = torch.tensor([[1.0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1]]).to(kernel.dtype)
    for temperature, degree, want in (
        (0.03, "float16", 2),
        (0.02, "float16", 1),
        (0.02, "edges", 2),
    ):
        for rounded in (True, False):
            _, degrees = graph_flow(
                x, cu_seqlens([2]), temperature=temperature, degree=degree, rounded=rounded
            )
            assert degrees.tolist() == [want, want]


@all_cases
def test_equal_rows(kernel: Case) -> None:
    """All alike: every token gets the mean of the norms, over the number of tokens. In bfloat16 a third of something is rounded."""
    row = torch.tensor([1.0, -1.0, 1.0, 1.0, 0.0])
    gains = torch.tensor([1.0, 2.0, 4.0, 1.0, 8.0, 2.0, 2.0, 4.0])
    scores, degrees = graph_flow((gains[:, None] * row).to(kernel.dtype), cu_seqlens([8]))
    assert degrees.tolist() == [8] * 8
    close(scores, [2 * 24 / 8 / 8] * 8, 1e-6)
    scores, degrees = graph_flow(row.repeat(3, 1).to(kernel.dtype), cu_seqlens([3]))
    assert degrees.tolist() == [3] * 3
    close(scores, [2 / 3] * 3, 5 * torch.finfo(kernel.dtype).eps)


@all_cases
def test_one_token(kernel: Case) -> None:
    """It scores its norm, and its neighbours in the batch are none of its concern."""
    x = torch.tensor([[3.0, 4.0], [6.0, 8.0], [0.0, 0.0], [0.0, 2.0]]).to(kernel.dtype)
    scores, degrees = graph_flow(x, cu_seqlens([1, 1, 1, 1]))
    # 0.6 and 0.8 are rounded, so is the cosine with itself; a softmax over one edge is 1.
    assert scores.tolist() == [5.0, 10.0, 0.0, 2.0] and degrees.tolist() == [1, 1, 0, 1]


@all_cases
def test_zero_rows(kernel: Case) -> None:
    """They get and give nothing: the rest is as if they were not there. An image of nothing else scores 0."""
    x = clear(30, 5, kernel.dtype)
    holes = x.clone()
    holes[[0, 7, 8, 29]] = 0.0
    left = holes.abs().sum(1) > 0
    scores, degrees = graph_flow(torch.cat((holes, torch.zeros(6, 5))).to(kernel.dtype), cu_seqlens([30, 6]))
    alone, alone_degrees = graph_flow(holes[left].to(kernel.dtype), cu_seqlens([26]))
    assert (scores[30:] == 0).all() and (degrees[30:] == 0).all()
    assert (scores[:30][~left] == 0).all() and (degrees[:30][~left] == 0).all()
    assert degrees[:30][left].tolist() == alone_degrees.tolist()
    close(scores[:30][left], alone.double().tolist(), 1e-5)


@all_cases
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rounded", [True, False])
def test_rows_that_are_not_finite(kernel: Case, bad: float, rounded: bool) -> None:
    """Their score is NaN, and no other row sees them; nor does another image."""
    x, other = clear(20, 5, kernel.dtype), clear(11, 5, kernel.dtype)
    x[4, 2], x[17] = bad, bad
    fine = x.isfinite().all(1)
    scores, degrees = graph_flow(
        torch.cat((x, other)).to(kernel.dtype), cu_seqlens([20, 11]), rounded=rounded
    )
    assert scores[:20][~fine].isnan().all() and (degrees[:20][~fine] == 0).all()
    want, want_degrees = graph_flow(
        torch.cat((x[fine], other)).to(kernel.dtype), cu_seqlens([18, 11]), rounded=rounded
    )
    seen = torch.cat((fine, torch.ones(11, dtype=torch.bool)))
    assert degrees[seen].tolist() == want_degrees.tolist()
    close(scores[seen], want.double().tolist(), 1e-5)


@all_cases
def test_nothing_is_lost(kernel: Case) -> None:
    """The shares of a token add up to 1: what flows is the sum of the norms, whatever the number of steps."""
    x = clear(64, 12, kernel.dtype).to(kernel.dtype)
    for steps in (1, 5, 20):
        scores, degrees = graph_flow(x, cu_seqlens([40, 24]), steps=steps, rounded=False)
        held = scores.double() * degrees
        norms = x.double().norm(dim=1)
        for part in (slice(0, 40), slice(40, 64)):
            assert math.isclose(held[part].sum(), norms[part].sum(), rel_tol=1e-4)


@all_cases
def test_never_across_images(kernel: Case) -> None:
    """Each image of a batch as if it were alone; a view into a wider buffer as a tensor of its own."""
    sizes = [17, 1, 40, 8]
    wide = torch.randn(sum(sizes), 24).to(kernel.dtype)
    x = wide[:, 5:14]
    scores, degrees = graph_flow(x, cu_seqlens(sizes))
    first = 0
    for n in sizes:
        alone, alone_degrees = graph_flow(x[first : first + n].contiguous(), cu_seqlens([n]))
        assert torch.equal(scores[first : first + n], alone)
        assert torch.equal(degrees[first : first + n], alone_degrees)
        first += n


@all_cases
def test_nothing(kernel: Case) -> None:
    for rows, sizes in ((0, []), (0, [0, 0]), (3, [])):
        scores, degrees = graph_flow(torch.ones(rows, 4).to(kernel.dtype), cu_seqlens(sizes))
        assert scores.tolist() == [0.0] * rows and degrees.tolist() == [0] * rows
    scores, degrees = graph_flow(torch.ones(3, 0).to(kernel.dtype), cu_seqlens([3]))
    assert scores.tolist() == [0.0] * 3 and degrees.tolist() == [0] * 3


@all_cases
@pytest.mark.parametrize("name", RECORDED)
def test_recorded(kernel: Case, name: str) -> None:
    """G-Prune's own code in the three dtypes, on the tile and on the grid. Half precision: its scores are rounded and tie, which
    one of the tied is kept is open; of edges next to 2^-25 in float16 a few are."""
    params = RECORDED[name]["params"]
    if str(kernel.dtype) != "torch." + params["dtype"]:
        return
    data = {k: v.to(kernel.device) for k, v in load_file(METHODS / RECORDED[name]["file"]).items()}
    half = kernel.dtype is not torch.float32
    sizes = [data["in.X1"].shape[0], data["in.X2"].shape[0]]
    scores, degrees = graph_flow(
        torch.cat((data["in.X1"], data["in.X2"])),
        cu_seqlens(sizes),
        threshold=params["tau"],
        temperature=params["temperature"],
        steps=params["iterations"],
        degree="float16" if kernel.dtype is torch.float16 else "edges",
    )
    for part, score, degree in zip("12", scores.split(sizes), degrees.split(sizes), strict=True):
        wrong = (degree - data[f"out.degree{part}"]).abs()
        assert wrong.sum() <= (len(wrong) // 100 if kernel.dtype is torch.float16 else 0)
        truth, kept = data[f"out.score{part}"], data[f"out.kept{part}"]
        close(score, truth.double().tolist(), 2e-2 if half else 1e-4)
        best = score.argsort(descending=True, stable=True)[: len(kept)].sort().values
        swapped = set(best.tolist()) ^ set(kept.tolist())
        if not half:
            assert not swapped
        cut = truth[kept].min()
        assert all(abs(truth[i] - cut) <= 2 * torch.finfo(kernel.dtype).eps * cut for i in swapped)


@all_cases
def test_the_degree_of_float16_is_another(kernel: Case) -> None:
    """On the recorded tokens float16 leaves out some edges, fewer than a hundredth, of more than a twentieth of the tokens."""
    if kernel.dtype is not torch.float16:
        return
    x = load_file(METHODS / RECORDED["gprune_fp16_square"]["file"])["in.X1"].to(kernel.device)
    sizes = cu_seqlens([len(x)])
    more = graph_flow(x, sizes)[1]
    less = graph_flow(x, sizes, degree="float16")[1]
    assert (less <= more).all() and (less < more).sum() > len(x) / 20
    assert 0 < (more - less).sum() < more.sum() / 100


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"features": torch.zeros(4)}, ValueError, "features: expected shape"),
        ({"features": torch.zeros(4, 2, dtype=torch.int32)}, TypeError, "graph_flow"),
        ({"features": torch.zeros(2, 4).T}, ValueError, "features: expected a contiguous last dimension"),
        ({"features": [[1.0]]}, TypeError, "features: expected a torch.Tensor"),
        ({"cu_seqlens": torch.zeros(2)}, TypeError, "cu_seqlens: expected dtype int32"),
        ({"threshold": 0.0}, ValueError, "threshold: expected a number above 0 and below 1, found 0.0"),
        ({"threshold": 1}, ValueError, "threshold: expected a number above 0 and below 1, found 1"),
        ({"threshold": float("nan")}, ValueError, "threshold: expected"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number above 0, found 0.0"),
        ({"temperature": float("inf")}, ValueError, "temperature: expected"),
        ({"steps": -1}, ValueError, "steps: expected at least 0, found -1"),
        ({"degree": "half"}, ValueError, "degree: expected one of edges, float16; found 'half'"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments: dict[str, Any] = {
        "features": torch.zeros(4, 2),
        "cu_seqlens": torch.zeros(2, dtype=torch.int32),
    }
    arguments.update(change)
    with pytest.raises(error, match=words):
        graph_flow(**arguments)

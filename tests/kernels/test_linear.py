# SPDX-License-Identifier: Apache-2.0
"""linear, linear_group and gated_linear against double precision.

bf16: at most twice the error of torch in bf16. fp32, where only the order of the sums differs: what rounding errors of
random sign add up to, the square root of their number times the magnitude of the terms.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glimpse_kernels import Int8Weight, _ext, _triton, gated_linear, linear, linear_group, quantize_int8
from tests.kernels.arena import spread
from tests.kernels.kernel_cases import Case, assert_as_good_as, assert_same, op_cases

cpu = importlib.import_module("glimpse_kernels.linear.cpu")
ours: Any = None if _triton.missing() else importlib.import_module("glimpse_kernels.linear.triton")
all_cases = pytest.mark.parametrize("kernel", op_cases("linear"), indirect=True)
triton_cases = pytest.mark.parametrize(
    "kernel", [c for c in op_cases("linear") if c.id.startswith("triton-")], indirect=True
)
compiled_only = pytest.mark.skipif(
    _ext.compiled() is None, reason=f"compiled extension not available: {_ext.compiled_error()}"
)

# rows, inputs, outputs: one row, a few, the border between streaming and packing, many; odd sizes; more than one block
# of inputs; nothing at all
SHAPES = [
    (1, 1, 1),
    (1, 33, 5),
    (1, 1024, 70),
    (2, 100, 64),
    (3, 65, 66),
    (7, 2050, 9),
    (16, 96, 129),
    (17, 96, 129),
    (19, 101, 131),
    (64, 1025, 33),
    (211, 2050, 96),
    (900, 77, 200),
    (0, 8, 4),
    (4, 8, 0),
    (2, 0, 3),
    (40, 0, 3),
]


def data(rows: int, depth: int, cols: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x as a view with a row stride of its own, weight, bias."""
    g = torch.Generator().manual_seed(rows + 31 * depth + 7 * cols)
    x = torch.randn(rows, depth + 3, generator=g).to(dtype)[:, 2 : 2 + depth]
    weight = (torch.randn(cols, depth, generator=g) / max(depth, 1) ** 0.5).to(dtype)
    return x, weight, torch.randn(cols, generator=g).to(dtype)


def feasible(kernel: Case, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """The shape, or for the interpreter one with fewer tiles on the same side of the border between few rows and many."""
    rows, depth, cols = shape
    if not kernel.interpreted or 1 < rows <= 16:
        return shape
    return (
        (1, min(depth, 530), min(cols, 21)) if rows == 1 else (min(rows, 40), min(depth, 290), min(cols, 140))
    )


def matrix(weight: Tensor | Int8Weight) -> Tensor:
    """The weight in double precision; int8 spelled out entry by entry."""
    if isinstance(weight, Tensor):
        return weight.double()
    columns = torch.arange(weight.values.shape[1])
    return weight.values.double() * weight.scales.double()[:, columns // weight.group]


def check(got: Tensor, theirs: Tensor, truth: Tensor, terms: Tensor, depth: int, what: str) -> None:
    """`terms`: sums of the magnitudes of what was added up for each result."""
    if got.dtype is not torch.float32:
        return assert_as_good_as(got, theirs, truth, what)
    assert got.shape == truth.shape and not got.isnan().any()
    error = (got.double() - truth).abs()
    allowed = torch.finfo(torch.float32).eps * (4 + depth**0.5) * terms
    assert (error <= allowed).all(), f"{what}: {(error / allowed).max().item():.2f} of what is allowed"


@all_cases
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("int8", [False, True])
def test_values(kernel: Case, shape: tuple[int, int, int], int8: bool) -> None:
    assert kernel.dtype is not None
    shape = feasible(kernel, shape)
    x, plain, bias = data(*shape, kernel.dtype)
    weight = quantize_int8(plain) if int8 else plain
    exact = matrix(weight)
    terms = x.double().abs() @ exact.abs().T + bias.double().abs()
    for b in (None, bias):
        truth = x.double() @ exact.T + (0 if b is None else b.double())
        theirs = F.linear(x, exact.to(x.dtype), b)
        check(linear(x, weight, b), theirs, truth, terms, shape[1], "linear")
        got = linear(
            x, weight, b, activation="gelu"
        )  # its slope is at most 1.13, and erf has an error of its own
        check(got, F.gelu(theirs), F.gelu(truth), 1.13 * terms + truth.abs(), shape[1], "gelu")


@all_cases
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("int8", [False, True])
def test_gated(kernel: Case, shape: tuple[int, int, int], int8: bool) -> None:
    assert kernel.dtype is not None
    shape = feasible(kernel, shape)
    x, gate, gate_bias = data(*shape, kernel.dtype)
    up, up_bias = gate.flip(1).contiguous(), gate_bias.flip(0).contiguous()
    weights = (quantize_int8(gate), quantize_int8(up)) if int8 else (gate, up)
    a, b = (matrix(w) for w in weights)
    for bias in (False, True):
        biases = (gate_bias, up_bias) if bias else (None, None)
        shift = (gate_bias.double(), up_bias.double()) if bias else (0, 0)
        gates, ups = x.double() @ a.T + shift[0], x.double() @ b.T + shift[1]
        truth = F.silu(gates) * ups
        theirs = F.silu(F.linear(x, a.to(x.dtype), biases[0])) * F.linear(x, b.to(x.dtype), biases[1])
        size = x.double().abs()
        gate_terms, up_terms = size @ a.abs().T + abs(shift[0]), size @ b.abs().T + abs(shift[1])
        terms = 1.1 * gate_terms * ups.abs() + gates.abs() * up_terms + truth.abs()
        check(gated_linear(x, *weights, *biases), theirs, truth, terms, shape[1], "gated")


@all_cases
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("int8", [False, True])
def test_group_is_each_alone(kernel: Case, rows: int, int8: bool) -> None:
    """Four weights of different sizes, results as views of one buffer whose other columns stay as they are."""
    assert kernel.dtype is not None
    sizes = [21, 1, 16, 34] if kernel.interpreted else [70, 1, 16, 130]
    x, fused, bias = data(rows, 96, sum(sizes), kernel.dtype)
    plain = [w.contiguous() for w in fused.split(sizes)]
    weights = [quantize_int8(w) for w in plain] if int8 else plain
    biases = [b if i % 2 else None for i, b in enumerate(bias.split(sizes))]
    alone = [linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    buffer = torch.full((rows, sum(sizes) + 8), 7.0, dtype=kernel.dtype)
    outs = buffer[:, 4:-4].split(sizes, dim=1)
    got = linear_group(x, weights, biases, outs=outs)
    for one, place, found in zip(alone, outs, got, strict=True):
        assert torch.equal(one, place) and found.data_ptr() == place.data_ptr()
    assert (buffer[:, :4] == 7).all() and (buffer[:, -4:] == 7).all()
    for one, found in zip(alone, linear_group(x, weights, biases), strict=True):
        assert torch.equal(one, found)


@all_cases
@pytest.mark.parametrize("rows", [1, 40])
def test_out_keeps_to_its_rows(kernel: Case, rows: int) -> None:
    assert kernel.dtype is not None
    x, weight, bias = data(rows, 64, 70, kernel.dtype)
    buffer = torch.full((rows, 80), 7.0, dtype=kernel.dtype)
    out = buffer[:, 5:75]
    assert linear(x, weight, bias, out=out).data_ptr() == out.data_ptr()
    assert torch.equal(out, linear(x, weight, bias))
    gated_linear(x, weight, weight, out=out)
    assert torch.equal(out, gated_linear(x, weight, weight))
    assert (buffer[:, :5] == 7).all() and (buffer[:, 75:] == 7).all()


@all_cases
@pytest.mark.parametrize("rows", [3, 40])
def test_bad_numbers_stay_in_their_row(kernel: Case, rows: int) -> None:
    assert kernel.dtype is not None
    x, weight, bias = data(rows, 65, 70, kernel.dtype)
    clean = linear(x, weight, bias)
    x = x.clone()
    x[1, 64] = torch.nan  # the last of an odd number, which has no neighbour to be multiplied with
    x[2, 0] = torch.inf
    want = F.linear(x.float(), weight.float(), bias.float())
    got = linear(x, weight, bias)
    assert got[1].isnan().all() and torch.equal(got[2].float(), want[2]) and got[2].isinf().all()
    assert linear(x, weight, bias, activation="gelu")[1].isnan().all()
    gated = gated_linear(x, weight, weight)
    assert gated[1].isnan().all() and gated[0].isfinite().all()
    torch.testing.assert_close(got[0], clean[0])


@all_cases
@pytest.mark.parametrize("rows", [1, 6, 33])
def test_nothing_beside_the_matrices_is_read(kernel: Case, rows: int) -> None:
    """x, weights and biases as views into memory that holds NaN everywhere else."""
    assert kernel.dtype is not None
    x, weight, bias = data(rows, 99, 37, kernel.dtype)
    theirs, truth = F.linear(x, weight, bias), F.linear(x.double(), weight.double(), bias.double())
    places = [
        torch.full((t.shape[0] + 3, t.shape[-1] + 9), torch.nan, dtype=t.dtype)
        for t in (x, weight, bias[None])
    ]
    views = []
    for place, t in zip(places, (x, weight, bias[None]), strict=True):
        views.append(place[1 : 1 + t.shape[0], 4 : 4 + t.shape[1]].copy_(t))
    x, weight, bias = views[0], views[1], views[2][0]
    terms = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    check(linear(x, weight, bias), theirs, truth, terms, 99, "linear")
    for got in linear_group(x, [weight, weight], [bias, bias]):
        check(got, theirs, truth, terms, 99, "group")
    gated = gated_linear(x, weight, weight, bias, bias)
    check(gated, F.silu(theirs) * theirs, F.silu(truth) * truth, 4 * terms * (1 + terms), 99, "gated")


@triton_cases
@pytest.mark.parametrize("rows", [1, 4])
def test_rows_further_apart_than_32_bits_reach(kernel: Case, rows: int) -> None:
    """x, weights and results with 2^30 elements from one row to the next."""
    assert kernel.dtype is not None
    x, weight, bias = data(rows, 40, 4, kernel.dtype)
    want, gated = linear(x, weight, bias), gated_linear(x, weight, weight, bias, bias)
    step = 2**30
    far = spread(weight, 0, step)
    out = spread(torch.full_like(want, torch.nan), 0, step)
    wide = spread(x, 0, step)
    assert_same(kernel, linear(wide, far, bias, out=out), want)
    assert_same(kernel, gated_linear(wide, far, far, bias, bias), gated)


@all_cases
@pytest.mark.parametrize("group", [32, 64, 96])
@pytest.mark.parametrize("rows", [1, 9, 21])
def test_groups_of_other_sizes(kernel: Case, group: int, rows: int) -> None:
    """Scales far apart, and a last group that is shorter."""
    assert kernel.dtype is not None
    x, plain, bias = data(rows, 200, 33, kernel.dtype)
    steps = torch.logspace(-2, 1, 200)[None]
    weight = quantize_int8(plain.float() * steps, group)
    exact = matrix(weight)
    theirs, truth = F.linear(x, exact.to(x.dtype), bias), x.double() @ exact.T + bias.double()
    terms = x.double().abs() @ exact.abs().T + bias.double().abs()
    check(linear(x, weight, bias), theirs, truth, terms, 200, f"groups of {group}")


@triton_cases
@pytest.mark.parametrize("int8", [False, True])
def test_row_tiles_of_any_size_sum_in_one_order(kernel: Case, int8: bool) -> None:
    """A row alone: the same bits from every configuration of the table."""
    assert kernel.dtype is not None
    x, plain, bias = data(1, 530, 35, kernel.dtype)
    weight = quantize_int8(plain) if int8 else plain
    found = []
    for config in ours.ROW.table.values():
        with ours.ROW.forced(config):
            found.append((linear(x, weight, bias), gated_linear(x, weight, weight, bias, bias)))
    for y, gated in found[1:]:
        assert_same(kernel, y, found[0][0])
        assert_same(kernel, gated, found[0][1])


@triton_cases
def test_every_tile_of_the_table(kernel: Case) -> None:
    assert kernel.dtype is not None
    for (_, (kind, what)), config in ours.TILE.table.items():
        if (kind == "fp32") is not (kernel.dtype is torch.float32):
            continue
        for rows in (133,) if what in ("many rows", "most rows") else (11,):
            x, plain, bias = data(rows, 140, 135, kernel.dtype)
            weight = plain if kind == "plain" else quantize_int8(plain)
            exact = matrix(weight)
            terms = x.double().abs() @ exact.abs().T + bias.double().abs()
            truth, theirs = x.double() @ exact.T + bias.double(), F.linear(x, exact.to(x.dtype), bias)
            with ours.TILE.forced(config):
                check(linear(x, weight, bias), theirs, truth, terms, 140, f"{kind} {what} {rows}")
                got = gated_linear(x, weight, weight, bias, bias)
            check(
                got,
                F.silu(theirs) * theirs,
                F.silu(truth) * truth,
                4 * terms * (1 + terms),
                140,
                f"gated {kind} {what}",
            )


@triton_cases
@pytest.mark.parametrize("int8", [False, True])
def test_a_row_does_not_depend_on_the_others(kernel: Case, int8: bool) -> None:
    assert kernel.dtype is not None
    x, plain, bias = data(16, 260, 50, kernel.dtype)
    weight = quantize_int8(plain) if int8 else plain
    whole = linear(x, weight, bias)
    for rows in (2, 7, 15):
        assert torch.equal(linear(x[:rows], weight, bias), whole[:rows])


@triton_cases
def test_eight_bits_from_the_tile_that_the_number_of_tiles_asks_for(kernel: Case) -> None:
    """Few tiles of the larger size: the smaller one; bits do not tell."""
    if kernel.dtype is torch.float32:
        return
    assert kernel.dtype is not None
    x, plain, bias = data(130, 130, 140, kernel.dtype)
    weight = quantize_int8(plain)
    with _triton.force_chip(_triton.Chip(90, 1000)):
        small = linear(x, weight, bias)
    with _triton.force_chip(_triton.Chip(80, 1)):
        large = linear(x, weight, bias)
    theirs, truth = (
        F.linear(x, matrix(weight).to(x.dtype), bias),
        x.double() @ matrix(weight).T + bias.double(),
    )
    assert_as_good_as(small, theirs, truth)
    assert_as_good_as(large, theirs, truth)


@compiled_only
@pytest.mark.parametrize("rows", [1, 8, 700])
@pytest.mark.parametrize("int8", [False, True])
def test_same_bits_on_any_number_of_threads(rows: int, int8: bool) -> None:
    x, plain, bias = data(rows, 1500, 200, torch.bfloat16)
    weight = quantize_int8(plain) if int8 else plain
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(linear(x, weight, bias))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@compiled_only
def test_torch_multiplies_where_it_has_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """With AMX many bf16 rows go to torch, few rows and int8 never do."""
    calls = []
    inner = F.linear

    def counted(*args: Tensor) -> Tensor:
        calls.append(args[0].shape[0])
        return inner(*args)

    monkeypatch.setattr(cpu, "_has_amx", lambda: True)
    monkeypatch.setattr(F, "linear", counted)
    x, weight, bias = data(30, 64, 48, torch.bfloat16)
    got = linear(x, weight, bias, activation="gelu")
    gated = gated_linear(x, weight, weight, bias, bias)
    assert calls == [30, 30, 30]
    linear(x, quantize_int8(weight), bias)
    linear(x[:16], weight, bias)
    assert calls == [30, 30, 30]
    monkeypatch.setattr(cpu, "_has_amx", lambda: False)
    torch.testing.assert_close(got, linear(x, weight, bias, activation="gelu"), rtol=0.02, atol=0.02)
    torch.testing.assert_close(gated, gated_linear(x, weight, weight, bias, bias), rtol=0.03, atol=0.03)
    assert calls == [30, 30, 30]


def test_gradients_go_through_the_definition() -> None:
    x, weight, bias = data(5, 32, 8, torch.float32)
    weight.requires_grad_()
    linear(x, weight, bias, activation="gelu").sum().backward()
    other = weight.detach().clone().requires_grad_()
    F.gelu(F.linear(x, other, bias)).sum().backward()
    torch.testing.assert_close(weight.grad, other.grad)


# ---- int8 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("depth", [1, 32, 100, 257])
def test_quantized_within_half_a_step(group: int, depth: int) -> None:
    g = torch.Generator().manual_seed(depth)
    weight = torch.randn(6, depth, generator=g) * torch.logspace(-3, 3, 6)[:, None]
    weight[2, :group] = 0
    packed = quantize_int8(weight, group)
    assert packed.shape == weight.shape and packed.scales.shape == (6, -(-depth // group))
    assert packed.values.min() >= -127
    for start in range(0, depth, group):
        run = weight[:, start : start + group]
        scale = packed.scales[:, start // group]
        torch.testing.assert_close(scale, run.abs().amax(1) / 127)
        error = (packed.values[:, start : start + group] * scale[:, None] - run).abs()
        assert (error <= scale[:, None] * 0.5001).all()
    assert (packed.values[2, :group] == 0).all()
    torch.testing.assert_close(packed.dequantize().double(), matrix(packed), rtol=1e-6, atol=0)
    assert packed.nbytes == packed.values.numel() + 4 * packed.scales.numel()


def test_quantize_refuses() -> None:
    with pytest.raises(ValueError, match="finite entries, found NaN"):
        quantize_int8(torch.tensor([[1.0, torch.nan]]))
    with pytest.raises(ValueError, match=r"float matrix \[N, K\], found"):
        quantize_int8(torch.ones(3))
    with pytest.raises(ValueError, match="multiple of 32, found 20"):
        quantize_int8(torch.ones(2, 40), 20)
    good = quantize_int8(torch.ones(2, 40))
    with pytest.raises(ValueError, match=r"scales: expected float32 \[2, 1\]"):
        Int8Weight(good.values, good.scales[:1])
    with pytest.raises(ValueError, match="values: expected int8"):
        Int8Weight(good.values.int(), good.scales)
    with pytest.raises(ValueError, match="contiguous"):
        Int8Weight(torch.zeros(40, 2, dtype=torch.int8).T, good.scales)


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_refusals_name_the_argument() -> None:
    x, w, b = torch.zeros(3, 8), torch.zeros(5, 8), torch.zeros(5)
    with pytest.raises(ValueError, match=r"linear: x: expected shape \[T, K\]"):
        linear(torch.zeros(8), w)
    with pytest.raises(ValueError, match=r"linear: weight: expected shape \[N, K\] = \[\*, 8\], found"):
        linear(x, torch.zeros(5, 7))
    with pytest.raises(TypeError, match="linear: weight: expected dtype float32, found bfloat16"):
        linear(x, w.bfloat16())
    with pytest.raises(
        TypeError, match="linear: weight: expected a torch.Tensor or an Int8Weight, found list"
    ):
        linear(x, [1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"linear: bias: expected shape \[N\] = \[5\]"):
        linear(x, w, torch.zeros(4))
    with pytest.raises(ValueError, match=r"linear: out: expected shape \[T, N\] = \[3, 5\]"):
        linear(x, w, b, out=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="linear: activation: expected None or 'gelu', found 'relu'"):
        linear(x, w, activation="relu")
    with pytest.raises(ValueError, match="linear: weight: expected a contiguous last dimension"):
        linear(x, torch.zeros(8, 5).T)
    with pytest.raises(ValueError, match="linear_group: weights: expected 1 to 4 of them, found 5"):
        linear_group(x, [w] * 5)
    with pytest.raises(ValueError, match="linear_group: biases: expected 2 of them, one a weight, found 1"):
        linear_group(x, [w, w], [b])
    with pytest.raises(ValueError, match="expected all plain or all int8 of one group size, found"):
        linear_group(x, [w, quantize_int8(w)])
    with pytest.raises(ValueError, match=r"gated_linear: up: expected gate's shape \[5, 8\], found \[4, 8\]"):
        gated_linear(x, w, torch.zeros(4, 8))

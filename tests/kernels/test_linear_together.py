# SPDX-License-Identifier: Apache-2.0
"""Weights, biases and results that lie together in memory: the same numbers, by one product where torch multiplies."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glimpse_kernels import gated_linear, linear_group
from tests.kernels.kernel_cases import Case, needs_triton
from tests.kernels.test_linear import all_cases, check, data


@all_cases
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_gate_and_up_laid_together(kernel: Case, rows: int) -> None:
    """The two halves of one matrix, with both biases, with one and with none."""
    assert kernel.dtype is not None
    x, both, bias = data(rows, 64, 2 * 20, kernel.dtype)
    apart = [w.clone() for w in both.chunk(2)]
    gate, up = both.chunk(2)
    gate_bias, up_bias = bias.chunk(2)
    for biases in ((None, None), (gate_bias, up_bias), (gate_bias, None), (None, up_bias)):
        got, want = gated_linear(x, gate, up, *biases), gated_linear(x, *apart, *biases)
        torch.testing.assert_close(got, want, rtol=1e-6 if kernel.dtype is torch.float32 else 0.02, atol=1e-2)
        out = torch.full_like(got, torch.nan)
        assert gated_linear(x, gate, up, *biases, out=out).data_ptr() == out.data_ptr()
        assert torch.equal(out, got)
        for halves in (gate, up), apart:
            room = torch.full((rows, 40), torch.nan, dtype=x.dtype)
            for out in (None, room[:, :20], torch.full_like(got, torch.nan)):
                found = gated_linear(x, *halves, *biases, out=out, room=room)
                assert torch.equal(found, got if halves[0] is gate else want)
                assert out is None or found.data_ptr() == out.data_ptr()
    with pytest.raises(ValueError, match=r"gated_linear: room: expected shape \[T, 2 N\] = \[\d+, 40\]"):
        gated_linear(x, gate, up, room=torch.empty(rows, 20, dtype=x.dtype))


@all_cases
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_a_group_laid_together(kernel: Case, rows: int) -> None:
    """Runs of rows of one matrix, with the biases of one vector, with none and with one apart; results as columns of one tensor."""
    assert kernel.dtype is not None
    x, both, bias = data(rows, 64, 24, kernel.dtype)
    sizes = [12, 4, 8]
    weights, apart = both.split(sizes), [w.clone() for w in both.split(sizes)]
    truth, theirs = x.double() @ both.double().T, F.linear(x, both)
    some = [*bias.split(sizes)[:2], None]
    for biases in (
        None,
        list(bias.split(sizes)),
        [b.clone() for b in bias.split(sizes)],
        some,
        [some[0], None, None],
    ):
        shift = torch.cat(
            [
                torch.zeros(n).to(bias) if b is None else b
                for b, n in zip(biases or [None] * 3, sizes, strict=True)
            ]
        )
        terms = x.double().abs() @ both.double().abs().T + shift.double().abs()
        place = torch.full((rows, 24), torch.nan, dtype=x.dtype)
        columns = place.split(sizes, dim=1)
        for group, outs in ((weights, None), (weights, columns), (apart, columns), (weights, columns[::-1])):
            if outs is not None and outs[0].shape[1] != sizes[0]:
                outs = [torch.full((rows, n), torch.nan, dtype=x.dtype) for n in sizes]
            place.fill_(torch.nan)
            got = linear_group(x, group, biases, outs=outs)
            check(torch.cat(got, 1), theirs + shift, truth + shift.double(), terms, 64, f"{biases}")
            for ours_, out in zip(got, outs or got, strict=True):
                assert ours_.data_ptr() == out.data_ptr()


@needs_triton
def test_one_product_for_what_lies_together(monkeypatch: pytest.MonkeyPatch) -> None:
    gemm, asked = importlib.import_module("glimpse_kernels.linear.torch_gemm"), []
    single = gemm.torch_linear

    def counted(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        asked.append(weight.shape[0])
        return single(x, weight, *rest)

    monkeypatch.setattr(gemm, "torch_linear", counted)
    x, both, bias = data(20, 64, 24, torch.float32)
    sizes, place = [12, 4, 8], torch.empty(20, 24)
    parts, biases, columns = both.split(sizes), bias.split(sizes), place.split(sizes, dim=1)
    apart = [w.clone() for w in parts]
    for weights, some, outs, wanted in (
        (parts, biases, columns, [24]),
        (parts, None, columns, [24]),
        (parts, biases, None, [24]),
        (parts[1:], biases[1:], columns[1:], [12]),
        (parts, None, [c.clone() for c in columns], sizes),
        (parts, [*biases[:2], biases[2].clone()], columns, sizes),
        (parts, [*biases[:2], None], columns, sizes),
        (apart, biases, columns, sizes),
        (parts[::-1], biases[::-1], None, sizes[::-1]),
        (both.chunk(3)[::2], None, None, [8, 8]),
    ):
        asked.clear()
        for got, weight in zip(gemm.torch_linear_group(x, weights, some, outs), weights, strict=True):
            assert got.shape == (20, weight.shape[0])
        assert asked == list(wanted)

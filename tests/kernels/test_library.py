# SPDX-License-Identifier: Apache-2.0
"""torch.ops.glimpse: schemas, fake results and mutation marks by opcheck; values against the plain functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import glimpse_kernels as gk
from glimpse_kernels.library import OPS


def ints(*x: int) -> Tensor:
    return torch.tensor(x, dtype=torch.int32)


def samples() -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """One call per op."""
    torch.manual_seed(0)
    q, k, v = torch.randn(7, 4, 8), torch.randn(7, 2, 8), torch.randn(7, 2, 8)
    angles = torch.rand(7, 4)
    cos, sin = angles.cos(), angles.sin()
    x, weight = torch.randn(5, 16), torch.randn(16)
    packed = gk.quantize_int8(torch.randn(6, 16), 32)
    return {
        "attention": ((q, k, v, ints(0, 3, 7), ints(0, 3, 7)), {"causal": True}),
        "decode_attention": (
            (
                torch.randn(2, 4, 8),
                torch.randn(3, 4, 2, 8),
                torch.randn(3, 4, 2, 8),
                ints(0, 1, 2, 0).view(2, 2),
                ints(6, 3),
            ),
            {},
        ),
        "linear": ((x, torch.randn(6, 16), torch.randn(6)), {"activation": "gelu"}),
        "linear_int8": ((x, packed.values, packed.scales, torch.randn(6)), {"group": 32}),
        "linear_group": ((x, [torch.randn(6, 16), torch.randn(2, 16)], []), {}),
        "gated_linear": ((x, torch.randn(6, 16), torch.randn(6, 16), torch.randn(6)), {}),
        "glimpse_scores": ((q[:2], k, ints(0, 3, 5), ints(0, 0, 1)), {"lse": torch.randn(2, 4)}),
        "received_attention": (
            (q, k, torch.randn(7, 4), ints(0, 3, 7), ints(0, 3, 7)),
            {"causal": True, "q_positions": ints(0, 2, 1, 3, 3, 0, -1), "order": torch.randperm(7).int()},
        ),
        "last_row_attention": ((q[:2], k, ints(0, 4, 7), ints(0, 3, 5), ints(0, 0, 1)), {}),
        "select_tokens": (
            (torch.randn(6), ints(0, 2, 6)),
            {
                "threshold": 0.0,
                "caps": ints(1, 2),
                "floors": ints(1, 1),
                "token_rows": ints(1, 2, 4, 5, 6, 7),
                "row_keep": torch.tensor([True, False, False, True, False, False, False, False, True]),
                "cu_seqlens": ints(0, 3, 9),
                "capacity": 9,
            },
        ),
        "farthest_points": ((torch.rand(13), ints(0, 3, 5), ints(0, 2, 4)), {"tokens": 5, "capacity": 5}),
        "greedy_dpp": (
            (torch.eye(3).flatten().repeat(2)[:13], torch.rand(5), ints(0, 3, 5), ints(0, 2, 3)),
            {"capacity": 3},
        ),
        "drop_duplicates": (
            (torch.rand(13), ints(0, 3, 5), ints(2, 0, 1, 4, 3), ints(0, 3, 5), ints(1, 1)),
            {"tokens": 5, "per_round": 1},
        ),
        "merge_nearest": (
            (torch.randn(7, 4), torch.tensor([True, False, False, True, False, True, False]), ints(0, 3, 7)),
            {"metric": torch.randn(7, 3), "how": "target_plus_mean"},
        ),
        "window_topk": (
            (torch.rand(14), ints(0, 8, 12), ints(2, 4, 2, 2).view(2, 2), ints(0, 3, 5)),
            {"window": 2, "capacity": 5, "share": "down"},
        ),
        "graph_flow": ((torch.randn(6, 3) + 1, ints(0, 4, 6)), {"steps": 2, "degree": "float16"}),
        "compact": (
            (
                ints(0, 4, -1),
                ints(2, 0, 1),
                torch.randn(2, 7, 2, 8),
                torch.randn(2, 7, 2, 8),
                torch.zeros(2, 4, 2, 8),
                torch.zeros(2, 4, 2, 8),
                [torch.randn(7, 5), torch.arange(7)],
                [torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)],
            ),
            {},
        ),
        "rope": ((q.clone(), k.clone(), cos, sin), {}),
        "rope_write": (
            (q.clone(), k, cos, sin, torch.zeros(9, 2, 8)),
            {"v": v, "v_out": torch.zeros(9, 2, 8), "slots": ints(8, 0, 1, -1, 3, 4, 5)},
        ),
        "rms_norm": ((x, weight, 1e-6), {}),
        "add_rms_norm": ((x, torch.randn(5, 16), weight, 1e-6), {}),
        "swiglu": ((x, torch.randn(5, 16)), {}),
        "patchify": (
            (torch.randint(0, 256, (28, 56, 3), dtype=torch.uint8), [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]),
            {},
        ),
    }


@pytest.fixture
def poison() -> None:
    """Not here: opcheck runs an op several times and compares, uninitialised numbers have no part in it."""


def test_every_op_has_a_sample() -> None:
    assert sorted(OPS) == sorted(samples())


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str) -> None:
    args, kwargs = samples()[name]
    torch.library.opcheck(getattr(torch.ops.glimpse, name).default, args, kwargs)


def test_values() -> None:
    calls = samples()
    (x, residual, weight, eps), _ = calls["add_rms_norm"]
    twin = residual.clone()
    got = torch.ops.glimpse.add_rms_norm(x, residual, weight, eps)
    assert torch.equal(got, gk.rms_norm(x, weight, eps, residual=twin)) and torch.equal(residual, twin)
    (q, k, v, cu, _), _ = calls["attention"]
    out, lse = torch.ops.glimpse.attention(q, k, v, cu, cu, causal=True)
    want, want_lse = gk.attention(q, k, v, cu, cu, causal=True, return_lse=True)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    args, kwargs = calls["select_tokens"]
    keep, counts, index, cu_out = torch.ops.glimpse.select_tokens(*args, **kwargs)
    selection = gk.select_tokens(*args, **kwargs)
    for got, want in zip((keep, counts, index, cu_out), vars(selection).values(), strict=True):
        assert torch.equal(got, want)


def test_an_error_keeps_its_words() -> None:
    with pytest.raises(ValueError, match="swiglu: up"):
        torch.ops.glimpse.swiglu(torch.zeros(3, 4), torch.zeros(3, 5))


def test_compile_without_a_graph_break() -> None:
    ops = torch.ops.glimpse

    def block(x: Tensor, residual: Tensor, weight: Tensor, up: Tensor) -> Tensor:
        h = ops.add_rms_norm(x, residual, weight, 1e-6)
        return ops.swiglu(h, up) + residual

    (x, residual, weight, _), _ = samples()["add_rms_norm"]
    up = torch.randn(5, 16)
    twin = residual.clone()
    want = block(x, twin, weight, up)
    got = torch.compile(block, backend="aot_eager", fullgraph=True)(x, residual, weight, up)
    assert torch.equal(got, want) and torch.equal(residual, twin)

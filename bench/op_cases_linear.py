# SPDX-License-Identifier: Apache-2.0
"""The measured rows of the matrix products, few rows and many, plain and 8-bit; see `bench.op_cases`.

Few rows stream the weights, and in a model nothing of them is in a cache: every contender goes round as many copies of its
weights as do not fit there. Such rows count bytes, the others FLOPs.

Plain torch gets one product of the weights laid together where ours takes them apart, and besides `F.linear` the layout that
oneDNN packs before. For 8 bits it has `_weight_int8pack_mm`, which knows one scale a row: so all scales of a row are equal
here (and fit bf16), which ours does not know, and both compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

import glimpse_kernels as kernels
from bench.ceilings import prepacked
from bench.op_cases import nbytes
from bench.op_registry import REGISTRY, Results, Sizes, Work
from bench.timing import cache_bytes
from glimpse_kernels.linear.naive import gated_linear as naive_gated
from glimpse_kernels.linear.naive import linear as naive_linear
from glimpse_kernels.linear.weights import INT8_GROUP, Int8Weight

STREAMED = 16  # rows up to which a product is bound by reading its weights
MOST_COPIES = 64

Weight = Tensor | Int8Weight
Plain = Callable[[Tensor], Tensor]
T = TypeVar("T")

ROWS: dict[str, Callable[[Sizes], int]] = {
    "1 row": lambda s: 1,
    "4 rows": lambda s: 4,
    "16 rows": lambda s: STREAMED,
    "kept rows": lambda s: s.kept,
    "all rows": lambda s: s.rows,
}


def _turns(things: Sequence[T]) -> Callable[[], T]:
    """Gives one after the other, round and round."""
    return cycle(things).__next__


def _copies(rows: int, size: int) -> int:
    return min(MOST_COPIES, 2 + 2 * cache_bytes() // size) if rows <= STREAMED else 1


def _matrix(outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(outputs, inputs) / inputs**0.5).to(dtype)


def _int8(outputs: int, inputs: int) -> Int8Weight:
    values = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    scales = (torch.rand(outputs, 1) + 0.5).div_(74 * inputs**0.5).bfloat16().float()
    return Int8Weight(values, scales.repeat(1, -(-inputs // INT8_GROUP)), INT8_GROUP)


def _again(weight: Weight) -> Weight:
    if isinstance(weight, Int8Weight):
        return Int8Weight(weight.values.clone(), weight.scales.clone(), weight.group)
    return weight.clone()


def _exact(weight: Weight) -> Tensor:
    """In double precision, inside `bench.gate`."""
    return weight.dequantize(torch.float64) if isinstance(weight, Int8Weight) else weight.float()


def _size(weights: Sequence[Weight]) -> int:
    return sum(w.nbytes for w in weights)


def _dense(weight: Tensor, bias: Tensor | None) -> Plain:
    return lambda x: F.linear(x, weight, bias)


def _plain_products(
    weights: Sequence[Weight], bias: Tensor | None, rows: int, dtype: torch.dtype, copies: int
) -> dict[str, Callable[[], Plain]]:
    """torch's products with the weights laid together, by name; each call gives the next copy's."""
    if isinstance(weights[0], Int8Weight):
        parts = [w for w in weights if isinstance(w, Int8Weight)]
        values = torch.cat([w.values for w in parts])
        scales = torch.cat([w.scales[:, 0] for w in parts]).to(dtype)
        wide = torch.cat([w.dequantize(dtype) for w in parts])
        bytes_held = [values.clone() for _ in range(copies)]

        def int8(held: Tensor) -> Plain:
            def product(x: Tensor) -> Tensor:
                y = torch._weight_int8pack_mm(x, held, scales)
                return y if bias is None else y.add_(bias)

            return product

        plains = [wide.clone() for _ in range(copies)]
        return {
            "int8pack_mm": _turns([int8(held) for held in bytes_held]),
            "F.linear, widened before": _turns([_dense(held, bias) for held in plains]),
        }
    laid = torch.cat([w for w in weights if isinstance(w, Tensor)])
    copied = [laid.clone() for _ in range(copies)]
    found = {"F.linear": _turns([_dense(held, bias) for held in copied])}
    packed = [p for w in copied if (p := prepacked(w, rows, bias)) is not None]
    return found | ({"oneDNN, packed before": _turns(packed)} if packed else {})


def _work(
    rows: int,
    dtype: torch.dtype,
    weights: Sequence[Weight],
    bias: Tensor | None,
    ours: Callable[[Tensor, Sequence[Weight]], Results],
    finish: Callable[[Tensor], Results],
    truth: Callable[[Tensor], Results],
    results: int,
) -> Work:
    """ours(x, weights) → results; finish turns the one wide product of plain torch into the same; `results` values a row."""
    inputs = weights[0].shape[1]
    x = torch.randn(rows, inputs).to(dtype)
    copies = _copies(rows, _size(weights))
    own = _turns([[_again(w) for w in weights] for _ in range(copies)])
    plains = _plain_products(weights, bias, rows, dtype, copies)
    timed = {name: (lambda turn=turn: finish(turn()(x))) for name, turn in plains.items()}
    first = next(iter(timed))
    plain = timed.pop(first)
    moved = (
        _size(weights) + nbytes(x) + rows * results * x.element_size() + (0 if bias is None else nbytes(bias))
    )
    outputs = sum(w.shape[0] for w in weights)
    streamed = rows <= STREAMED
    return Work(
        lambda: ours(x, own()),
        plain,
        lambda: truth(x),
        moved if streamed else 2.0 * rows * inputs * outputs,
        "byte" if streamed else "flop",
        plain_name=first,
        others=timed,
    )


def _linear(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype, *, int8: bool = False, gelu: bool = False
) -> Work:
    weight: Weight = _int8(outputs, inputs) if int8 else _matrix(outputs, inputs, dtype)
    bias = torch.randn(outputs).to(dtype) if gelu else None
    activation = "gelu" if gelu else None
    return _work(
        rows, dtype, [weight], bias,
        lambda x, w: (kernels.linear(x, w[0], bias, activation=activation),),
        lambda y: (F.gelu(y) if gelu else y,),
        lambda x: (naive_linear(x.float(), _exact(weight), bias, activation=activation),),
        outputs,
    )  # fmt: skip


def _group(rows: int, s: Sizes, dtype: torch.dtype, *, int8: bool = False) -> Work:
    """Queries, keys and values, with biases."""
    outputs = [s.heads * s.dim, s.kv_heads * s.dim, s.kv_heads * s.dim]
    weights: list[Weight] = [_int8(n, s.hidden) if int8 else _matrix(n, s.hidden, dtype) for n in outputs]
    bias = torch.randn(sum(outputs)).to(dtype)
    biases = bias.split(outputs)
    return _work(
        rows, dtype, weights, bias,
        lambda x, w: kernels.linear_group(x, w, biases),
        lambda y: y.split(outputs, dim=1),
        lambda x: tuple(naive_linear(x.float(), _exact(w), b) for w, b in zip(weights, biases, strict=True)),
        sum(outputs),
    )  # fmt: skip


def _group_int8(rows: int, s: Sizes, dtype: torch.dtype) -> Work:
    return _group(rows, s, dtype, int8=True)


def _gated(
    rows: int, inner: int, hidden: int, dtype: torch.dtype, *, int8: bool = False, biased: bool = False
) -> Work:
    weights: list[Weight] = [
        _int8(inner, hidden) if int8 else _matrix(inner, hidden, dtype) for _ in range(2)
    ]
    bias = torch.randn(2 * inner).to(dtype) if biased else None
    gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2)

    def finish(y: Tensor) -> Results:
        gate, up = y.chunk(2, dim=1)
        return (F.silu(gate).mul_(up),)

    return _work(
        rows, dtype, weights, bias,
        lambda x, w: (kernels.gated_linear(x, w[0], w[1], gate_bias, up_bias),),
        finish,
        lambda x: (naive_gated(x.float(), _exact(weights[0]), _exact(weights[1]), gate_bias, up_bias),),
        inner,
    )  # fmt: skip


def _register() -> None:
    """The rows of every op, in the order of the table."""
    Built = Callable[[int, Sizes, torch.dtype], Work]

    def add(op: str, what: str, count: Callable[[Sizes], int], build: Built) -> None:
        REGISTRY.add(op, what)(lambda s, dtype: build(count(s), s, dtype))

    def down(rows: int, s: Sizes, dtype: torch.dtype) -> Work:
        return _linear(rows, s.hidden, s.inner, dtype)

    def down_int8(rows: int, s: Sizes, dtype: torch.dtype) -> Work:
        return _linear(rows, s.hidden, s.inner, dtype, int8=True)

    def vision_down(rows: int, s: Sizes, dtype: torch.dtype) -> Work:
        return _linear(rows, s.vision_hidden, s.vision_inner, dtype)

    def merger(rows: int, s: Sizes, dtype: torch.dtype) -> Work:
        return _linear(rows, 4 * s.vision_hidden, 4 * s.vision_hidden, dtype, gelu=True)

    def gated(rows: int, s: Sizes, dtype: torch.dtype) -> Work:
        return _gated(rows, s.inner, s.hidden, dtype)

    def gated_int8(rows: int, s: Sizes, dtype: torch.dtype) -> Work:
        return _gated(rows, s.inner, s.hidden, dtype, int8=True)

    def vision_gated(rows: int, s: Sizes, dtype: torch.dtype) -> Work:
        return _gated(rows, s.vision_inner, s.vision_hidden, dtype, biased=True)

    for name, count in ROWS.items():
        add("linear", f"down, {name}", count, down)
    for name, count in ROWS.items():
        add("linear", f"down int8, {name}", count, down_int8)
    add("linear", "vision, down", lambda s: s.patches, vision_down)
    add("linear", "vision, merger + gelu", lambda s: s.image, merger)
    for name, count in ROWS.items():
        add("linear_group", f"q, k, v, {name}", count, _group)
    add("linear_group", "q, k, v int8, 1 row", lambda s: 1, _group_int8)
    for name, count in ROWS.items():
        add("gated_linear", name, count, gated)
    add("gated_linear", "int8, 1 row", lambda s: 1, gated_int8)
    add("gated_linear", "vision", lambda s: s.patches, vision_gated)


_register()

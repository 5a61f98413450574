# SPDX-License-Identifier: Apache-2.0
"""Matrix products with the weights of a layer, one row or thousands, and what follows them at once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from glimpse_kernels import _tensors as check
from glimpse_kernels import dispatch
from glimpse_kernels.linear.weights import INT8_GROUP, Int8Weight, Weight, quantize_int8

__all__ = ["INT8_GROUP", "Int8Weight", "Weight", "gated_linear", "linear", "linear_group", "quantize_int8"]

ACTIVATIONS = (None, "gelu")
MAX_GROUP = 4


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """activation(x weight^T + bias).

    x: [T, K], float32, bfloat16 or (not in C++) float16, last dimension contiguous, row stride free.
    weight: [N, K] of x's dtype, last dimension contiguous, row stride free; or an `Int8Weight`.
    bias: [N] of x's dtype. activation: None or "gelu" (the exact one, with erf). out: [T, N] of x's dtype, row stride
    free, in other memory than x and weight.

    Returns out. Sums, bias and activation are fp32 and are rounded once; where torch multiplies (many rows of plain weights on
    a GPU or on AMX), its GEMM rounds before the activation. The weights are read where they lie: few rows stream them, many
    rows take a block of them at a time into cache.

    Raises TypeError / ValueError for a wrong dtype / shape, UnsupportedError if no backend serves the dtype or device.
    """
    op = "linear"
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation: expected None or 'gelu', found {activation!r}")
    _check_x(op, x)
    _check_part(op, x, "weight", weight, "bias", bias, "out", out)
    serve = dispatch.select(op, x.device, x.dtype, grad=_needs_grad(x, (weight,), (bias,)))
    return serve(x, weight, bias, activation=activation, out=out)


def linear_group(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None] | None = None,
    *,
    outs: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """x weight^T + bias for one to four weights, in one pass: the query, key and value projections of a layer.

    x, and each of weights, biases and outs: as for `linear`; the weights need not lie together, and are all plain or all
    `Int8Weight` of one group size. Where torch multiplies on a GPU, weights that are runs of rows of one matrix (biases of one
    vector, outs of columns) in this order are one product.

    Returns the products as a tuple.

    Raises TypeError / ValueError for a wrong dtype / shape, UnsupportedError if no backend serves the dtype or device.
    """
    op = "linear_group"
    if not 1 <= len(weights) <= MAX_GROUP:
        raise ValueError(f"{op}: weights: expected 1 to {MAX_GROUP} of them, found {len(weights)}")
    for name, given in (("biases", biases), ("outs", outs)):
        if given is not None and len(given) != len(weights):
            raise ValueError(
                f"{op}: {name}: expected {len(weights)} of them, one a weight, found {len(given)}"
            )
    _check_x(op, x)
    for i, weight in enumerate(weights):
        bias = None if biases is None else biases[i]
        out = None if outs is None else outs[i]
        _check_part(op, x, f"weights[{i}]", weight, f"biases[{i}]", bias, f"outs[{i}]", out)
    _check_alike(op, weights)
    serve = dispatch.select(op, x.device, x.dtype, grad=_needs_grad(x, weights, biases or ()))
    return serve(x, weights, biases, outs=outs)


def gated_linear(
    x: Tensor,
    gate: Weight,
    up: Weight,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    room: Tensor | None = None,
) -> Tensor:
    """silu(x gate^T + gate_bias) * (x up^T + up_bias): the first half of a gated MLP (Shazeer, arXiv:2002.05202, section 2).

    x, gate and up ([N, K] both), their biases and out: as for `linear`. Neither product is stored, but where torch multiplies.
    Halves of one matrix, the gate's rows first, then are one product.
    room: [T, 2 N] of x's dtype, contiguous, apart from x and the weights, where stored products may go instead of to new memory;
    out may be its first N columns, or any other memory.

    Returns out. Raises TypeError / ValueError for a wrong dtype / shape, UnsupportedError if no backend serves.
    """
    op = "gated_linear"
    _check_x(op, x)
    _check_part(op, x, "gate", gate, "gate_bias", gate_bias, "out", out)
    _check_part(op, x, "up", up, "up_bias", up_bias, "out", out)
    _check_alike(op, (gate, up))
    if gate.shape != up.shape:
        raise ValueError(f"{op}: up: expected gate's shape {list(gate.shape)}, found {list(up.shape)}")
    if room is not None:
        check.expect_tensor(op, "room", room)
        check.expect_dtype(op, "room", room, x.dtype)
        check.expect_shape(op, "room", room, (x.shape[0], 2 * gate.shape[0]), "[T, 2 N]")
        check.expect_contiguous(op, "room", room)
        check.expect_same_device(op, x.device, room=room)
    serve = dispatch.select(op, x.device, x.dtype, grad=_needs_grad(x, (gate, up), (gate_bias, up_bias)))
    return serve(x, gate, up, gate_bias, up_bias, out=out, room=room)


def _check_x(op: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        check.expect_tensors(op, x=x)
    if x.dim() != 2 or x.stride(1) != 1:
        check.expect_shape(op, "x", x, (None, None), "[T, K]")
        check.expect_last_contiguous(op, x=x)


def _check_part(
    op: str,
    x: Tensor,
    name: str,
    weight: Weight,
    bias_name: str,
    bias: Tensor | None,
    out_name: str,
    out: Tensor | None,
) -> None:
    rows, depth = x.shape
    if isinstance(weight, Int8Weight):
        matrix = weight.values
    else:
        matrix = weight
        if not isinstance(weight, Tensor):
            raise TypeError(
                f"{op}: {name}: expected a torch.Tensor or an Int8Weight, found {check.describe(weight)}"
            )
        if weight.dtype is not x.dtype:
            check.expect_dtype(op, name, weight, x.dtype)
    if matrix.dim() != 2 or matrix.shape[1] != depth:
        check.expect_shape(op, name, matrix, (None, depth), "[N, K]")
    if matrix.stride(1) != 1 and matrix.shape[1] > 1:
        check.expect_last_contiguous(op, **{name: matrix})
    if matrix.device != x.device:
        check.expect_same_device(op, x.device, **{name: matrix})
    if bias is not None and not (
        isinstance(bias, Tensor)
        and bias.dtype is x.dtype
        and bias.device == x.device
        and bias.dim() == 1
        and bias.shape[0] == matrix.shape[0]
        and bias.is_contiguous()
    ):
        check.expect_tensor(op, bias_name, bias)
        check.expect_dtype(op, bias_name, bias, x.dtype)
        check.expect_shape(op, bias_name, bias, (matrix.shape[0],), "[N]")
        check.expect_contiguous(op, bias_name, bias)
        check.expect_same_device(op, x.device, **{bias_name: bias})
    if out is not None:
        check.expect_tensor(op, out_name, out)
        check.expect_dtype(op, out_name, out, x.dtype)
        check.expect_shape(op, out_name, out, (rows, matrix.shape[0]), "[T, N]")
        check.expect_last_contiguous(op, **{out_name: out})
        check.expect_same_device(op, x.device, **{out_name: out})


def _check_alike(op: str, weights: Sequence[Weight]) -> None:
    kinds = {w.group if isinstance(w, Int8Weight) else None for w in weights}
    if len(kinds) > 1:
        found = ", ".join("plain" if k is None else f"int8 in groups of {k}" for k in sorted(kinds, key=str))
        raise ValueError(f"{op}: weights: expected all plain or all int8 of one group size, found {found}")


def _needs_grad(x: Tensor, weights: Sequence[Weight], biases: Sequence[Tensor | None]) -> bool:
    plain = (w for w in weights if isinstance(w, Tensor))
    return check.needs_grad(x, *plain, *biases)

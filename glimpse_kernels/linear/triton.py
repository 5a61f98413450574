# SPDX-License-Identifier: Apache-2.0
"""`linear`, `linear_group` and `gated_linear` on a GPU: triton_kernels.py where the weights are streamed or 8-bit, torch's
GEMM otherwise.

Few rows: the time is that of reading the weights. To keep a memory of 4.8 TB/s with a latency near a microsecond busy, about
5 MB must be on their way, 40 KiB a multiprocessor: programs times `stages` - 1 tiles. The tables below follow from that:
few outputs a program where a matrix has few, more where it has many, as every program reads x again, from the L2 cache.
For one row, 3584 x 3584 in bf16 are 448 programs that have up to five tiles of 8 x 512 bytes on their way, 9 MB; a warp spends
some 150 instructions on the 2 KiB that are its share, twice as fast as memory brings them. For several rows they are 112
programs with seven tiles of 32 x 256 bytes, 6 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from glimpse_kernels import _triton
from glimpse_kernels.linear.torch_gemm import one_below_the_other, torch_linear, torch_linear_group
from glimpse_kernels.linear.triton_kernels import GATED, GELU, NONE, linear_row_kernel, linear_tile_kernel
from glimpse_kernels.linear.weights import Int8Weight, Weight
from glimpse_kernels.swiglu.triton import swiglu

FEW_ROWS = 16
"""Rows that one tile of the tensor cores holds: up to here a product costs what reading the weights costs."""

RUN_BYTES = 16
"""What a thread loads at a time."""


@dataclass(frozen=True)
class Row(_triton.Launch):
    """outputs: of a program, of both matrices together where two are gated."""

    outputs: int = 4


@dataclass(frozen=True)
class Tile(_triton.Launch):
    """outputs: as in `Row`. rows: of x. step: inputs at a time (of 8-bit weights at most what divides a group)."""

    outputs: int = 64
    rows: int = FEW_ROWS
    step: int = 128


STREAMED: _triton.Configs[int] = _triton.Configs(
    "linear_streamed_rows", {(80, "plain"): FEW_ROWS}, candidates=[0, 1, 4, 8, FEW_ROWS]
)
"""Rows up to which plain weights are multiplied here and not by torch."""

ROW: _triton.Configs[Row] = _triton.Configs(
    "linear_row",
    {
        (80, "narrow"): Row(warps=2, stages=6, outputs=4),
        (80, "middle"): Row(warps=2, stages=6, outputs=8),
        (80, "wide"): Row(warps=4, stages=4, outputs=16),
    },
    candidates=[Row(w, s, n) for w in (1, 2, 4, 8) for s in (3, 4, 6, 8) for n in (2, 4, 8, 16, 32)],
)
"""By the number of outputs, see `_width`."""

TILE: _triton.Configs[Tile] = _triton.Configs(
    "linear_tile",
    {
        (80, ("plain", "narrow")): Tile(warps=4, stages=6, outputs=16, step=256),
        (80, ("plain", "middle")): Tile(warps=4, stages=8, outputs=32),
        (80, ("plain", "wide")): Tile(warps=4, stages=4, outputs=64),
        (80, ("int8", "narrow")): Tile(warps=4, stages=8, outputs=16),
        (80, ("int8", "middle")): Tile(warps=4, stages=10, outputs=32),
        (80, ("int8", "wide")): Tile(warps=4, stages=6, outputs=64),
        (80, ("int8", "many rows")): Tile(warps=4, stages=3, outputs=64, rows=64, step=64),
        (80, ("int8", "most rows")): Tile(warps=8, stages=3, outputs=128, rows=64, step=64),
        (90, ("int8", "most rows")): Tile(warps=8, stages=3, outputs=128, rows=128, step=64),
        (100, ("int8", "most rows")): Tile(warps=8, stages=3, outputs=128, rows=64, step=64),
        (80, ("fp32", "few rows")): Tile(warps=4, stages=3, outputs=32, step=32),
        (80, ("fp32", "many rows")): Tile(warps=4, stages=3, outputs=32, rows=32, step=32),
    },
    candidates=[
        Tile(w, s, n, r, k)
        for w in (4, 8)
        for s in (3, 4, 6, 8)
        for n in (16, 32, 64, 128)
        for r in (FEW_ROWS, 64, 128)
        for k in (64, 128, 256)
    ],
)
"""By the kind of weights (fp32: that x is) and the number of outputs; for more than `FEW_ROWS`, "most rows" where there are
tiles enough for all multiprocessors."""


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `glimpse_kernels.linear`; arguments are checked there."""
    if _torch_multiplies(x, weight):
        assert isinstance(weight, Tensor)
        return torch_linear(x, weight, bias, activation, out)
    if out is None:
        out = x.new_empty(x.shape[0], weight.shape[0])
    _run(x, (weight,), (bias,), (out,), GELU if activation == "gelu" else NONE)
    return out


def linear_group(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None] | None = None,
    *,
    outs: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """See `glimpse_kernels.linear_group`; arguments are checked there."""
    given = (None,) * len(weights) if biases is None else biases
    if _torch_multiplies(x, weights[0]):
        return torch_linear_group(x, [w for w in weights if isinstance(w, Tensor)], biases, outs)
    if outs is None:
        outs = [x.new_empty(x.shape[0], w.shape[0]) for w in weights]
    _run(x, weights, given, outs, NONE)
    return tuple(outs)


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
    """See `glimpse_kernels.gated_linear`; arguments are checked there."""
    if _torch_multiplies(x, gate):
        assert isinstance(gate, Tensor) and isinstance(up, Tensor)
        with torch.no_grad():
            laid, bias = one_below_the_other((gate, up)), None
            if gate_bias is not None and up_bias is not None:
                bias = one_below_the_other((gate_bias, up_bias))
            if laid is not None and (bias is None) == (gate_bias is None and up_bias is None):
                return swiglu(*torch_linear(x, laid, bias, None, room).chunk(2, dim=1), out=out)
            halves = (None, None) if room is None else room.chunk(2, dim=1)
            opened = torch_linear(x, gate, gate_bias, None, halves[0])
            return swiglu(
                opened, torch_linear(x, up, up_bias, None, halves[1]), out=opened if out is None else out
            )
    if out is None:
        out = x.new_empty(x.shape[0], gate.shape[0])
    _run(x, (gate, up), (gate_bias, up_bias), (out,), GATED)
    return out


def _torch_multiplies(x: Tensor, weight: Weight) -> bool:
    """Many rows of plain weights: nothing is gained over cuBLAS there."""
    if isinstance(weight, Int8Weight):
        return False
    return x.shape[0] > STREAMED.pick(_triton.chip(x.device).capability, "plain")


def _width(outputs: int) -> str:
    """How many outputs there are beside the multiprocessors that have to be kept busy."""
    return "narrow" if outputs < 2560 else "middle" if outputs < 8192 else "wide"


def _padded(things: Sequence[object], filler: object) -> tuple[object, ...]:
    return (*things, *(filler,) * (4 - len(things)))


def _run(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    outs: Sequence[Tensor],
    epilogue: int,
) -> None:
    rows, depth = x.shape
    sizes = [out.shape[1] for out in outs]
    if not rows or not any(sizes):
        return
    group = weights[0].group if isinstance(weights[0], Int8Weight) else 0
    matrices = [w.values if isinstance(w, Int8Weight) else w for w in weights]
    strides = [m.stride(0) for m in matrices]
    some_bias = next((b for b in biases if b is not None), x)
    tensors = (
        *_padded(matrices, matrices[0]),
        *_padded([w.scales if isinstance(w, Int8Weight) else None for w in weights], None),
        *_padded([some_bias if b is None else b for b in biases], some_bias),
        *_padded(outs, outs[0]),
        *_padded(sizes, 0),
        *_padded(strides, strides[0]),
    )
    meta = {
        "GROUP": group,
        "PARTS": len(outs),
        "BIASES": sum(1 << i for i, b in enumerate(biases) if b is not None),
        "EPILOGUE": epilogue,
    }
    chip = _triton.chip(x.device)
    capability = chip.capability
    sharing = 2 if epilogue == GATED else 1
    width = _width(sharing * sum(sizes))
    if rows == 1:
        row = ROW.pick(capability, width)
        block = max(row.outputs // sharing, 1)
        linear_row_kernel[(sum(triton.cdiv(n, block) for n in sizes),)](
            x,
            *tensors,
            depth,
            **meta,
            BLOCK=block,
            RUN=RUN_BYTES // matrices[0].element_size(),
            STAGES=row.stages,
            num_warps=row.warps,
        )
        return
    few = rows <= FEW_ROWS
    if x.dtype is torch.float32:
        key = ("fp32", "few rows" if few else "many rows")
    elif group:
        key = ("int8", width if few else "many rows")
    else:
        key = ("plain", width)
    tile = TILE.pick(capability, key)
    if key == ("int8", "many rows"):
        larger = TILE.pick(capability, ("int8", "most rows"))
        tiles = triton.cdiv(rows, larger.rows) * triton.cdiv(sharing * sum(sizes), larger.outputs)
        tile = larger if tiles >= chip.multiprocessors else tile
    block = max(tile.outputs // sharing, 16)
    blocks = sum(triton.cdiv(n, block) for n in sizes) * triton.cdiv(rows, tile.rows)
    out_strides = [out.stride(0) for out in outs]
    linear_tile_kernel[(blocks,)](
        x,
        *tensors,
        *_padded(out_strides, out_strides[0]),
        x.stride(0),
        rows,
        depth,
        **meta,
        BLOCK=block,
        ROWS=tile.rows,
        STEP=min(tile.step, group & -group) if group else tile.step,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )

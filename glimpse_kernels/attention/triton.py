# SPDX-License-Identifier: Apache-2.0
"""`attention` in Triton: which kernel, which tiles, which loads. The kernels are in `triton_kernels.py`.

FlashAttention-2 (Dao, arXiv:2307.08691, section 3.1) and, for few query rows, its split over the keys (Flash-Decoding). The
decisions, and why:

- The host never learns a length. The grid covers a bound of the number of query tiles, rows / BLOCK_M + segments, and a
  program finds its (segment, tile) by counting over `cu_seqlens_q`: tile `i` of segment `b` has the number
  cu[b] // BLOCK_M + b + i, which needs no prefix sum and is never given twice. A launch serves one long segment and hundreds
  of windows alike; with one segment, or `max_seqlen_q`, even the counting is unnecessary.
- The query heads that share a key head are rows of one tile (row = token * group + head). One glimpse row with 7 or 8 heads a
  key head reads each key once instead of 7 or 8 times, and in a causal prefill a tile spans fewer tokens, so less of its
  diagonal is thrown away.
- Head sizes between powers of two are two parts (80 = 64 + 16), each with its own product and accumulator.
- Key blocks that every row of the tile sees run without masks; those behind the last visible key are not visited.
- The running maximum is kept of the raw products and subtracted before they are scaled. One fused multiply-add would do both,
  but its rounding of maximum * scale overflows the exponential from logits of about 1e9 on. For that the factor has to be
  positive: the sign of `scale` goes into q.
- Few rows against many keys: fixed chunks of keys, then a second kernel that adds the chunks in their order. The length of a
  chunk is a constant, not a share of the machine: the result of a row does not depend on the GPU's size, and on its neighbours
  only in that the average of all segments decides whether the keys are split, which is a matter of rounding.
- Tensor descriptors (TMA) for k and v from capability 9.0 on, except for windows, which are one tile. The block that a segment
  ends in has its values read by plain loads, with a mask: what lies behind may be NaN, and a weight of 0 does not hide that.
  q is read once and by plain loads.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from glimpse_kernels import _triton
from glimpse_kernels.attention.triton_kernels import (
    attention_combine_kernel,
    attention_kernel,
    attention_split_kernel,
)


@dataclass(frozen=True)
class Tiles(_triton.Launch):
    """block_m: rows (tokens times heads of a group) and block_n: keys of a tile."""

    block_m: int = 128
    block_n: int = 64


SIZES = ((64, 64), (80, 80), (128, 128), (192, 64), (256, 256))
"""(D, Dv) with configurations of their own; others take the first that holds them."""

_D64, _D80, _D128, _D192, _D256 = SIZES


def _table(
    capability: int, itemsize: int, tiles: Mapping[tuple[int, int], Tiles]
) -> dict[tuple[int, Hashable], Tiles]:
    return {(capability, (size, itemsize)): config for size, config in tiles.items()}


_FP32 = {
    **dict.fromkeys((_D64, _D80, _D128, _D192), Tiles(warps=8, stages=1, block_m=32, block_n=32)),
    _D256: Tiles(warps=8, stages=1, block_m=32, block_n=16),
}
"""fp32 products in full precision run on the ordinary units: what counts is that nothing spills."""

TILES = _triton.Configs[Tiles](
    "attention",
    {
        **_table(80, 4, _FP32),
        **_table(
            80,
            2,
            {
                _D64: Tiles(warps=8, stages=3, block_m=128, block_n=64),
                _D80: Tiles(warps=8, stages=2, block_m=128, block_n=64),
                _D128: Tiles(warps=8, stages=3, block_m=128, block_n=32),
                _D192: Tiles(warps=8, stages=2, block_m=128, block_n=32),
                _D256: Tiles(warps=8, stages=1, block_m=64, block_n=32),
            },
        ),
        **_table(
            90,
            2,
            {
                _D64: Tiles(warps=8, stages=3, block_m=128, block_n=128),
                _D80: Tiles(warps=8, stages=3, block_m=128, block_n=128),
                _D128: Tiles(warps=8, stages=2, block_m=128, block_n=128),
                _D192: Tiles(warps=8, stages=2, block_m=128, block_n=128),
                _D256: Tiles(warps=8, stages=2, block_m=64, block_n=32),
            },
        ),
        **_table(100, 2, {_D128: Tiles(warps=8, stages=3, block_m=128, block_n=64)}),
    },
    candidates=[
        Tiles(warps=8, stages=stages, block_m=128, block_n=n) for n in (32, 64, 128) for stages in (2, 3, 4)
    ] + [Tiles(warps=4, stages=stages, block_m=64, block_n=n) for n in (32, 64) for stages in (2, 3)],
)  # fmt: skip

SHORT = _triton.Configs[Tiles](
    "attention, short segments",
    {
        **_table(80, 4, _FP32),
        **_table(
            80,
            2,
            {
                **dict.fromkeys((_D64, _D80), Tiles(warps=4, stages=1, block_m=64, block_n=64)),
                **dict.fromkeys((_D128, _D192), Tiles(warps=4, stages=1, block_m=64, block_n=32)),
                _D256: Tiles(warps=8, stages=1, block_m=64, block_n=32),
            },
        ),
        # Two stages have the only key block of a window on its way, values too, before the first product waits.
        **_table(90, 2, dict.fromkeys((_D64, _D80), Tiles(warps=4, stages=2, block_m=64, block_n=64))),
        **_table(90, 2, dict.fromkeys((_D128, _D192), Tiles(warps=4, stages=1, block_m=64, block_n=64))),
    },
    candidates=[
        Tiles(warps=w, stages=s, block_m=64, block_n=n) for w in (4, 8) for s in (1, 2) for n in (32, 64)
    ],
)
"""For segments of at most `SHORT_ROWS` rows: vision windows, whose one tile is 64 x 64."""

SPLIT = _triton.Configs[Tiles](
    "attention, split over the keys",
    {
        **_table(80, 4, _FP32),
        **_table(
            80, 4, dict.fromkeys((_D64, _D80, _D128, _D192), Tiles(warps=8, stages=1, block_m=16, block_n=32))
        ),
        **_table(
            80,
            2,
            {
                **dict.fromkeys((_D64, _D80), Tiles(warps=4, stages=2, block_m=64, block_n=64)),
                **dict.fromkeys((_D128, _D192), Tiles(warps=4, stages=2, block_m=32, block_n=32)),
                _D256: Tiles(warps=8, stages=1, block_m=64, block_n=32),
            },
        ),
        **_table(90, 2, dict.fromkeys((_D64, _D80), Tiles(warps=4, stages=3, block_m=64, block_n=64))),
        **_table(90, 2, dict.fromkeys((_D128, _D192), Tiles(warps=8, stages=3, block_m=64, block_n=64))),
        **_table(100, 2, dict.fromkeys((_D128, _D192), Tiles(warps=8, stages=2, block_m=64, block_n=64))),
    },
    candidates=[Tiles(warps=4, stages=s, block_m=64, block_n=n) for n in (32, 64, 128) for s in (2, 3, 4)],
)
"""block_n is that of `SHORT`: the keys are taken in the same blocks, split or not."""

SHORT_ROWS = 64
"""Rows of a segment (on average, if nobody gave the maximum) up to which `SHORT` serves."""

CHUNK = 256
"""Keys of one program of the split kernel, a multiple of every block_n: part of the arithmetic, so not tuned by machine."""

SPLIT_ROWS = 32
"""Rows of a segment, on average, up to which the keys are split."""

SPLIT_RATIO = 8
"""Keys for each query from which they are split: windows have as many keys as queries."""

SCRATCH_LIMIT = 1 << 28
"""Bytes of partial sums from which the keys are not split: so many rows fill the GPU anyway."""

PLAIN = 80
"""Capability whose configurations serve where descriptors cannot: plain loads need more registers for addresses."""


def size_key(dim: int, v_dim: int) -> tuple[int, int]:
    """The entry of `SIZES` for these head sizes. ValueError above 256."""
    for size in SIZES:
        if dim <= size[0] and v_dim <= size[1]:
            return size
    raise ValueError(f"attention: q, v: expected head dimensions of at most 256, found {dim} and {v_dim}")


def _describable(t: Tensor) -> bool:
    """Whether the hardware's tile loads take this [T, H, D] tensor: aligned rows and heads, nothing empty or broadcast."""
    size = t.element_size()
    row, head, last = t.stride()
    return (
        t.numel() > 0
        and last == 1
        and t.data_ptr() % 16 == 0
        and row * size % 16 == 0
        and head * size % 16 == 0
        and row > 0
        and head > 0
    )


def _descriptors(t: Tensor, rows: int) -> list[TensorDescriptor | None]:
    """Of tiles of so many rows of one head of a [T, H, D] tensor, one for each part of D; each costs the host microseconds."""
    first, second = _triton.parts(t.shape[2])
    shape, strides = list(t.shape), list(t.stride())
    one = TensorDescriptor(t, shape, strides, [rows, 1, first])
    return [one, TensorDescriptor(t, shape, strides, [rows, 1, second]) if second else None]


def _search_block(segments: int) -> int:
    """Bounds loaded at once while counting segments; few values, since each is a kernel of its own."""
    return 16 if segments < 16 else 128 if segments < 128 else 1024


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    q_positions: Tensor | None = None,
    max_seqlen_q: int | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `glimpse_kernels.attention`; arguments are checked there. Head dimensions up to 256 (ValueError)."""
    q_rows, q_heads, dim = q.shape
    k_rows, heads, v_dim = v.shape
    if v_dim == 0:  # nothing to weigh, but lse may be wanted
        _, lse = attention(
            q, k, k, cu_seqlens_q, cu_seqlens_k, causal=causal, scale=scale, q_positions=q_positions,
            max_seqlen_q=max_seqlen_q, return_lse=True,
        )  # fmt: skip
        out = q.new_empty(q_rows, q_heads, 0) if out is None else out
        return (out, lse) if return_lse else out
    if out is None:
        out = torch.empty((q_rows, q_heads, v_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((q_rows, q_heads), dtype=torch.float32, device=q.device) if return_lse else None
    if q_rows == 0 or q_heads == 0:
        return out if lse is None else (out, lse)

    chip = _triton.chip(q.device)
    segments = cu_seqlens_q.shape[0] - 1
    group = q_heads // heads
    itemsize = q.element_size()
    size = size_key(dim, v_dim)
    scale = dim**-0.5 if scale is None else scale
    longest = q_rows if max_seqlen_q is None or segments <= 1 else max(1, min(max_seqlen_q, q_rows))
    known = segments == 1 or max_seqlen_q is not None  # `longest` bounds each segment closely
    few = q_rows * group <= SPLIT_ROWS * segments and k_rows >= SPLIT_RATIO * q_rows and k_rows > CHUNK
    slots = k_rows // CHUNK + segments
    few = few and 4 * slots * longest * q_heads * v_dim <= SCRATCH_LIMIT
    short = not few and (longest if known else q_rows / max(segments, 1)) * group <= SHORT_ROWS
    described = (
        not short
        and chip.capability >= _triton.HOPPER
        and itemsize == 2
        and _describable(k)
        and _describable(v)
    )
    configs = SPLIT if few else SHORT if short else TILES
    tiles = configs.pick(
        chip.capability if described or short else min(chip.capability, PLAIN), (size, itemsize)
    )
    sources = (
        (*_descriptors(k, tiles.block_n), *_descriptors(v, tiles.block_n)) if described else (k, k, v, v)
    )
    (d0, d1), (v0, v1) = _triton.parts(dim), _triton.parts(v_dim)
    common = dict(
        GROUP=group,
        D=dim,
        DV=v_dim,
        D0=d0,
        D1=d1,
        V0=v0,
        V1=v1,
        CAUSAL=causal,
        POSITIONS=q_positions is not None,
        SIGN=(scale > 0) - (scale < 0),
        DESCRIPTORS=described,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        STAGES=tiles.stages,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    positions = cu_seqlens_q if q_positions is None else q_positions
    inputs = (q, k, v, *sources, positions, cu_seqlens_q, cu_seqlens_k)
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1))
    # 0 is not positive: it is a sign of its own, and any factor will do then
    factor = abs(scale) or 1.0
    if few:
        sums = torch.empty((slots, longest, q_heads, v_dim), dtype=torch.float32, device=q.device)
        logs = torch.empty((slots, longest, q_heads), dtype=torch.float32, device=q.device)
        attention_split_kernel[(slots * heads,)](
            *inputs, sums, logs, *strides, factor * _triton.LOG2E, factor, q_rows, k_rows, segments, longest, heads,
            CHUNK=CHUNK, SEARCH=0 if segments == 1 else _search_block(segments), **common,
        )  # fmt: skip
        attention_combine_kernel[(q_rows * q_heads,)](
            sums, logs, out, out if lse is None else lse, positions, cu_seqlens_q, cu_seqlens_k,
            out.stride(0), out.stride(1), q_rows, k_rows, segments, longest, q_heads,
            DV=v_dim, V=max(16, _triton.power_of_2(v_dim)), CAUSAL=causal, POSITIONS=q_positions is not None,
            LSE=lse is not None, CHUNK=CHUNK, BLOCK=16, SEARCH=_search_block(segments), num_warps=4,
        )  # fmt: skip
        return out if lse is None else (out, lse)

    tiles_each = -(-longest * group // tiles.block_m)
    bound = q_rows * group // tiles.block_m + segments
    # where a close maximum is known, every segment gets so many tiles and nothing is searched
    even = known and segments > 0 and segments * tiles_each <= bound
    grid = segments * tiles_each if even else max(bound, 1)
    attention_kernel[(grid * heads,)](
        *inputs, out, out if lse is None else lse, *strides, out.stride(0), out.stride(1),
        factor * _triton.LOG2E, factor, q_rows, k_rows, segments, heads, grid, tiles_each,
        LSE=lse is not None, SEARCH=0 if even else _search_block(segments), **common,
    )  # fmt: skip
    return out if lse is None else (out, lse)

# SPDX-License-Identifier: Apache-2.0
"""The checks on interpreted launches catch what they are for, and let sound kernels pass.

They are in force in every test of this folder, by a fixture of its conftest.py.
"""

from __future__ import annotations

import pytest
import torch

from glimpse_kernels import _triton

pytestmark = pytest.mark.skipif(
    not _triton.interpreting(), reason="kernels are not interpreted in this process"
)

if _triton.interpreting():
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    from tests.kernels.interpreter_checks import MemoryFault

    @triton.jit
    def shift_kernel(x, out, n, by, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + at, tl.load(x + at + by, mask=at < n, other=0.0), mask=at < n)

    @triton.jit
    def row_kernel(x, out, stride, columns, WIDE: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, WIDE)
        tl.store(
            out + row * stride + at,
            tl.load(x + row * stride + at, mask=at < columns, other=0.0),
            mask=at < columns,
        )

    @triton.jit
    def in_place_kernel(x, source, target, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(x + target + at, tl.load(x + source + at) + 1.0)

    @triton.jit
    def same_place_kernel(out):
        tl.store(out, 1.0)

    @triton.jit
    def lanes_kernel(out, every, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(out + at // every, (at // 2).to(tl.float32))

    @triton.jit
    def own_kernel(x, out, WAIT: tl.constexpr, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(x + at, at.to(tl.float32))
        if WAIT:
            tl.debug_barrier()
        tl.store(out + at, tl.load(x + BLOCK - 1 - at))

    @triton.jit
    def twice_kernel(x, REVERSED: tl.constexpr, WAIT: tl.constexpr, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(x + at, at.to(tl.float32))
        if WAIT:
            tl.debug_barrier()
        tl.store(x + (BLOCK - 1 - at if REVERSED else at), 2.0 * at.to(tl.float32))

    @triton.jit
    def last_collects_kernel(x, parts, arrived, out, ATOMIC: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.program_id(0)
        tl.store(parts + i, tl.sum(tl.load(x + i * BLOCK + tl.arange(0, BLOCK))))
        tl.debug_barrier()
        last = i == tl.num_programs(0) - 1
        if ATOMIC:
            last = tl.atomic_add(arrived, 1) == tl.num_programs(0) - 1
        if last:
            total = 0.0
            for j in range(tl.num_programs(0)):
                total += tl.load(parts + j)
            tl.store(out, total)

    @triton.jit
    def descriptor_kernel(source, out, BLOCK: tl.constexpr):
        row = tl.program_id(0) * BLOCK
        tile = source.load([row, 0])
        at = tl.arange(0, BLOCK)
        tl.store(out + (row + at)[:, None] * BLOCK + at[None, :], tile)

    @triton.jit
    def words_kernel(x, out, by, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        wide = (x + by).to(tl.pointer_type(tl.int64), bitcast=True)
        tl.store(out.to(tl.pointer_type(tl.int64), bitcast=True) + at, tl.load(wide + at))

    @triton.jit
    def tuple_kernel(xs, out, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(out + at, tl.load(xs[0] + at) + tl.load(xs[1] + at))


def test_all_lanes_inside() -> None:
    x = torch.randn(13)
    out = torch.empty(13)
    shift_kernel[(2,)](x, out, 13, 0, BLOCK=8)
    torch.testing.assert_close(out, x)


@pytest.mark.parametrize(
    ("by", "words"), [(1, "0 bytes behind x"), (-1, "4 bytes before x"), (2**40, "bytes behind")]
)
def test_a_load_outside_is_caught_by_one_element(by: int, words: str) -> None:
    x, out = torch.randn(13), torch.empty(13)
    with pytest.raises(
        MemoryFault, match=rf"shift_kernel, program \(\d, 0, 0\): loads 4 bytes outside.*{words}"
    ):
        shift_kernel[(2,)](x, out, 13, by, BLOCK=8)


def test_a_store_outside_is_caught_before_it_happens() -> None:
    wide = torch.zeros(32)
    with pytest.raises(
        MemoryFault, match="stores 4 bytes outside of the tensors in 1 lanes, the first 0 bytes behind out"
    ):
        shift_kernel[(2,)](torch.randn(32), wide[8:15], 8, 0, BLOCK=8)
    assert not wide[8:].any()


def test_the_gap_between_rows_of_a_view_is_outside() -> None:
    wide, out = torch.randn(3, 12), torch.empty(3, 12)
    row_kernel[(3,)](wide, out, 12, 12, WIDE=16)
    row_kernel[(3,)](wide[:, :8], out[:, :8], 12, 8, WIDE=8)
    with pytest.raises(
        MemoryFault, match="loads 4 bytes outside of the tensors in 1 lanes, the first byte 32 of x"
    ):
        row_kernel[(3,)](wide[:, :8], out, 12, 9, WIDE=16)
    with pytest.raises(MemoryFault, match="stores 4 bytes outside of the tensors in 4 lanes"):
        row_kernel[(3,)](wide, out[:, :8], 12, 12, WIDE=16)


def test_views_of_one_buffer_are_told_apart_from_its_gaps() -> None:
    wide = torch.randn(4, 24)
    row_kernel[(4,)](wide[:, :8], wide[:, 8:16], 24, 8, WIDE=8)
    torch.testing.assert_close(wide[:, :8], wide[:, 8:16])
    with pytest.raises(MemoryFault, match="stores 4 bytes outside"):
        row_kernel[(4,)](wide[:, :12], wide[:, 16:20], 24, 12, WIDE=16)


def test_reading_what_another_program_writes_is_caught_in_either_order() -> None:
    x = torch.zeros(24)
    in_place_kernel[(2,)](x, 0, 0, BLOCK=8)
    in_place_kernel[(1,)](x, 8, 0, BLOCK=8)
    with pytest.raises(
        MemoryFault, match=r"program \(0, 0, 0\): reads what another program of the launch writes"
    ):
        in_place_kernel[(2,)](x, 8, 0, BLOCK=8)
    with pytest.raises(
        MemoryFault, match=r"program \(1, 0, 0\): reads what another program of the launch wrote"
    ):
        in_place_kernel[(2,)](x, 0, 8, BLOCK=8)


def test_two_programs_that_store_to_one_place_are_caught() -> None:
    out = torch.zeros(1)
    same_place_kernel[(1,)](out)
    with pytest.raises(MemoryFault, match=r"program \(1, 0, 0\): stores where another program"):
        same_place_kernel[(2,)](out)


def test_lanes_that_disagree_are_caught() -> None:
    lanes_kernel[(1,)](torch.zeros(8), 2, BLOCK=16)
    with pytest.raises(MemoryFault, match="two lanes of one store write different values"):
        lanes_kernel[(1,)](torch.zeros(8), 4, BLOCK=16)


def test_a_missing_barrier_is_caught() -> None:
    x, out = torch.zeros(8), torch.zeros(8)
    own_kernel[(1,)](x, out, WAIT=True, BLOCK=8)
    assert out.tolist() == list(range(7, -1, -1))
    with pytest.raises(MemoryFault, match="reads what it stored itself, without a tl.debug_barrier"):
        own_kernel[(1,)](x, out, WAIT=False, BLOCK=8)


def test_storing_again_needs_the_same_lanes_or_a_barrier() -> None:
    x = torch.zeros(8)
    twice_kernel[(1,)](x, REVERSED=False, WAIT=False, BLOCK=8)
    twice_kernel[(1,)](x, REVERSED=True, WAIT=True, BLOCK=8)
    with pytest.raises(MemoryFault, match="stores where other lanes of it stored"):
        twice_kernel[(1,)](x, REVERSED=True, WAIT=False, BLOCK=8)


def test_an_atomic_operation_orders_programs() -> None:
    x, parts, out = torch.randn(12), torch.zeros(3), torch.zeros(1)
    last_collects_kernel[(3,)](x, parts, torch.zeros(1, dtype=torch.int32), out, ATOMIC=True, BLOCK=4)
    torch.testing.assert_close(out[0], x.sum())
    with pytest.raises(MemoryFault, match="reads what another program of the launch wrote: byte 0 of parts"):
        last_collects_kernel[(3,)](x, parts, torch.zeros(1, dtype=torch.int32), out, ATOMIC=False, BLOCK=4)


def test_tensors_in_descriptors_tuples_and_wrappers_are_known() -> None:
    x = torch.randn(5, 8)
    out = torch.zeros(8, 8)
    descriptor_kernel[(1,)](TensorDescriptor(x, [5, 8], [8, 1], [8, 8]), out, BLOCK=8)
    torch.testing.assert_close(out[:5], x)
    with pytest.raises(
        MemoryFault, match="loads 4 bytes outside of the tensors in 8 lanes, the first 0 bytes behind source"
    ):
        descriptor_kernel[(1,)](TensorDescriptor(x, [6, 8], [8, 1], [8, 8]), out, BLOCK=8)
    tuple_kernel[(1,)]((x[0], x[1]), out[0], BLOCK=8)
    torch.testing.assert_close(out[0], x[0] + x[1])
    with pytest.raises(MemoryFault, match=r"behind xs\[1\]"):
        tuple_kernel[(1,)]((x[0], x[4, :4]), out[0], BLOCK=8)
    tuple_kernel[(1,)](
        (triton.reinterpret(x[0], tl.int32), triton.reinterpret(x[1], tl.int32)), out[0], BLOCK=8
    )


def test_wider_pieces_than_elements() -> None:
    x, out = torch.randn(32).half(), torch.zeros(32).half()
    words_kernel[(1,)](x, out, 0, BLOCK=8)
    assert torch.equal(out, x)
    with pytest.raises(MemoryFault, match="loads 8 bytes outside of the tensors in 1 lanes"):
        words_kernel[(1,)](x[4:], out, 0, BLOCK=8)
    with pytest.raises(MemoryFault, match="loads 8 bytes at an address that is no multiple of that"):
        words_kernel[(1,)](x, out, 1, BLOCK=4)


@pytest.mark.parametrize("grid", [(0,), (1, 65536)])
def test_grids_that_a_gpu_does_not_launch_are_caught(grid: tuple[int, ...]) -> None:
    with pytest.raises(MemoryFault, match="expected sides from 1"):
        same_place_kernel[grid](torch.zeros(1))

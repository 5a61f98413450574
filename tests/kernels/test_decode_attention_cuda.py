# SPDX-License-Identifier: Apache-2.0
"""`decode_attention` in CUDA C++: rows joined by a cluster and by a second kernel, every edge of a run, what is not to be read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glimpse_kernels import _cuda, decode_attention
from tests.kernels.kernel_cases import Case, op_cases
from tests.kernels.test_cuda_graphs import capture
from tests.kernels.test_decode_attention import Pool, check, garbage, make_pool, set_lengths

cuda_cases = pytest.mark.parametrize(
    "kernel", [c for c in op_cases("decode_attention") if c.id.startswith("cuda-")], indirect=True
)

SECOND_KERNEL = 2049
"""Keys that a table has room for from which on a second kernel joins the runs on a large chip that has clusters, too."""


@dataclass(frozen=True)
class Way:
    """How the runs of a row are joined: the chip that it takes (capability, multiprocessors), and the least room of a table."""

    chip: tuple[int, int]
    room: int = 0


CLUSTER, SECOND, NO_CLUSTERS = Way((90, 3)), Way((90, 132), SECOND_KERNEL), Way((80, 108))

all_ways = pytest.mark.parametrize(
    "way", [CLUSTER, SECOND, NO_CLUSTERS], ids=["cluster", "second kernel", "no clusters"]
)


@contextmanager
def on_chip(kernel: Case, way: Way) -> Iterator[None]:
    """Emulated: launches believe in this capability and number of multiprocessors. A GPU is what it is."""
    if not kernel.interpreted:
        yield
        return
    _cuda.module().set_chip(*way.chip)
    try:
        yield
    finally:
        _cuda.module().set_chip(90, 3)


def launches(kernel: Case, pool: Pool) -> int:
    before = _cuda.module().launches()
    pool.run()
    return int(_cuda.module().launches() - before)


def with_room(pool: Pool, keys: int) -> Pool:
    """The same rows with a table for so many keys at least."""
    blocks = max(pool.table.shape[1], -(-keys // pool.k.shape[1]))
    wide = garbage(pool.table.shape[0], blocks)
    wide[:, : pool.table.shape[1]] = pool.table
    return replace(pool, table=wide)


@cuda_cases
def test_how_runs_are_joined(kernel: Case) -> None:
    """One launch for a row in one run and for clusters, two for more runs than a cluster has and for chips without any."""
    assert kernel.dtype is not None
    if not kernel.interpreted:
        return  # which it is depends on the GPU, and nobody counts launches there
    small, large = (make_pool([n], (4, 2), (16, 16), kernel.dtype) for n in (100, 1500))
    for chip, of_small, of_large, of_wide in (((90, 132), 1, 1, 2), ((90, 3), 1, 1, 1), ((80, 108), 1, 2, 2)):
        with on_chip(kernel, Way(chip)):
            assert launches(kernel, small) == of_small
            assert launches(kernel, large) == of_large
            assert launches(kernel, with_room(small, SECOND_KERNEL)) == of_wide


@cuda_cases
@all_ways
def test_edges_of_runs(kernel: Case, way: Way) -> None:
    assert kernel.dtype is not None
    lengths = [edge + by for edge in (64, 128, 256) for by in (-1, 0, 1)]
    with on_chip(kernel, way):
        check(with_room(make_pool(lengths, (2, 1), (16, 24), kernel.dtype), way.room))


@cuda_cases
@all_ways
@pytest.mark.parametrize(
    ("heads", "dims"),
    [((28, 4), (128, 128)), ((16, 2), (40, 72)), ((17, 1), (24, 8)), ((3, 3), (9, 200))],
    ids=str,
)
def test_groups_of_heads(kernel: Case, way: Way, heads: tuple[int, int], dims: tuple[int, int]) -> None:
    assert kernel.dtype is not None
    with on_chip(kernel, way):
        check(with_room(make_pool([150, 0, 33], heads, dims, kernel.dtype), way.room))


@cuda_cases
@pytest.mark.parametrize("block_size", [1, 3, 16, 64, 100, 1000])
def test_block_sizes(kernel: Case, block_size: int) -> None:
    assert kernel.dtype is not None
    for way in CLUSTER, NO_CLUSTERS:
        with on_chip(kernel, way):
            check(make_pool([131, 64, 0], (4, 2), (16, 16), kernel.dtype, block_size))


@cuda_cases
@all_ways
def test_a_row_has_the_same_bits_in_every_batch(kernel: Case, way: Way) -> None:
    assert kernel.dtype is not None
    pool = make_pool([300, 17, 600, 0], (4, 2), (32, 32), kernel.dtype)
    pool = with_room(pool, way.room)
    with on_chip(kernel, way):
        whole = pool.run()
        for b in range(4):
            assert torch.equal(pool.row(b).run()[0], whole[b])


@cuda_cases
def test_the_order_of_threads_does_not_matter(kernel: Case) -> None:
    assert kernel.dtype is not None
    pool = make_pool([300, 17], (7, 1), (48, 48), kernel.dtype)
    for way in CLUSTER, NO_CLUSTERS:
        with on_chip(kernel, way):
            if kernel.interpreted:
                found = []
                for order in (0, 1, 2, 7):
                    _cuda.module().set_order(order)
                    found.append(pool.run())
                _cuda.module().set_order(-1)
            else:
                found = [pool.run() for _ in range(20)]
        assert all(torch.equal(found[0], other) for other in found[1:])


@cuda_cases
@all_ways
def test_lengths_change_under_a_recorded_launch(
    kernel: Case, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded with short rows, replayed with all lengths up to the capacity; all slots that are not of a row's keys hold NaN."""
    assert kernel.dtype is not None
    size, rounds = 16, ((1, 0, 2), (0, 64, 65), (127, 128, 320), (1, 1, 1))
    full = with_room(make_pool([320] * 3, (2, 1), (16, 16), kernel.dtype, size), way.room)
    now = replace(
        full, k=full.k.clone(), v=full.v.clone(), table=full.table.clone(), lengths=full.lengths.clone()
    )
    out = torch.empty(3, 2, 16, dtype=kernel.dtype)

    with on_chip(kernel, way):
        set_lengths(now, full, rounds[0])
        _, replay = capture(kernel, lambda: [now.run(out=out)], monkeypatch)
        for lengths in rounds:
            set_lengths(now, full, lengths)
            out.fill_(float("nan"))
            replay()
            check(now, out=out)


@cuda_cases
@all_ways
def test_keys_that_are_not_there(kernel: Case, way: Way) -> None:
    """A length beyond the table ends with it, a negative one is none, and a key whose block names nothing does not count."""
    assert kernel.dtype is not None
    pool = make_pool([320, 48], (4, 2), (16, 16), kernel.dtype)
    pool.table = pool.table[:, :20].contiguous()
    want = pool.run()
    with on_chip(kernel, way):
        torch.testing.assert_close(
            replace(pool, lengths=torch.tensor([2**31 - 1, 48], dtype=torch.int32)).run(), want
        )
        assert (replace(pool, lengths=torch.tensor([-5, -(2**31)], dtype=torch.int32)).run() == 0).all()

        holes, packed = pool.table.clone(), garbage(2, 20)
        holes[0, 1::2] = torch.tensor([-1, pool.k.shape[0]] * 5, dtype=torch.int32)
        holes[1] = 2**31 - 1
        packed[0, :10] = pool.table[0, ::2]
        short = replace(pool, table=packed, lengths=torch.tensor([160, 0], dtype=torch.int32))
        check(short, out=replace(pool, table=holes).run())


@cuda_cases
@all_ways
def test_one_key_outweighs_all_runs(kernel: Case, way: Way) -> None:
    """The other runs weigh nothing against the one that holds it, and values of every run are large."""
    assert kernel.dtype is not None
    pool = make_pool([500], (2, 1), (16, 16), kernel.dtype)
    pool.q.fill_(1.0)
    pool.v *= 1e3
    place = int(pool.table[0, 400 // 16]), 400 % 16
    pool.k[place] = 100.0
    pool = with_room(pool, way.room)
    with on_chip(kernel, way):
        assert torch.equal(pool.run()[0], pool.v[place].expand(2, -1))


@cuda_cases
@pytest.mark.parametrize("shift", [1, 4, 8])
def test_pools_that_begin_anywhere(kernel: Case, shift: int) -> None:
    """Rows that do not begin at multiples of 16 bytes take another way to the same bits."""
    assert kernel.dtype is not None
    pool = make_pool([150, 20], (4, 2), (32, 64), kernel.dtype)

    def moved(t: Tensor) -> Tensor:
        return F.pad(t.flatten(), (shift, 0), value=float("nan"))[shift:].view(t.shape)

    assert torch.equal(replace(pool, k=moved(pool.k), v=moved(pool.v)).run(), pool.run())


@cuda_cases
def test_an_empty_pool(kernel: Case) -> None:
    k, v = torch.zeros(0, 16, 2, 8, dtype=kernel.dtype), torch.zeros(0, 16, 2, 8, dtype=kernel.dtype)
    q = torch.randn(3, 4, 8).to(kernel.dtype)
    for blocks in (0, 2):
        for length in (0, 7):
            lengths = torch.full((3,), length, dtype=torch.int32)
            assert (decode_attention(q, k, v, garbage(3, blocks), lengths) == 0).all()
    none = torch.zeros(4, 0, 2, 8, dtype=kernel.dtype)
    assert (decode_attention(q, none, none, garbage(3, 2), torch.ones(3, dtype=torch.int32)) == 0).all()


@cuda_cases
def test_head_dimensions_above_the_limit(kernel: Case) -> None:
    assert kernel.dtype is not None
    pool = make_pool([3], (1, 1), (257, 8), kernel.dtype)
    with pytest.raises(TypeError, match="at most 256, found 257 and 8"):
        pool.run()

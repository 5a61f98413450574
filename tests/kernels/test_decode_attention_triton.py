# SPDX-License-Identifier: Apache-2.0
"""`decode_attention` in Triton: rows cut into runs, lengths that change under a recorded launch, addresses, the plan."""

from __future__ import annotations

import pytest
import torch

from glimpse_kernels import _triton, decode_attention
from tests.kernels.arena import spread
from tests.kernels.kernel_cases import Case, op_cases
from tests.kernels.test_decode_attention import Pool, check, cut_into, garbage, make_pool, set_lengths

triton_cases = pytest.mark.parametrize(
    "kernel", [c for c in op_cases("decode_attention") if c.id.startswith("triton-")], indirect=True
)


@triton_cases
@pytest.mark.parametrize(("heads", "runs"), [((16, 2), 5), ((28, 4), 2), ((3, 3), 20), ((34, 2), 2)], ids=str)
def test_runs_and_head_groups(kernel: Case, heads: tuple[int, int], runs: int) -> None:
    """More runs than a row has pieces, one piece a run, several; groups of 8, 7, 1 and 17 query heads."""
    assert kernel.dtype is not None
    with cut_into(kernel, runs):
        check(make_pool([290, 0, 33], heads, (24, 16), kernel.dtype, 32))


@triton_cases
@pytest.mark.parametrize(("block_size", "runs"), [(1, 3), (3, 1), (64, None), (100, 3)])
def test_block_sizes(kernel: Case, block_size: int, runs: int | None) -> None:
    """Tiles and runs begin and end inside of blocks, at their edges, and across many of them."""
    assert kernel.dtype is not None
    with cut_into(kernel, runs):
        check(make_pool([131, 64, 0], (4, 2), (16, 16), kernel.dtype, block_size))


@triton_cases
@pytest.mark.parametrize("dims", [(128, 128), (80, 80), (192, 64), (64, 192), (256, 256)], ids=str)
def test_head_dimensions(kernel: Case, dims: tuple[int, int]) -> None:
    assert kernel.dtype is not None
    with cut_into(kernel, 2, 128 if max(dims) <= 128 else 256):
        check(make_pool([100], (7, 1), dims, kernel.dtype, 32))


@triton_cases
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_configuration(kernel: Case, capability: int) -> None:
    assert kernel.dtype is not None
    with _triton.force_chip(_triton.Chip(capability, 3)):
        for dim in (16, 100, 200):
            check(make_pool([140], (4, 2), (dim, 40), kernel.dtype, 32))


@triton_cases
@pytest.mark.parametrize("runs", [1, 4])
def test_lengths_change_under_a_recorded_launch(kernel: Case, runs: int | None) -> None:
    """A CUDA graph recorded with short rows, replayed with all lengths up to the capacity. Interpreted: the same calls."""
    assert kernel.dtype is not None
    size, rounds = 16, ((1, 0, 2), (31, 32, 33), (0, 64, 65), (127, 128, 129), (300, 319, 320))
    full = make_pool([320] * 3, (2, 1), (16, 16), kernel.dtype, size)
    now = Pool(full.q.clone(), full.k.clone(), full.v.clone(), full.table.clone(), full.lengths.clone())
    out = torch.empty(3, 2, 16, dtype=kernel.dtype)

    def cut(lengths: tuple[int, ...]) -> None:
        now.q.normal_()
        set_lengths(now, full, lengths)

    def call() -> None:
        now.run(out=out)

    with cut_into(kernel, runs):
        cut(rounds[0])
        if kernel.device == "cuda" and not kernel.interpreted:
            call()  # compiles
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            call = graph.replay
        for lengths in rounds:
            cut(lengths)
            out.fill_(float("nan"))
            call()
            check(now, out=out)


@triton_cases
def test_batches_of_other_sizes_agree_to_rounding(kernel: Case) -> None:
    """A batch may be cut into other runs than its rows alone are."""
    assert kernel.dtype is not None
    pool = make_pool([300, 17, 600], (4, 2), (32, 32), kernel.dtype)
    whole = pool.run()
    for b in range(3):
        with cut_into(kernel, 5):
            alone = pool.row(b).run()[0]
        unit = torch.finfo(kernel.dtype).eps * float(pool.gathered(b)[1].abs().max())
        torch.testing.assert_close(alone, whole[b], rtol=0, atol=unit)


@triton_cases
@pytest.mark.parametrize("runs", [1, 4])
def test_one_key_outweighs_all_runs(kernel: Case, runs: int) -> None:
    """The other runs weigh nothing against the one that holds it, and values of every run are large."""
    assert kernel.dtype is not None
    pool = make_pool([500], (2, 1), (16, 16), kernel.dtype)
    pool.q.fill_(1.0)
    pool.v *= 1e3
    place = int(pool.table[0, 400 // 16]), 400 % 16
    pool.k[place] = 100.0
    with cut_into(kernel, runs):
        assert torch.equal(pool.run()[0], pool.v[place].expand(2, -1))


@triton_cases
def test_more_keys_than_the_table_has_room_for(kernel: Case) -> None:
    """Wrong lengths are the caller's mistake; the table is not read past its end for them."""
    assert kernel.dtype is not None
    pool = make_pool([32, 64], (2, 1), (16, 16), kernel.dtype)
    table = pool.table[:, :2].contiguous()
    full = Pool(pool.q, pool.k, pool.v, table, torch.full((2,), 32, dtype=torch.int32)).run()
    pool.lengths.fill_(2**31 - 1)
    for runs in (1, 3):
        with cut_into(kernel, runs):
            found = Pool(pool.q, pool.k, pool.v, table, pool.lengths).run()
        torch.testing.assert_close(found, full)
    pool.lengths.fill_(-5)
    assert (Pool(pool.q, pool.k, pool.v, table, pool.lengths).run() == 0).all()


@triton_cases
def test_runs_past_2_31_elements(kernel: Case) -> None:
    """Queries, outputs and pools that reach far, in rows of several runs; `test_addresses` has each of the pools' strides."""
    assert kernel.dtype is not None
    far = 2**31 + 8
    pool = make_pool([40, 70], (4, 2), (8, 8), kernel.dtype, 16)
    out = spread(torch.zeros_like(pool.q), 1, far // 3)
    wide = Pool(
        spread(pool.q, 0, far), spread(pool.k, 2, far), spread(pool.v, 2, far), pool.table, pool.lengths
    )
    with cut_into(kernel, 2):
        assert torch.equal(wide.run(out=out), pool.run())
    check(pool, out=out.contiguous())


def test_the_plan() -> None:
    """Enough programs to keep the memory busy, no runs shorter than worth their join, one run where the batch is enough."""
    pytest.importorskip("triton")
    from glimpse_kernels.decode_attention.triton import MAX_RUNS, MIN_RUN, count_runs

    for slots in (9, 216, 396, 444):
        for capacity in (1, 100, 128, 129, 4096, 131072):
            for pairs in (1, 2, 4, 28, 256, 1024, 10**6):
                runs = count_runs(capacity, pairs, slots, 14.0 / capacity)
                assert 1 <= runs <= max(1, min(MAX_RUNS, -(-capacity // MIN_RUN)))
                if capacity == 131072:
                    assert pairs * runs >= min(slots // 2, pairs * MAX_RUNS)
    assert count_runs(128, 4, 396, 0.1) == 1


@triton_cases
def test_an_empty_pool(kernel: Case) -> None:
    assert kernel.dtype is not None
    k, v = torch.zeros(0, 16, 2, 8, dtype=kernel.dtype), torch.zeros(0, 16, 2, 8, dtype=kernel.dtype)
    q, lengths = torch.randn(3, 4, 8).to(kernel.dtype), torch.zeros(3, dtype=torch.int32)
    for blocks in (0, 2):
        assert (decode_attention(q, k, v, garbage(3, blocks), lengths) == 0).all()


@triton_cases
def test_head_dimensions_above_the_limit(kernel: Case) -> None:
    pool = make_pool([3], (1, 1), (257, 8), kernel.dtype)
    with pytest.raises(ValueError, match="at most 256, found 257 and 8"):
        pool.run()

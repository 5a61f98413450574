# SPDX-License-Identifier: Apache-2.0
"""`decode_attention` on every backend and instruction set against plain PyTorch on the gathered keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glimpse_kernels import _ext, decode_attention
from tests.kernels.kernel_cases import Case, assert_as_good_as, op_cases

all_cases = pytest.mark.parametrize("kernel", op_cases("decode_attention"), indirect=True)


@dataclass
class Pool:
    """A paged pool whose unused slots hold NaN and whose unused table entries name blocks far outside of it."""

    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor
    lengths: Tensor

    def run(self, **options: object) -> Tensor:
        return decode_attention(self.q, self.k, self.v, self.table, self.lengths, **options)  # type: ignore[arg-type]

    def row(self, b: int) -> Pool:
        """Row b as a batch of one."""
        return Pool(self.q[b : b + 1], self.k, self.v, self.table[b : b + 1], self.lengths[b : b + 1])

    def gathered(self, b: int) -> tuple[Tensor, Tensor]:
        """Keys and values of row b, [length, Hkv, D], read slot by slot."""
        size = self.k.shape[1]
        slots = [(int(self.table[b, j // size]), j % size) for j in range(int(self.lengths[b]))]
        return torch.stack([self.k[s] for s in slots]), torch.stack([self.v[s] for s in slots])


def garbage(rows: int, columns: int) -> Tensor:
    """A block table that names no block: the largest and the smallest numbers in turn."""
    table = torch.full((rows, columns), 2**31 - 1, dtype=torch.int32)
    table[:, 1::2] = -(2**31)
    return table


def set_lengths(now: Pool, full: Pool, lengths: tuple[int, ...]) -> None:
    """Make `now` what `full` is, cut to these lengths: NaN and a table of garbage behind them."""
    size = full.k.shape[1]
    now.k.fill_(float("nan"))
    now.v.fill_(float("nan"))
    now.table.copy_(garbage(*now.table.shape))
    now.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
    for b, length in enumerate(lengths):
        used = -(-length // size)
        now.table[b, :used] = full.table[b, :used]
        j = torch.arange(length)
        place = full.table[b, j // size].long(), j % size
        now.k[place], now.v[place] = full.k[place], full.v[place]


def make_pool(
    lengths: list[int],
    heads: tuple[int, int],
    dims: tuple[int, int],
    dtype: torch.dtype,
    block_size: int = 16,
) -> Pool:
    blocks_of = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(blocks_of) + 2).tolist()
    k = torch.full((len(order), block_size, heads[1], dims[0]), float("nan"), dtype=dtype)
    v = torch.full((len(order), block_size, heads[1], dims[1]), float("nan"), dtype=dtype)
    table = garbage(len(lengths), max([*blocks_of, 1]) + 1)
    for b, length in enumerate(lengths):
        for i in range(blocks_of[b]):
            block, used = order.pop(), min(block_size, length - i * block_size)
            table[b, i] = block
            k[block, :used] = torch.randn(used, heads[1], dims[0]).to(dtype)
            v[block, :used] = torch.randn(used, heads[1], dims[1]).to(dtype)
    q = torch.randn(len(lengths), heads[0], dims[0]).to(dtype)
    return Pool(q, k, v, table, torch.tensor(lengths, dtype=torch.int32))


def check(pool: Pool, scale: float | None = None, out: Tensor | None = None) -> None:
    """The row by row result in double, and how far torch is from it in the pool's dtype. out: what to check, else a run."""
    if out is None:
        out = pool.run(scale=scale)
    assert out.dtype == pool.q.dtype
    factor = pool.q.shape[2] ** -0.5 if scale is None else scale
    for b, length in enumerate(pool.lengths.tolist()):
        if length == 0:
            assert (out[b] == 0).all()
            continue
        keys, values = pool.gathered(b)
        group = pool.q.shape[1] // keys.shape[1]
        keys, values = (t.repeat_interleave(group, 1).transpose(0, 1) for t in (keys, values))
        query = pool.q[b][:, None]
        exact = torch.softmax(factor * (query.double() @ keys.double().transpose(1, 2)), -1) @ values.double()
        torchs = F.scaled_dot_product_attention(query[None], keys[None], values[None], scale=scale)[0]
        assert_as_good_as(out[b], torchs[:, 0], exact[:, 0], f"row {b}, length {length}")


@all_cases
@pytest.mark.parametrize(
    ("lengths", "heads", "dims", "block_size"),
    [
        ([1], (1, 1), (1, 1), 16),
        ([700, 0, 63, 1], (4, 2), (128, 128), 16),
        ([256, 257, 512], (7, 1), (64, 64), 32),
        ([65, 64, 2], (8, 8), (80, 80), 64),
        ([300], (28, 4), (37, 19), 5),
        ([300, 5], (2, 2), (130, 200), 16),
        ([0, 0], (4, 2), (32, 32), 16),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value),
)
def test_rows(
    kernel: Case, lengths: list[int], heads: tuple[int, int], dims: tuple[int, int], block_size: int
) -> None:
    assert kernel.dtype is not None
    check(make_pool(lengths, heads, dims, kernel.dtype, block_size))


@all_cases
@pytest.mark.parametrize("scale", [1.0, -0.1])
def test_scale(kernel: Case, scale: float) -> None:
    assert kernel.dtype is not None
    check(make_pool([270], (2, 1), (16, 16), kernel.dtype), scale)


@all_cases
def test_scale_zero_is_the_mean(kernel: Case) -> None:
    assert kernel.dtype is not None
    pool = make_pool([270], (2, 1), (16, 16), kernel.dtype)
    mean = pool.gathered(0)[1].double().mean(0).expand(2, -1)
    torch.testing.assert_close(
        pool.run(scale=0.0)[0].double(), mean, rtol=0, atol=torch.finfo(kernel.dtype).eps
    )


@all_cases
@pytest.mark.parametrize("heads", [(1, 1), (8, 2), (5, 1)], ids=str)
@pytest.mark.parametrize("length", [1, 2, 3, 5, 63, 257])
def test_infinite_last_value_arrives_alone(kernel: Case, heads: tuple[int, int], length: int) -> None:
    """Keys are taken in twos and fours: what fills up the last of them must add nothing, not even 0 * inf."""
    assert kernel.dtype is not None
    pool = make_pool([length], heads, (40, 40), kernel.dtype)
    plain = pool.run()
    last = length - 1
    pool.v[int(pool.table[0, last // 16]), last % 16, :, 7] = float("inf")
    out = pool.run()
    assert (out[:, :, 7] == float("inf")).all()
    others = [d for d in range(40) if d != 7]
    assert torch.equal(out[:, :, others], plain[:, :, others])


@all_cases
def test_empty_batch(kernel: Case) -> None:
    assert kernel.dtype is not None
    assert make_pool([], (4, 2), (16, 8), kernel.dtype).run().shape == (0, 4, 8)


@contextmanager
def cut_into(kernel: Case, runs: int | None, dim: int = 64) -> Iterator[None]:
    """Triton: rows are cut into so many runs, whatever the batch. None, or another backend: as it likes.

    dim: 64, 128 or 256, at least the head dimensions.
    """
    if kernel.backend != "triton" or runs is None:
        yield
        return
    from glimpse_kernels.decode_attention import triton

    config = triton.CONFIGS.pick(80, (torch.empty(0, dtype=kernel.dtype).element_size(), dim))
    with triton.CONFIGS.forced(replace(config, runs=runs)):
        yield


@all_cases
@pytest.mark.parametrize("runs", [1, 4])
def test_row_alone_equals_row_in_batch(kernel: Case, runs: int) -> None:
    assert kernel.dtype is not None
    pool = make_pool([300, 17, 600], (4, 2), (32, 32), kernel.dtype)
    with cut_into(kernel, runs):
        whole = pool.run()
        for b in range(3):
            assert torch.equal(pool.row(b).run()[0], whole[b])


@all_cases
def test_strided_pool_and_output(kernel: Case) -> None:
    """The pool of one layer inside a pool of all layers, and an output inside a wider buffer."""
    assert kernel.dtype is not None
    pool = make_pool([40, 33], (4, 2), (24, 24), kernel.dtype)
    want = pool.run()
    layers_k = torch.stack([torch.full_like(pool.k, float("nan")), pool.k], 2)
    layers_v = torch.stack([torch.full_like(pool.v, float("nan")), pool.v], 2)
    out = torch.full((2, 2, 4, 24), float("nan"), dtype=kernel.dtype)
    strided = Pool(pool.q, layers_k[:, :, 1], layers_v[:, :, 1], pool.table, pool.lengths)
    assert not strided.k.is_contiguous()
    assert torch.equal(strided.run(out=out[:, 1]), want)
    assert torch.equal(out[:, 1], want)
    assert out[:, 0].isnan().all()


@pytest.mark.skipif(
    _ext.compiled() is None, reason=f"compiled extension not available: {_ext.compiled_error()}"
)
def test_result_does_not_depend_on_the_number_of_threads() -> None:
    pool = make_pool([1500], (8, 2), (64, 64), torch.float32)
    module = _ext.extension()
    results = []
    for threads in (1, 2, 3, 7):
        module.set_num_threads(threads)
        try:
            results.append(pool.run())
        finally:
            module.set_num_threads(0)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.skipif(
    _ext.compiled() is None, reason=f"compiled extension not available: {_ext.compiled_error()}"
)
@pytest.mark.parametrize(("name", "words"), [("lengths", "lengths"), ("table", "block_table")])
def test_values_outside_the_pool(name: str, words: str) -> None:
    pool = make_pool([20], (2, 1), (8, 8), torch.float32)
    getattr(pool, name).view(-1)[0] = 1000
    with pytest.raises(ValueError, match=words):
        pool.run()


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("q", torch.zeros(1, 2, 9), ValueError, "k_pool: expected shape"),
        ("q", torch.zeros(1, 3, 8), ValueError, "multiple of Hkv = 2"),
        ("v", torch.zeros(4, 16, 2, 8, dtype=torch.float16), TypeError, "v_pool: expected dtype float32"),
        ("table", torch.zeros(2, 2, dtype=torch.int32), ValueError, "block_table"),
        ("table", torch.zeros(1, 2, dtype=torch.int64), TypeError, "block_table"),
        ("lengths", torch.zeros(2, dtype=torch.int32), ValueError, "lengths"),
    ],
)
def test_wrong_arguments(name: str, value: Tensor, error: type[Exception], words: str) -> None:
    pool = make_pool([20], (2, 2), (8, 8), torch.float32)
    setattr(pool, name, value)
    with pytest.raises(error, match=words):
        pool.run()


@all_cases
@pytest.mark.parametrize("heads", [(2, 2), (4, 1)])
def test_nan_and_very_large_logits(kernel: Case, heads: tuple[int, int]) -> None:
    """A NaN query gives NaN and leaves its neighbours alone; where one key takes all of the weight, its value comes out."""
    assert kernel.dtype is not None
    pool = make_pool([5, 300, 64], heads, (16, 24), kernel.dtype)
    pool.q *= 1e3 if kernel.dtype is torch.float16 else 1e10
    pool.q[0] = float("nan")
    out = pool.run()
    assert out[0].isnan().all() and not out[1:].isnan().any()
    for b in (1, 2):
        keys, values = (t.repeat_interleave(heads[0] // heads[1], 1) for t in pool.gathered(b))
        logits = torch.einsum("hd,jhd->hj", pool.q[b].double(), keys.double())
        best, second = logits.topk(2).values.unbind(-1)
        clear = (best - second) > 1e3 + 1e-5 * best.abs()
        want = values[logits.argmax(-1), torch.arange(heads[0])]
        assert clear.any()
        assert torch.equal(out[b][clear], want[clear])


@all_cases
def test_no_query_heads(kernel: Case) -> None:
    assert kernel.dtype is not None
    pool = make_pool([5, 40], (2, 2), (8, 8), kernel.dtype)
    pool.q = pool.q[:, :0]
    assert pool.run().shape == (2, 0, 8)

# SPDX-License-Identifier: Apache-2.0
"""What only the Triton `attention` has: its loads, its tiles, its split over the keys. The op itself: test_attention.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from glimpse_kernels import _triton, attention

if _triton.missing():
    pytest.skip(_triton.missing(), allow_module_level=True)

from glimpse_kernels.attention import triton as backend
from tests.kernels.attention_cases import check
from tests.kernels.kernel_cases import Case, cu_seqlens, op_cases

on_triton = pytest.mark.parametrize(
    "kernel",
    [p for p in op_cases("attention") if str(p.id).startswith("triton")],  # type: ignore[attr-defined]
    indirect=True,
)


class Spy:
    """Stands for a kernel and counts its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.described: list[bool] = []

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **constants: Any) -> Any:
            self.described.append(bool(constants["DESCRIPTORS"]))
            return self.kernel[grid](*arguments, **constants)

        return launch


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> Spy:
    spy = Spy(backend.attention_kernel)
    monkeypatch.setattr(backend, "attention_kernel", spy)
    return spy


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> Spy:
    spy = Spy(backend.attention_split_kernel)
    monkeypatch.setattr(backend, "attention_split_kernel", spy)
    return spy


@pytest.fixture(params=["plain", "descriptors"])
def descriptors(
    request: pytest.FixtureRequest, kernel: Case, monkeypatch: pytest.MonkeyPatch
) -> Iterator[bool]:
    """Whether descriptors are taken: for 16 bits, on GPUs that have them, and not for windows, of which there are none here."""
    monkeypatch.setattr(backend, "SHORT_ROWS", 0)
    here = _triton.chip(torch.device(kernel.device))
    wanted = request.param == "descriptors"
    if not kernel.interpreted and here.capability < _triton.HOPPER:
        wanted = False
    with _triton.force_chip(
        _triton.Chip(90 if wanted else 80, 3) if kernel.interpreted or not wanted else here
    ):
        yield wanted and kernel.dtype is not torch.float32


@on_triton
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("lq", "lk", "heads", "dims"),
    [
        ([150], [150], (2, 1), (128, 128)),
        ([20, 3], [20, 3], (14, 2), (128, 128)),
        ([9, 30], [200, 30], (8, 1), (128, 128)),
        ([130, 1], [130, 64], (2, 2), (80, 80)),
        ([129], [140], (1, 1), (192, 64)),
        ([70], [70], (2, 2), (72, 96)),
        ([40], [40], (2, 1), (256, 256)),
    ],
    ids=lambda value: "x".join(map(str, value)),
)
def test_both_kinds_of_loads(
    kernel: Case,
    descriptors: bool,
    whole: Spy,
    causal: bool,
    lq: list[int],
    lk: list[int],
    heads: tuple[int, int],
    dims: tuple[int, int],
) -> None:
    check(kernel, lq, lk, heads, dims, causal=causal, lead=2)
    assert whole.described == [descriptors]


@on_triton
@pytest.mark.parametrize("mask", ["full", "causal", "positions"])
def test_few_rows_against_many_keys(
    kernel: Case, descriptors: bool, split: Spy, mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "CHUNK", 64)
    positions = torch.tensor([76, 0, 63, 64, -1, 130, 77]) if mask == "positions" else None
    check(
        kernel, [1, 3, 0, 2, 1], [77, 131, 40, 0, 64], (7, 1), (128, 128),
        causal=mask != "full", positions=positions, lead=3, hint=3 if mask == "causal" else None,
    )  # fmt: skip
    assert split.described == [descriptors]


@on_triton
@pytest.mark.parametrize("dims", [(80, 80), (192, 64), (24, 40)], ids=str)
def test_split_of_other_head_sizes(kernel: Case, split: Spy, dims: tuple[int, int]) -> None:
    check(kernel, [2], [300], (2, 2), dims, causal=True)
    assert len(split.described) == 1


@on_triton
def test_a_row_does_not_depend_on_its_batch(kernel: Case, whole: Spy, split: Spy) -> None:
    """Glimpse rows alone and together, split or not: the same bits."""
    assert kernel.dtype is not None
    lengths = [600, 20, 256, 257]
    q = torch.randn(4, 4, 16).to(kernel.dtype)
    k, v = (torch.randn(sum(lengths), 1, 16).to(kernel.dtype) for _ in range(2))
    cu_k = cu_seqlens(lengths)
    out, lse = attention(q, k, v, cu_seqlens([1] * 4), cu_k, causal=True, return_lse=True)
    assert len(split.described) == 1 and not whole.described
    for row, (start, stop) in enumerate(zip(cu_k[:-1].tolist(), cu_k[1:].tolist(), strict=True)):
        own, own_lse = attention(
            q[row : row + 1], k[start:stop], v[start:stop], cu_seqlens([1]), cu_seqlens([stop - start]),
            causal=True, return_lse=True,
        )  # fmt: skip
        assert torch.equal(own[0], out[row]) and torch.equal(own_lse[0], lse[row])
    assert len(split.described) == 3 and len(whole.described) == 2


@on_triton
@pytest.mark.parametrize("count", [5, 20, 130])
def test_windows(kernel: Case, whole: Spy, count: int) -> None:
    """Many small segments, some empty: one tile each, found by counting, or known where the longest is."""
    lengths = [(7 * i) % 4 if i < 40 else 0 for i in range(count)]
    check(kernel, lengths, lengths, (1, 1), (16, 16), causal=False, lead=1)
    if count > 100:
        return
    assert kernel.dtype is not None
    q, k, v = (torch.randn(sum(lengths), 1, 16).to(kernel.dtype) for _ in range(3))
    bounds = cu_seqlens(lengths)
    searched = attention(q, k, v, bounds, bounds, causal=False)
    assert torch.equal(attention(q, k, v, bounds, bounds, causal=False, max_seqlen_q=3), searched)


@on_triton
def test_rows_outside_are_written_by_whoever_is_there(kernel: Case) -> None:
    """More rows outside than all tiles have inside, and no tile at all."""
    check(kernel, [2], [2], (2, 1), (16, 80), causal=True, lead=150, tail=170)
    check(kernel, [2, 5], [2, 9], (2, 2), (16, 16), causal=False, lead=150, tail=170, hint=5)
    check(kernel, [], [], (2, 2), (16, 80), causal=True, lead=80, tail=90)
    check(kernel, [0, 0], [4, 0], (2, 2), (16, 16), causal=True, lead=80, tail=90)


@on_triton
def test_views_that_descriptors_cannot_take(
    kernel: Case, monkeypatch: pytest.MonkeyPatch, whole: Spy
) -> None:
    assert kernel.dtype is not None
    monkeypatch.setattr(backend, "SHORT_ROWS", 0)
    wide = torch.randn(40, 3, 49).to(kernel.dtype)
    q, k, v = (wide[:, i : i + 1, 1:33] for i in range(3))
    bounds = cu_seqlens([40])
    out = attention(q, k, v, bounds, bounds, causal=True)
    torch.testing.assert_close(out, attention(q, k.contiguous(), v.contiguous(), bounds, bounds, causal=True))
    assert whole.described[0] is False


@on_triton
def test_head_dimensions_above_the_limit(kernel: Case) -> None:
    q = torch.zeros(2, 1, 257, dtype=kernel.dtype)
    bounds = cu_seqlens([2])
    with pytest.raises(ValueError, match="at most 256, found 257 and 257"):
        attention(q, q, q, bounds, bounds, causal=True)


@pytest.mark.parametrize(
    ("dim", "want"),
    [(1, (16, 0)), (16, (16, 0)), (37, (32, 16)), (64, (64, 0)), (72, (64, 16)), (80, (64, 16)), (96, (64, 32)),
     (112, (128, 0)), (128, (128, 0)), (192, (128, 64)), (200, (256, 0)), (256, (256, 0))],
)  # fmt: skip
def test_parts(dim: int, want: tuple[int, int]) -> None:
    assert _triton.parts(dim) == want


@pytest.mark.parametrize("capability", [80, 86, 90, 100, 120])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("size", backend.SIZES, ids=str)
def test_configurations(capability: int, itemsize: int, size: tuple[int, int]) -> None:
    """There is one for everything; few rows meet the keys in the same blocks split or not."""
    key = (size, itemsize)
    tiles, short, split = (c.pick(capability, key) for c in (backend.TILES, backend.SHORT, backend.SPLIT))
    assert split.block_n == short.block_n
    assert backend.CHUNK % split.block_n == 0
    # rows of up to a block of keys have the same bits in a batch of long segments and in one of short ones
    assert short.block_n >= min(tiles.block_n, backend.SHORT_ROWS) or itemsize == 4

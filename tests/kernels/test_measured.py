# SPDX-License-Identifier: Apache-2.0
"""Which of several GPU kernels serves, by recorded measurements. No GPU needed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import glimpse_kernels as kernels
from glimpse_kernels import dispatch, explain, force_backend, measured
from tests.kernels.kernel_cases import needs_triton
from tests.stand_in import stand_in_gpu

OP = "select_tokens"
GPU, OTHER = "NVIDIA H200", "NVIDIA A100"
FP32 = torch.float32
SMALL, LARGE = "float32 1x1024", "float32 16x65536"


def keep(
    monkeypatch: pytest.MonkeyPatch, path: Path, kinds: dict[str, dict[str, float]], op: str = OP
) -> None:
    """A record of one GPU and op."""
    monkeypatch.setattr(measured, "RECORD", path / "measured.json")
    measured.write({GPU: {op: kinds}})


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing remembered before or after."""
    monkeypatch.setattr(dispatch, "_cache", {})
    measured.record.cache_clear()
    yield
    measured.record.cache_clear()


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An H200, with a Triton and a CUDA C++ kernel of `OP` that are both proven, or not: backend → what is against it."""
    against: dict[str, str] = {}
    rows = [dispatch.Support(OP, backend, "cuda", (FP32,), OP) for backend in ("cuda", "triton")]
    naive = dispatch.Support(OP, "naive", "any", (FP32,), OP, grad=True)
    monkeypatch.setitem(dispatch.BY_OP, OP, (*rows, naive))

    def judge(row: dispatch.Support, *_: Any) -> tuple[bool, str]:
        return not against.get(row.backend), against.get(row.backend) or row.backend.capitalize()

    monkeypatch.setattr(dispatch, "_judge", judge)
    monkeypatch.setattr(measured, "gpu", lambda index=None: OTHER if index == 1 else GPU)
    monkeypatch.setattr(dispatch, "_forced", "auto")
    return against


def choose(*size: int, device: str = "cuda:0", dtype: torch.dtype = FP32, **options: bool) -> str:
    return dispatch.choose(OP, device, dtype, size=size, **options)


def test_the_fastest_for_the_size(
    on_gpu: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    times = {SMALL: {"cuda": 4e-6, "triton": 6e-6}, LARGE: {"cuda": 9e-6, "triton": 7e-6}}
    keep(monkeypatch, tmp_path, times)
    assert choose(1, 1024) == choose(1, 900) == "cuda"
    assert choose(16, 65536) == choose(14, 65000) == "triton"
    assert choose(1, 1) == "cuda" and choose(1000, 10**7) == "triton"  # the nearest
    assert choose(1, 1024, device="cuda") == "cuda"
    assert choose() == "triton"  # no size: as where nothing was measured
    assert choose(1, 2, 1024) == "triton"  # another sort of call
    assert choose(1, 1024, device="cuda:1") == "triton"  # another GPU


def test_nothing_measured_takes_triton(
    on_gpu: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keep(monkeypatch, tmp_path, {})
    assert choose(1, 1024) == "triton"
    on_gpu["triton"] = "never run"
    assert choose(1, 1024) == "cuda"
    on_gpu["cuda"] = "never run"
    assert choose(1, 1024) == "naive"


def test_only_what_may_serve_is_compared(
    on_gpu: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    times = {SMALL: {"cuda": 4e-6, "triton": 6e-6}, LARGE: {"triton": 7e-6}}
    keep(monkeypatch, tmp_path, times)
    assert choose(16, 65536) == "triton"  # where only one was right, it serves
    on_gpu["cuda"] = "never run on a GPU yet"
    assert choose(1, 1024) == "triton"
    on_gpu.clear()
    on_gpu["triton"] = "Triton is not installed"
    assert choose(1, 1024) == choose(16, 65536) == "cuda"


def test_a_fallback_that_costs_nothing_is_not_said(
    on_gpu: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    keep(monkeypatch, tmp_path, {})
    on_gpu["triton"] = "never run"
    assert choose(1, 1024) == "cuda" and not caplog.records
    monkeypatch.setattr(dispatch, "_logged", set())
    on_gpu["cuda"] = "not built"
    assert choose(1, 1024) == "naive" and "triton passed over: never run" in caplog.text


def test_a_forced_backend_looks_at_no_measurement(
    on_gpu: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(measured, "of", lambda *_: pytest.fail("looked"))
    for name in ("cuda", "triton", "naive"):
        with force_backend(name):
            assert choose(1, 1024) == name
            found = {backend: reason for backend, _, reason in explain(OP, "cuda", FP32, size=(1, 1024))}
            assert found[name] == name.capitalize()
    with force_backend("cuda,triton"):
        assert choose(1, 1024) == "cuda"
        on_gpu["cuda"] = "no kernel for this op"
        assert choose(1, 1024) == "triton"


def test_reasons(on_gpu: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keep(monkeypatch, tmp_path, {SMALL: {"cuda": 4e-6, "triton": 6.25e-6}})
    assert explain(OP, "cuda:0", FP32, size=(1, 1000))[:3] == [
        ("cuda", True, "Cuda; fastest here as measured: 4.0 us (float32 1x1024)"),
        ("triton", True, "Triton; slower than cuda here as measured: 6.2 us, 4.0 us (float32 1x1024)"),
        ("naive", True, "Naive"),
    ]
    assert explain(OP, "cuda:0", FP32)[:2] == [
        ("triton", True, "Triton; the size decides, as measured"),
        ("cuda", True, "Cuda; the size decides, as measured"),
    ]
    assert explain(OP, "cuda:1", FP32, size=(1, 1000))[:2] == [
        ("triton", True, "Triton"),
        ("cuda", True, "Cuda"),
    ]
    on_gpu["cuda"] = "not built"
    assert explain(OP, "cuda:0", FP32, size=(1, 1000))[:2] == [
        ("triton", True, "Triton"),
        ("cuda", False, "not built"),
    ]


def test_a_choice_is_made_once(
    on_gpu: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A call of known kind is one look into a dictionary, and kinds are few however many sizes there are."""
    keep(monkeypatch, tmp_path, {SMALL: {"cuda": 4e-6, "triton": 6e-6}})
    asked: list[tuple[int, ...]] = []
    real = dispatch.choose

    def noted(*args: Any, size: tuple[int, ...], **options: Any) -> str:
        asked.append(size)
        real(*args, size=size, **options)
        return "naive"  # whose module can be imported anywhere

    monkeypatch.setattr(dispatch, "choose", noted)
    device = torch.device("cuda", 0)
    for n in range(725, 1449):  # what is nearest to 1024
        dispatch.select(OP, device, FP32, size=(1, n))
    assert asked == [(1, 725)] and len(dispatch._cache) == 1
    dispatch.select(OP, device, FP32, size=(1, 1449))
    dispatch.select(OP, torch.device("cuda", 1), FP32, size=(1, 725))
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("dtype", "size", "want"),
    [
        ("float32", (1, 1024), "float32 1x1024"),
        ("float32", (1, 512), "float32 1x1024"),
        ("float32", (1, 4096), "float32 1x1024"),  # two doublings from either: the smaller one
        ("float32", (2, 4096), "float32 2x8192"),  # one from it, three from the other
        ("float32", (1, 16384), "float32 1x16384"),
        ("float32", (4, 4096), "float32 2x8192"),  # two from it: 1x16384 is four away
        ("bfloat16", (1, 1), "bfloat16 8x64"),  # its own dtype, however far
        ("float16", (8, 64), "bfloat16 8x64"),  # not measured at all: any dtype
        ("float32", (1024,), ""),
        ("float32", (), ""),
    ],
)
def test_the_nearest_kind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: str, size: tuple[int, ...], want: str
) -> None:
    kinds = (
        "float32 1x1024",
        "float32 1x16384",
        "float32 2x8192",
        "bfloat16 8x64",
        "bfloat16 causal 128/128 each 64x64",
    )
    keep(monkeypatch, tmp_path, {kind: {"triton": 1e-6} for kind in kinds})
    assert measured.nearest(GPU, OP, getattr(torch, dtype), size, ("cuda", "triton")) == want
    assert measured.nearest(GPU, OP, getattr(torch, dtype), size, ("cuda",)) == ""
    assert measured.nearest(OTHER, OP, getattr(torch, dtype), size, ("triton",)) == ""


@pytest.mark.parametrize(
    ("length", "want"), [(0, 1), (1, 1), (0.4, 1), (90, 64), (91, 128), (128, 128), (181, 128), (182, 256), (4096 / 3, 1024)]
)  # fmt: skip
def test_buckets(length: float, want: int) -> None:
    assert measured.bucket(length) == want
    assert measured.buckets((int(length), 3)) == (want, 4)


def test_what_is_written_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keep(monkeypatch, tmp_path, {SMALL: {"triton": 2e-6, "cuda": 1.5e-6}})
    assert measured.record() == {GPU: {OP: {SMALL: {"cuda": 1.5e-6, "triton": 2e-6}}}}
    elsewhere = tmp_path / "other.json"
    measured.write({}, elsewhere)
    assert measured.record() != {} and json.loads(elsewhere.read_text()) == {}


def test_the_record_of_this_version_is_one() -> None:
    """GPUs, ops, kinds and providers that exist, with times that were measured."""
    from glimpse_kernels.attention import choice

    for ops in measured.record().values():
        assert set(ops) <= set(dispatch.ops())
        for op, kinds in ops.items():
            there = {row.backend for row in dispatch.support_table() if row.op == op and row.device == "cuda"}
            there |= set(choice.OTHERS) if op == "attention" else set()
            for times in kinds.values():
                assert set(times) <= there
                assert all(0 < seconds < 10 and math.isfinite(seconds) for seconds in times.values())


def test_without_a_gpu_there_is_no_name() -> None:
    assert bool(measured.gpu()) == torch.cuda.is_available()


def calls() -> dict[str, tuple[tuple[int, ...], Any]]:
    """What each op says of its size, by hand, and a call."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(*shape, dtype=dtype)

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    image, options = empty(28, 56, 3, dtype=torch.uint8), {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    k, pool = empty(3, 7, 2, 5), empty(3, 9, 2, 5)  # L, T, Hkv, D
    half = torch.bfloat16
    return {
        "select_tokens": ((2, 6), lambda: kernels.select_tokens(
            empty(6), ints(0, 2, 6), threshold=0.0, caps=ints(2, 4), floors=ints(1, 1), token_rows=ints(*range(6)),
            row_keep=empty(8, dtype=torch.bool), cu_seqlens=ints(0, 8), capacity=8,
        )),
        # 3 layers x 2 heads x 5 x 4 bytes, twice; 6 values of 2 bytes; one of 8
        "compact": ((4, 2 * 120 + 12 + 8), lambda: kernels.compact(
            ints(0, 1, 2, 3), ints(0, 1, 2, 3), k, k.clone(), pool, pool.clone(),
            [(empty(7, 6, dtype=half), empty(4, 6, dtype=half)), (empty(7, dtype=torch.int64), empty(4, dtype=torch.int64))],
        )),
        "decode_attention": ((2 * 3, 5 * 16), lambda: kernels.decode_attention(
            empty(2, 6, 8), empty(10, 16, 3, 8), empty(10, 16, 3, 8), ints(*range(10)).view(2, 5), ints(1, 80),
        )),
        "glimpse_scores": ((5, 2 * 8), lambda: kernels.glimpse_scores(
            empty(1, 4, 8), empty(9, 2, 8), ints(*range(5)), ints(*[0] * 5),
        )),
        "farthest_points": ((2, 5, 3), lambda: kernels.farthest_points(
            empty(13), ints(0, 2, 5), ints(0, 1, 3), tokens=5, capacity=3,
        )),
        "greedy_dpp": ((2, 5, 3), lambda: kernels.greedy_dpp(
            empty(13), empty(5), ints(0, 2, 5), ints(0, 1, 3), capacity=3,
        )),
        "drop_duplicates": ((2, 5, 4), lambda: kernels.drop_duplicates(
            empty(13), ints(0, 2, 5), ints(1, 0, 4, 2), ints(0, 2, 4), ints(1, 1), tokens=5,
        )),
        "patchify": ((28 * 56,), lambda: kernels.patchify(image, **options)),  # type: ignore[arg-type]
        "patchify, resized": ((28 * 56, 56 * 84), lambda: kernels.patchify(image, size=(56, 84), **options)),  # type: ignore[arg-type]
    }  # fmt: skip


@needs_triton
@pytest.mark.parametrize("name", list(calls()))
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sizes_of_calls(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From shapes and capacities alone, and on a GPU alone."""
    asked: list[tuple[str, tuple[int, ...]]] = []
    real = dispatch.select

    def select(op: str, *args: Any, size: tuple[int, ...] = (), **options: Any) -> Any:
        asked.append((op, tuple(size)))
        return real(op, *args, size=size, **options)

    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("a GPU is here: what stands in for one is not needed")
    with force_backend("naive"):
        monkeypatch.setattr(dispatch, "select", select)
        if device == "cpu":
            calls()[name][1]()
        else:
            with stand_in_gpu(), torch.device("cuda"):
                calls()[name][1]()
    op = name.partition(",")[0]
    assert asked == [(op, calls()[name][0] if device == "cuda" else ())]

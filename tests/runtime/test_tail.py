# SPDX-License-Identifier: Apache-2.0
"""Captured layers: what was captured for a few rows serves more of them, and what belongs to nobody is nobody's concern."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

import glimpse_runtime as glimpse
from glimpse_kernels import _cuda, _triton, dispatch
from glimpse_runtime import tail
from glimpse_runtime.engine import Engine
from glimpse_runtime.tail import LARGEST, LEAST, Place, row_bucket
from tests.graph_tape import TapeCapture
from tests.stand_in import stand_in_gpu

from .conftest import GOLDEN, make_batch
from .on_stand_in import COUNT, Device, counting, device, tapes
from .test_prefill import same


def test_buckets_of_rows() -> None:
    buckets = [row_bucket(n) for n in range(1, LARGEST + 1)]
    assert all(isinstance(b, int) and b >= n for n, b in enumerate(buckets, start=1))
    sizes = sorted(set(buckets))
    assert sizes[0] == LEAST and sizes[-1] == LARGEST and len(sizes) == 21
    assert all(b / a <= 1.25 for a, b in pairwise(sizes)) and all(row_bucket(b) == b for b in sizes)
    assert row_bucket(LARGEST + 1) is None


def test_slots_and_segments() -> None:
    """Three sequences of 2, 0 and 3 rows at slots 0, 8 and 16 of 24; row 5 belongs to nobody."""
    store = torch.empty(1, 24, 1, 1)
    place = Place(store, store, torch.tensor([0, 8, 16], dtype=torch.int32))
    cu = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    assert place.slots(cu, 6).tolist() == [0, 1, 16, 17, 18, -1]
    queries, keys = place.segments(cu)
    assert queries.tolist() == [0, 2, 2, 2, 2, 5]
    assert keys.tolist() == [0, 2, 8, 8, 16, 19]
    assert all(t.dtype is torch.int32 for t in (queries, keys, place.slots(cu, 6)))


def fixed(here: Device) -> glimpse.GlimpseModel:
    """A model whose pool is large enough from the beginning: what is captured on it stays."""
    model = here.model()
    model.engine = Engine(model.base.decoder, capture=TapeCapture(), kv_bytes=1 << 22)
    return model


# Rows of one and two sequences, text first: all in the smallest bucket.
FEW: list[list[list[Any]]] = [[[2, (2, 3), 1]], [[2, (7, 7), 5]], [[1, (3, 1), 40]], [[9]]]
TWO: list[list[list[Any]]] = [[[3], [2, (2, 2), 1]], [[1, (4, 5), 2], [1, (3, 6), 20]], [[30], [2]]]
THREE: list[list[list[Any]]] = [
    [[3], [2, (2, 2), 1], [1]],
    [[1, (4, 5), 2], [1, (3, 6), 2], [8], [1, (1, 1), 4]],
]


@pytest.mark.parametrize("prompts", [FEW, TWO, THREE], ids=["one", "two", "three and four"])
@pytest.mark.parametrize("options", [{}, {"max_remain_ratio": 0.4}], ids=["threshold", "cap"])
def test_captured_with_few_rows_replayed_with_more(
    model: glimpse.GlimpseModel, prompts: list[list[list[Any]]], options: dict[str, Any]
) -> None:
    with device() as here:
        ours = fixed(here)
        for seed, rows in enumerate([*prompts, prompts[0]]):
            batch, _ = make_batch(rows, seed=seed)
            same(ours.prefill(**batch, **options), model.prefill(**batch, **options))
        # Without pictures there is no stage, and nothing is captured.
        behind = [
            rows for rows in [*prompts, prompts[0]] if any(isinstance(p, tuple) for row in rows for p in row)
        ]
        assert [tape.replays for tape in tapes(ours)] == [len(behind) - 1]


def test_what_belongs_to_nobody_may_hold_anything(model: glimpse.GlimpseModel) -> None:
    with device() as here:
        ours = fixed(here)
        for seed, rows in enumerate((THREE[1], THREE[0])):
            batch, _ = make_batch(rows, seed=seed)
            same(
                ours.prefill(**batch, max_remain_ratio=0.4),
                model.prefill(**batch, max_remain_ratio=0.4),
            )
            memory = ours.engine.workspace
            assert memory._rows is not None and ours.engine.pool is not None
            pieces = list(memory._idle._kept.values())
            for part in (*memory._rows, ours.engine.pool.k, ours.engine.pool.v):
                part.fill_(torch.nan)
            for piece in pieces:
                piece.fill_(0xFF)  # NaN in every dtype


def test_prompts_with_too_many_rows_are_not_captured(
    model: glimpse.GlimpseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail, "LARGEST", 64)
    batch, _ = make_batch([[40, (5, 5), 20]])
    with device() as here:
        ours = fixed(here)
        same(ours.prefill(**batch), model.prefill(**batch))
        assert not tapes(ours)


def test_two_batches_in_one_pool(model: glimpse.GlimpseModel) -> None:
    """Work captured for the first slots of the pool is not replayed for others."""
    batches = [make_batch(rows, seed=seed)[0] for seed, rows in enumerate(TWO[:2])]
    with device() as here:
        ours = fixed(here)
        for _ in range(2):
            held = [ours.prefill(**batch) for batch in batches]
            for found, batch in zip(held, batches, strict=True):
                same(found, model.prefill(**batch))
            del held, found
        assert len(tapes(ours)) == 2 and all(tape.replays == 1 for tape in tapes(ours))


def test_generating_over_captured_layers(model: glimpse.GlimpseModel) -> None:
    prompts = [make_batch(rows, seed=seed)[0] for seed, rows in enumerate(TWO)]
    with device() as here:
        ours = fixed(here)
        for batch in prompts:
            wanted = model.generate(**batch, max_new_tokens=5, do_sample=False)
            found = ours.generate(**batch, max_new_tokens=5, do_sample=False)
            assert found.tolist() == wanted.tolist()


def _backends() -> list[Any]:
    off = _triton.missing() or ("" if _triton.interpreting() else "the interpreter is off")
    none = "" if _cuda.emulating() else "the emulation of CUDA is off"
    return [
        pytest.param("triton", marks=pytest.mark.skipif(bool(off), reason=off)),
        pytest.param("cuda,triton", marks=pytest.mark.skipif(bool(off or none), reason=off or none)),
    ]


@pytest.mark.parametrize("backends", _backends())
def test_with_the_kernels_of_a_gpu(model: glimpse.GlimpseModel, backends: str) -> None:
    """Not even they look at a number: nothing at all is waited for, but for the count where there is no cap."""
    from glimpse_kernels.linear.triton import ROW, Row

    prompts = [
        make_batch(rows, seed=seed)[0] for seed, rows in enumerate(([[2, (2, 2), 1]], [[3, (4, 5), 9]]))
    ]
    options: list[dict[str, Any]] = [{"max_remain_ratio": 0.4}, {"max_remain_ratio": 0.4}, {}]
    asking = [({**prompts[i], **asked}, asked) for i, asked in zip((0, 1, 1), options, strict=True)]
    wanted = [model.prefill(**batch) for batch, _ in asking]
    few = ROW.forced(Row(warps=4, outputs=256))  # programs: each costs the interpreter milliseconds
    with stand_in_gpu() as gpu, counting(gpu), dispatch.force_backend(backends), few:
        ours = glimpse.GlimpseModel.from_pretrained(
            GOLDEN / "base", GOLDEN / "gp_v1", dtype=torch.float32, device="cuda"
        )
        ours.engine = Engine(ours.base.decoder, capture=TapeCapture(), kv_bytes=1 << 22)
        for (batch, asked), theirs in zip(asking, wanted, strict=True):
            gpu.reads.clear()
            with gpu.nothing_waits():
                found = ours.prefill(**batch)
            assert gpu.reads == ([] if asked else [COUNT])
            same(found, theirs, atol=5e-5)
            del found
        assert [tape.replays for tape in tapes(ours)] == [2]

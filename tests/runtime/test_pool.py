# SPDX-License-Identifier: Apache-2.0
"""Who has which blocks of the pool, how the pool gets its size, and that nothing of it is lost."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from unittest import mock

import pytest
import torch

import glimpse_runtime as glimpse
from glimpse_runtime import prefill
from glimpse_runtime.cache import BLOCK_SIZE, KvPool, Runs, slots_at
from glimpse_runtime.engine import Engine
from tests.graph_tape import TapeCapture

from .conftest import GOLDEN, make_batch
from .on_stand_in import Device, device

ALL = range(4)


def test_runs_are_given_out_first_fit_and_joined_again():
    runs = Runs(10)
    assert [runs.take(n, ALL) for n in (3, 4, 2)] == [0, 3, 7]
    assert (runs.free, runs.longest, runs.take(2, ALL)) == (1, 1, None)
    runs.give_back(0, 3, ALL)
    assert (runs.free, runs.longest) == (4, 3)
    assert runs.take(1, ALL) == 0 and runs.take(2, ALL) == 1 and runs.take(1, ALL) == 9
    for first, count in ((3, 4), (0, 1), (9, 1), (1, 2), (7, 2)):
        runs.give_back(first, count, ALL)
    assert (runs.free, runs.longest, runs.take(10, ALL)) == (10, 10, 0)
    assert Runs(0).take(1, ALL) is None and Runs(0).longest == 0


def test_other_layers_have_the_same_blocks():
    runs = Runs(10)
    assert runs.take(6, range(0, 2)) == 0 and runs.take(4, range(2, 4)) == 0
    assert (runs.free, runs.longest) == (4, 4)  # that nobody has at all
    assert runs.take(5, range(2, 3)) == 4 and runs.take(5, range(1, 4)) is None
    assert runs.take(6, range(3, 4)) == 4 and runs.free == 0
    runs.give_back(0, 4, range(2, 4))
    assert runs.take(3, range(3, 4)) == 0 and runs.take(5, range(2, 3)) is None
    assert runs.take(1, range(2, 4)) == 3


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_runs_never_overlap(layers):
    """Against a grid that says of every block in every layer who has it."""
    rng = random.Random(layers)
    runs, owner = Runs(40), torch.zeros(layers, 40, dtype=torch.int64)
    held = {}
    for turn in range(1, 1500):
        if held and rng.random() < 0.5:
            first, count, own = held.pop(rng.choice(list(held)))
            owner[own.start : own.stop, first : first + count] = 0
            runs.give_back(first, count, own)
        else:
            bounds = sorted((rng.randrange(layers), rng.randrange(layers)))
            own, count = range(bounds[0], bounds[1] + 1), rng.randint(1, 14)
            rows = owner[own.start : own.stop]
            fits = [i for i in range(41 - count) if not rows[:, i : i + count].any()]
            first = runs.take(count, own)
            assert first == (fits[0] if fits else None)
            if first is not None:
                rows[:, first : first + count] = turn
                held[turn] = first, count, own
        free = "".join("x" if column else " " for column in owner.any(0).tolist())
        assert runs.free == free.count(" ") and runs.longest == max(map(len, free.split("x")))


def pool_of(model, blocks):
    return KvPool(model.base.decoder.config, blocks, torch.float32, torch.device("cpu"))


def test_a_lease_is_a_pool_of_its_own_to_prefill_and_a_part_of_the_pool_to_decoding(model):
    pool = pool_of(model, 12)
    before = pool.lease([40])  # 2 blocks
    lease = pool.lease([33, 5, 64])  # 2, 1 and 2
    assert before.first == 0 and lease.first == 2
    assert lease.capacities == (64, 32, 64)
    assert lease.starts.tolist() == [0, 64, 96] and lease.starts.dtype is torch.int32
    assert lease.block_table.tolist() == [[2, 3], [4, 0], [5, 6]]
    assert lease.block_table.dtype is torch.int32 and lease.lengths.tolist() == [0, 0, 0]
    assert lease.k_slots.shape[1] == 5 * BLOCK_SIZE
    for row, start in enumerate((64, 128, 160)):  # slots of the pool
        pool.k_slots[:, start] = row + 1.0
        pool.v_slots[:, start + 3] = -row - 1.0
        assert torch.equal(lease.k_slots[:, lease.starts[row]], pool.k_slots[:, start])
        k, v = lease.rows(row, 1, 4)
        assert (k[0] == row + 1.0).all() and (v[3] == -row - 1.0).all()
    rows = torch.tensor([[0, 1, 31], [33, 31, 63]], dtype=torch.int32)
    assert lease.slots_at(rows).tolist() == [[64, 129, 191], [97, 159, 223]]
    wide, _ = lease.window(7 * BLOCK_SIZE)
    assert wide.shape[1] == 7 * BLOCK_SIZE and wide.data_ptr() == lease.k_slots.data_ptr()
    assert lease.window(10**6)[0].shape[1] == 10 * BLOCK_SIZE


def test_segments_of_a_batch_lie_beside_each_other(model):
    """Of different lengths in different layers; each reads and writes its own layers only."""
    pool = pool_of(model, 8)
    segments = [(range(0, 2), [70, 40]), (range(2, 5), [33, 5]), (range(5, 6), [90, 1])]
    leases = pool.lease_all(segments)
    assert [lease.first for lease in leases] == [0, 0, 0] and pool.runs.free == 3
    assert [lease.capacities for lease in leases] == [(96, 64), (64, 32), (96, 32)]
    pool.k.zero_(), pool.v.zero_()
    for number, lease in enumerate(leases, start=1):
        for row in range(2):
            for layer in lease.layers:
                keys, values = lease.rows(row, layer, segments[number - 1][1][row])
                assert not keys.any() and not values.any()
                keys.fill_(number + 10 * layer + 100 * row), values.fill_(-number)
    for number, (lease, (layers, rows)) in enumerate(zip(leases, segments, strict=True), start=1):
        assert lease.layers == layers and lease.k_slots.shape[0] == len(layers)
        for layer in layers:
            assert lease.keys(layer).data_ptr() == lease.k_slots[layer - layers.start].data_ptr()
            assert lease.values(layer).data_ptr() == lease.v_slots[layer - layers.start].data_ptr()
            for row, count in enumerate(rows):
                at = int(lease.starts[row])
                assert (lease.keys(layer)[at : at + count] == number + 10 * layer + 100 * row).all()
                table = lease.block_table[row].long()
                assert pool.layer(layer)[1][table].flatten(0, 1)[:count].eq(-number).all()
        for other in set(range(6)) - set(layers):
            with pytest.raises(ValueError, match="not in range"):
                lease.rows(0, other, 1)
    assert pool.lease([4 * BLOCK_SIZE]) is None and pool.lease([4 * BLOCK_SIZE], range(2, 5)).first == 3
    last = leases[2]
    assert last.window(7 * BLOCK_SIZE)[1].shape[:2] == (1, 7 * BLOCK_SIZE)


def test_segments_fit_together_or_not_at_all(model):
    pool = pool_of(model, 4)
    first = pool.lease([64], range(3, 6))
    assert pool.lease_all([(range(0, 3), [128]), (range(3, 6), [96])]) is None
    assert pool.runs.free == 2
    both = pool.lease_all([(range(0, 3), [128]), (range(3, 6), [64])])
    assert [lease.first for lease in both] == [0, 2] and first.first == 0
    for wrong in (range(0), range(5, 7), range(-1, 3), range(0, 4, 2)):
        with pytest.raises(glimpse.GlimpseError, match="expected layers of range"):
            pool.lease_all([(range(0, 1), [1]), (wrong, [1])])
    del both
    first.release()
    assert pool.runs.free == 4


def test_slots_of_a_wider_table_are_the_same():
    table = torch.tensor([[7, 2, 9]], dtype=torch.int32)
    rows = torch.arange(96, dtype=torch.int32)[:, None]
    wider = torch.nn.functional.pad(table, (0, 5), value=0)
    expected = [[block * BLOCK_SIZE + offset] for block in (7, 2, 9) for offset in range(BLOCK_SIZE)]
    assert slots_at(table, rows).tolist() == slots_at(wider, rows).tolist() == expected


def test_leases_end_by_release_or_when_dropped(model):
    pool = pool_of(model, 4)
    first, second = pool.lease([64]), pool.lease([64])
    assert pool.lease([1]) is None
    first.release()
    first.release()
    assert first.released and not second.released and pool.runs.free == 2
    with pytest.raises(glimpse.GlimpseError, match="given back"):
        first.rows(0, 0, 1)
    del second
    gc.collect()
    assert pool.runs.free == 4
    third = pool.lease([100])
    del first  # released before: it takes nothing from the third
    gc.collect()
    assert pool.runs.free == 0 and third.first == 0


def test_a_cpu_has_what_a_call_needs_and_no_more(model):
    engine = Engine(model.base.decoder)
    lease = engine.lease([40, 3])
    assert lease.pool.blocks == 3 and lease.first == 0 and engine.pool is None
    assert engine.lease([32]).pool is not lease.pool
    early, late = engine.lease_all([(range(0, 2), [70, 3]), (range(2, 6), [33, 3])])
    assert (early.pool.k.shape[:2], late.pool.k.shape[:2]) == ((2, 4), (4, 3))
    for lease in (early, late):
        for layer in lease.layers:
            lease.rows(1, layer, 3)[0].fill_(layer)
            lease.rows(1, layer, 3)[1].fill_(-layer)
            assert lease.pool.layer(layer)[0][lease.block_table[1, 0], :3].eq(layer).all()
            assert lease.values(layer)[lease.starts[1] :][:3].eq(-layer).all()
    with pytest.raises(ValueError, match="not in range"):
        late.pool.layer(1)


class FakeMemory:
    """Of a GPU with so many bytes free; `work` takes some for a while."""

    def __init__(self, free):
        self.left, self.held, self.most, self.began = free, 100, 0, 0

    def free(self):
        return self.left

    def used(self):
        return self.held

    def start(self):
        self.began += 1
        self.most = self.held

    def peak(self):
        return self.most


def bytes_of(blocks):
    """The tiny model's: 6 layers, 2 heads of 32 numbers, fp32, keys and values."""
    return blocks * BLOCK_SIZE * 6 * 2 * 32 * 4 * 2


def on_gpu(here: Device, capture=None, **options):
    model = here.model(None)
    model.engine = Engine(model.base.decoder, capture=capture, **options)
    return model


def test_the_pool_grows_to_powers_of_two_and_old_leases_keep_theirs():
    with device() as here:
        engine = on_gpu(here).engine
        first = engine.lease([3 * BLOCK_SIZE])
        assert engine.pool.blocks == 4
        second = engine.lease([20])
        assert second.pool is first.pool and second.first == 3
        third = engine.lease([5 * BLOCK_SIZE])  # with the 4 in use: 9
        assert third.pool.blocks == 16 and third.pool is not first.pool and third.first == 0
        assert third.pool.generation > first.pool.generation
        assert not engine.captures(third)  # there is nothing to capture with
        first.release(), second.release(), third.release()
        assert engine.lease([16 * BLOCK_SIZE]).pool is third.pool


def test_a_pool_grows_once_for_all_segments_of_a_batch():
    """One by one the second one would go to another pool, where no step of both could be captured."""
    segments = [(range(0, 2), [5 * BLOCK_SIZE]), (range(2, 4), [3 * BLOCK_SIZE]), (range(4, 6), [1, 1])]
    with device() as here:
        engine = on_gpu(here).engine
        old = engine.lease([BLOCK_SIZE])
        leases = engine.lease_all(segments)
        assert {lease.pool for lease in leases} == {engine.pool} and engine.pool is not old.pool
        assert engine.pool.blocks == 8  # with the one in use: 6, not 5 + 3 + 2
        assert [lease.first for lease in leases] == [0, 0, 0]
        again = engine.lease_all(segments[2:])  # beside them
        assert again[0].pool is engine.pool and again[0].first == 2
        assert engine.lease([BLOCK_SIZE], range(3, 5)).first == 4
        with engine.call():
            inner = engine.lease_all(segments[1:])
        assert all(lease.released for lease in inner) and not leases[0].released
        assert engine.pool.runs.free == 3
    memory = FakeMemory(bytes_of(5))
    with device() as here:
        engine = on_gpu(here, memory=memory).engine
        assert engine.lease_all(segments)[1].pool.blocks == 5  # what they need together
        bounded = on_gpu(here, kv_bytes=bytes_of(4)).engine
        with pytest.raises(glimpse.GlimpseError, match="160 rows .* asked, 128 rows"):
            bounded.lease_all(segments)


def test_growing_drops_what_was_captured_on_the_old_pool():
    with device() as here:
        engine = on_gpu(here, TapeCapture()).engine
        old = engine.lease([1])
        engine.graphs.run("work", lambda: None)
        assert engine.captures(old) and len(engine.graphs) == 1
        new = engine.lease([BLOCK_SIZE * 2])
        assert len(engine.graphs) == 0 and engine.captures(new) and not engine.captures(old)


def test_a_pool_takes_no_more_than_it_needs_where_memory_is_short():
    with device() as here:
        engine = on_gpu(here, memory=FakeMemory(bytes_of(6))).engine
        assert engine.lease([5 * BLOCK_SIZE]).pool.blocks == 5  # 8 would be too many
        with pytest.raises(glimpse.GlimpseError, match=r"not enough memory .* 224 rows \(.*asked, .* free"):
            on_gpu(here, memory=FakeMemory(bytes_of(6))).engine.lease([7 * BLOCK_SIZE])


def test_a_bounded_pool_is_made_at_once_and_says_what_is_missing():
    with device() as here:
        engine = on_gpu(here, kv_bytes=bytes_of(8) + 5).engine
        held = [engine.lease([BLOCK_SIZE * n]) for n in (3, 2, 3)]
        assert engine.pool.blocks == 8 and {lease.pool for lease in held} == {engine.pool}
        held[0].release(), held[2].release()
        with pytest.raises(glimpse.GlimpseError) as error:
            engine.lease([BLOCK_SIZE * 4])
        for part in ("128 rows (384.0 KiB) asked", "192 rows (576.0 KiB) free", "(96 rows", "256 rows"):
            assert part in str(error.value)
        held[1].release()
        assert engine.lease([BLOCK_SIZE * 8]).first == 0
        with pytest.raises(glimpse.GlimpseError, match="288 rows .* asked, 256 rows"):
            on_gpu(here, kv_bytes=bytes_of(8)).engine.lease([BLOCK_SIZE * 9])


def test_the_pool_is_sized_from_what_is_free_beside_a_measured_call():
    memory = FakeMemory(1_000_000_000)
    with device() as here:
        engine = on_gpu(here, TapeCapture(), memory=memory, graph_bytes=7_000_000).engine
        seen = []

        def work():
            seen.append(engine.graphs.capture)
            lease = engine.lease([BLOCK_SIZE * 2])
            memory.most = 100 + lease.pool.nbytes + 50_000_000

        engine.size_pool(0.9, work)
        assert seen == [None] and engine.graphs.capture is not None and engine.pool is None
        engine.lease([1])
        assert engine.pool.blocks == (900_000_000 - 50_000_000 - 7_000_000) // bytes_of(1)
        memory.left = 50_000_000
        with pytest.raises(glimpse.GlimpseError, match="47.7 MiB free, of which a call needs 47.7 MiB"):
            engine.size_pool(0.9, work)


def test_a_call_gives_its_room_back_whatever_happens():
    class Breaks:
        def __init__(self):
            self.left = 3

        def put(self, value):
            self.left -= 1
            if self.left == 0:
                raise RuntimeError("the reader is gone")

        def end(self): ...

    batch, _ = make_batch([[5, (3, 5), 7], [3]])
    with device() as here:
        model = here.model(capture=TapeCapture())
        for plan in (None, "default"):
            with pytest.raises(RuntimeError, match="the reader is gone") as kept:
                model.generate(**batch, plan=plan, max_new_tokens=4, streamer=Breaks())
            assert kept.value.__traceback__ is not None  # which holds on to everything
            assert model.engine.pool.runs.free == model.engine.pool.blocks
        out = model.generate(**batch, max_new_tokens=2)
        assert out.shape[0] == 2 and model.engine.pool.runs.free == model.engine.pool.blocks
        result = model.prefill(**batch, max_new_tokens=2)
        assert model.engine.pool.runs.free < model.engine.pool.blocks
        result.decode(2)
        result.kv(0, 0)  # still there
        del result
        gc.collect()
        assert model.engine.pool.runs.free == model.engine.pool.blocks
        broken = mock.patch.object(prefill, "finish", side_effect=RuntimeError("in the middle"))
        with broken, pytest.raises(RuntimeError, match="in the middle") as kept:
            model.prefill(**batch, max_new_tokens=2)
        assert kept.value.__traceback__ is not None
        assert model.engine.pool.runs.free == model.engine.pool.blocks


def test_the_pool_of_a_call_is_gone_after_it_on_a_cpu(model, monkeypatch):
    made = []
    lease = Engine.lease_all

    def noted(self, segments):
        leases = lease(self, segments)
        made.extend(map(weakref.ref, leases))
        return leases

    monkeypatch.setattr(Engine, "lease_all", noted)
    batch, _ = make_batch([[5, (3, 5), 7]])
    model.generate(**batch, max_new_tokens=2)
    gc.collect()
    assert len(made) == 1 and made[0]() is None


def test_calls_of_several_threads_release_their_own_leases_only(model):
    engine = Engine(model.base.decoder)
    with engine.call(keep=True):
        mine = engine.lease([3])
        thread = threading.Thread(target=lambda: _leased_elsewhere(engine))
        thread.start()
        thread.join()
        with engine.call():
            inner = engine.lease([3])
        assert inner.released and not mine.released
    assert not mine.released


def _leased_elsewhere(engine):
    with engine.call():
        engine.lease([4])


def test_memory_bounds_of_from_pretrained():
    with pytest.raises(glimpse.GlimpseError, match="kv_memory: expected none on a CPU"):
        glimpse.GlimpseModel.from_pretrained(GOLDEN / "base", kv_memory=1 << 20)
    with device():
        for wrong in (0, 1.5, True, "1GiB"):
            with pytest.raises(glimpse.GlimpseError, match="kv_memory: expected a number of bytes"):
                glimpse.GlimpseModel.from_pretrained(GOLDEN / "base", device="cuda", kv_memory=wrong)
        model = glimpse.GlimpseModel.from_pretrained(
            GOLDEN / "base", device="cuda", dtype=torch.float32, kv_memory=bytes_of(3), graph_memory=77
        )
        batch, _ = make_batch([[60], [70]])
        with pytest.raises(glimpse.GlimpseError, match="160 rows .* asked, 96 rows"):
            model.generate(**batch, max_new_tokens=4)
        assert model.generate(input_ids=batch["input_ids"][:1], max_new_tokens=4).shape[0] == 1
        assert model.engine.pool.blocks == 3 and model.engine.graphs.budget == 77

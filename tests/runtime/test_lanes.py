# SPDX-License-Identifier: Apache-2.0
"""Steps that take everything from the device: lanes, and the ring through which the host reads them."""

from __future__ import annotations

import pytest
import torch

from glimpse_runtime import device_decode, lanes
from glimpse_runtime.cache import BLOCK_SIZE
from glimpse_runtime.device_decode import LAG, DeviceLoop
from glimpse_runtime.device_sampling import RING, Choice
from glimpse_runtime.engine import LEAST_WIDTH, Engine
from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.token_ring import TokenRing
from tests.graph_tape import TapeCapture

from .conftest import make_batch
from .on_stand_in import device

ROWS = [[5, (3, 5), 7], [3], [9, (2, 2), 4, (4, 3), 2]]


class Streams:
    """Events of a device that has done nothing yet when it is asked to; what it copies arrives when it is waited for."""

    def __init__(self):
        self.waited = []
        outer = self

        class Event:
            made = 0

            def __init__(self):
                self.number, self.recorded = Event.made, 0
                Event.made += 1

            def record(self, stream):
                assert stream == "stream"
                self.recorded += 1

            def synchronize(self):
                assert self.recorded
                outer.waited.append(self.number)

        self.Event = Event

    def current_stream(self, device):
        return "stream"


@pytest.fixture
def unpinned(monkeypatch):
    """No page-locked memory without a GPU."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))


def test_the_ring_hands_out_every_step_once_in_order_and_waits_for_that_one_alone(unpinned):
    streams = Streams()
    source = torch.zeros(4, 2, dtype=torch.int64)
    ring = TokenRing(source, streams)
    for call in range(3):
        ring.begin()
        streams.waited.clear()
        got, held = [], []
        for step in range(11):
            source[step % 4] = torch.tensor([100 * call + step, -step])
            ring.send()
            if step >= 3:
                held.append(ring.receive())
                got.append(held[-1].tolist())
                assert len(streams.waited) == len(got)
        while len(got) < 11:
            got.append(ring.receive().tolist())
        assert got == [[100 * call + step, -step] for step in range(11)]
        assert streams.waited == [step % 4 for step in range(11)]
        assert [t.tolist() for t in held] == got[:8]  # what was given out is not written to again
        with pytest.raises(RuntimeError, match="no step"):
            ring.receive()


def test_the_ring_does_not_overwrite_what_was_not_read(unpinned):
    ring = TokenRing(torch.zeros(4, 1, dtype=torch.int64), Streams())
    for _ in range(4):
        ring.send()
    with pytest.raises(RuntimeError, match="4 steps behind"):
        ring.send()
    ring.receive()
    ring.send()
    ring.begin()  # a call that was left early
    for _ in range(4):
        ring.send()


def test_the_device_runs_ahead_no_further_than_the_ring_is_long():
    assert 0 < LAG < RING


def roomy(model):
    """An engine with 64 blocks from the start."""
    return Engine(model.base.decoder, capture=TapeCapture(), kv_bytes=64 * BLOCK_SIZE * 6 * 2 * 32 * 4 * 2)


def loops(here, model, batch, room, capture):
    """The same prefill on the stand-in and on the CPU, and a loop behind each."""
    from glimpse_runtime.device_decode import loop_for

    ours = here.model(capture=capture)
    found = []
    for owner in (ours, model):
        state = owner.prefill(**batch, max_new_tokens=room)._state
        found.append((state, loop_for(state)))
    return ours, found


@torch.no_grad()
def test_steps_are_those_of_the_cpu_over_block_and_chunk_borders(model, monkeypatch):
    """Keys and values too; two rows retire in between."""
    chunk, steps = 5, 12
    for module in (lanes, device_decode):
        monkeypatch.setattr(module, "CHUNK", chunk)
    batch, _ = make_batch([[BLOCK_SIZE - 8], [3], [BLOCK_SIZE - 3]])
    with device() as here:
        _, ((state, loop), (cpu_state, cpu)) = loops(here, model, batch, steps, TapeCapture())
        assert isinstance(loop, DeviceLoop)
        tokens = cpu_state.last_logits.argmax(-1)
        assert torch.equal(state.last_logits.argmax(-1).cpu(), tokens)
        for step in range(steps):
            expected = cpu.step(tokens)
            found = loop.step(tokens.to("cuda"))
            assert found.shape == expected.shape
            running = torch.tensor([True, step < 3, step < chunk + 2])
            torch.testing.assert_close(found.cpu()[running], expected[running], atol=2e-5, rtol=0)
            tokens = (expected.argmax(-1) + step) % 600
            if step in (2, chunk + 1):
                finished = torch.arange(3) == (1 if step == 2 else 2)
                cpu.retire(finished), loop.retire(finished.to("cuda"))
        with pytest.raises(GlimpseError, match="pool is full"):
            loop.step(tokens.to("cuda"))
        for row, length in enumerate(cpu.lengths[0].tolist()):
            for layer in range(6):
                a, b = (torch.stack(s.leases[0].rows(row, layer, length)) for s in (state, cpu_state))
                torch.testing.assert_close(a.cpu(), b, atol=2e-5, rtol=0)


@torch.no_grad()
def test_what_a_retired_row_left_is_not_touched():
    batch, _ = make_batch(ROWS)
    with device() as here:
        model = here.model(capture=TapeCapture())
        state = model.prefill(**batch, max_new_tokens=8)._state
        loop = DeviceLoop(model.engine, state.leases, state.next_positions, 8)
        tokens = torch.tensor([3, 4, 5], device="cuda")
        loop.step(tokens)
        loop.retire(torch.tensor([False, True, False], device="cuda"))
        (lease,) = state.leases
        before = lease.pool.k.clone(), lease.pool.v.clone()
        for _ in range(3):
            loop.step(tokens)
        mine = lease.block_table[1, : lease.capacities[1] // BLOCK_SIZE].cpu().long()
        others = lease.block_table[0, :1].cpu().long()
        for now, then in zip((lease.pool.k, lease.pool.v), before, strict=True):
            assert torch.equal(now.cpu()[:, mine], then.cpu()[:, mine])
            assert not torch.equal(now.cpu()[:, others], then.cpu()[:, others])


@torch.no_grad()
def test_captured_for_a_short_batch_replayed_for_longer_ones_elsewhere_in_the_pool(model):
    """One graph serves every batch of its bucket: other lengths, other positions, other blocks, fewer rows."""
    batches = [[[4], [2], [3], [2]], [[60, (3, 4), 21], [5], [130]], [[170], [33], [64], [2]]]
    with device() as here:
        ours = here.model(capture=TapeCapture())
        ours.engine = roomy(ours)
        held, keys = [], set()
        for rows in batches:
            batch, _ = make_batch(rows)
            held.append(
                ours.prefill(**batch, max_new_tokens=6)
            )  # keeps its blocks: the next one begins elsewhere
            tokens, logits = held[-1].decode(6)
            expected = model.prefill(**batch, max_new_tokens=6).decode(6)
            assert torch.equal(tokens.cpu(), expected[0])
            torch.testing.assert_close(logits.cpu(), expected[1], atol=2e-5, rtol=0)
            keys |= {key for key in ours.engine.graphs._held if key[0] == "step"}
        assert len({result._state.leases[0].first for result in held}) == len(batches)
        assert len(keys) == 1
        count, widths = next(iter(keys))[1:3]
        assert (count, widths) == (4, (LEAST_WIDTH,))


@torch.no_grad()
def test_a_batch_that_stands_in_the_way_of_another_one(model):
    """Two loops at once: the second one has memory of its own and is not captured."""
    _, alone = make_batch([[17], [25]])
    with device() as here:
        ours = here.model(capture=TapeCapture())
        ours.engine = roomy(ours)
        states = [ours.prefill(**inputs, max_new_tokens=4)._state for inputs in alone]
        first, second = (DeviceLoop(ours.engine, s.leases, s.next_positions, 4) for s in states)
        wanted = [model.prefill(**inputs, max_new_tokens=4).decode(4)[0] for inputs in alone]
        tokens = [[s.last_logits.argmax(-1)] for s in states]
        for _ in range(3):
            for loop, made in ((first, tokens[0]), (second, tokens[1])):
                made.append(loop.step(made[-1]).argmax(-1))
        for made, expected in zip(tokens, wanted, strict=True):
            assert torch.stack(made, 1).tolist() == expected.tolist()
        assert sum(key[0] == "step" for key in ours.engine.graphs._held) == 1
        first.close(), second.close()
        third = DeviceLoop(ours.engine, states[0].leases, states[0].next_positions, 5)
        assert third._station is first._station


@torch.no_grad()
def test_a_batch_whose_pool_was_replaced_goes_on_there(model):
    short, long = make_batch([[6]])[0], make_batch([[300]])[0]
    with device() as here:
        ours = here.model(capture=TapeCapture())
        first = ours.prefill(**short, max_new_tokens=5)
        second = ours.prefill(**long, max_new_tokens=5)
        assert first._state.leases[0].pool is not second._state.leases[0].pool
        for result, inputs in ((first, short), (second, long)):
            expected = model.prefill(**inputs, max_new_tokens=5).decode(5)[0]
            assert torch.equal(result.decode(5)[0].cpu(), expected)
        generations = {key[3] for key in ours.engine.graphs._held if key[0] == "step"}
        assert generations == {second._state.leases[0].pool.generation}


@torch.no_grad()
def test_decoding_from_nothing_is_possible_for_a_warm_up():
    with device() as here:
        model = here.model(None, capture=TapeCapture())
        engine: Engine = model.engine
        lease = engine.lease([100, 7])
        nowhere = torch.zeros(3, 2, dtype=torch.int64, device="cuda")
        logits = torch.zeros(2, 640, device="cuda")
        loop = DeviceLoop(engine, [lease], [nowhere], 4)
        assert [len(tokens) for tokens in loop.tokens(logits, Choice(), 4)] == [2] * 4
        assert ("step", 2, (LEAST_WIDTH,), engine.pool.generation, (range(6),)) in engine.graphs

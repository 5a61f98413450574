# SPDX-License-Identifier: Apache-2.0
"""Decoding over segments: layers whose sequences have other lengths, blocks and rotary positions than those of other layers.

The expected logits come from the modules of transformers, one layer after the other, on keys and values that were made up;
attention and rotation are written out.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import pytest
import torch

from glimpse_kernels import recording
from glimpse_runtime import decode, device_decode, lanes
from glimpse_runtime.cache import BLOCK_SIZE, KvLease
from glimpse_runtime.decode import DecodeLoop
from glimpse_runtime.device_decode import LAG, DeviceLoop
from glimpse_runtime.device_sampling import Choice
from glimpse_runtime.engine import LEAST_WIDTH, Engine
from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.graphs import bucket
from glimpse_runtime.warmup import _shorter
from tests.graph_tape import TapeCapture

from .conftest import make_batch
from .on_stand_in import device, tapes
from .test_lanes import roomy

LAYERS, ROOM = 6, 11


def rotated(x: torch.Tensor, positions: torch.Tensor, rope: dict[str, Any]) -> torch.Tensor:
    """`x [B, heads, head_dim]` at `positions [3, B]`: each of the three turns a section of the pairs."""
    half = x.shape[-1] // 2
    own = torch.arange(3).repeat_interleave(torch.tensor(rope["mrope_section"]))
    angles = positions[own].T.double() * rope["rope_theta"] ** (-torch.arange(half) / half).double()
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    both = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn
    return torch.cat([both.real, both.imag], -1).float()


@dataclass
class Case:
    """A batch behind some pruning: which layers, and how many prompt rows of each sequence they have.

    Attributes:
        keys, values: `[rows, kv heads, head_dim]` of each sequence in each layer.
        positions: `[3, B]` of the next token, for each segment.
    """

    segments: list[tuple[range, list[int]]]
    seed: int = 0
    keys: list[list[torch.Tensor]] = field(init=False)
    values: list[list[torch.Tensor]] = field(init=False)
    positions: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> Case:
        """Without what decoding added."""
        made = torch.Generator().manual_seed(self.seed)

        def rows() -> list[list[torch.Tensor]]:
            return [
                [torch.randn(count, 2, 32, generator=made) for count in lengths]
                for layers, lengths in self.segments
                for _ in layers
            ]

        self.keys, self.values = rows(), rows()
        shape = (3, len(self.segments[0][1]))
        self.positions = [torch.randint(0, 400, shape, generator=made) for _ in self.segments]
        return self

    def fill(self, leases: Sequence[KvLease]) -> list[KvLease]:
        for lease, (layers, lengths) in zip(leases, self.segments, strict=True):
            device = lease.lengths.device
            lease.lengths = torch.tensor(lengths, dtype=torch.int32).to(device)
            for layer in layers:
                for row, count in enumerate(lengths):
                    keys, values = lease.rows(row, layer, count)
                    keys.copy_(self.keys[layer][row].to(device))
                    values.copy_(self.values[layer][row].to(device))
        return list(leases)

    def on(self, engine: Engine) -> list[KvLease]:
        capacities = [(layers, [count + ROOM for count in lengths]) for layers, lengths in self.segments]
        return self.fill(engine.lease_all(capacities))

    def step(self, hf: Any, tokens: torch.Tensor, running: Sequence[bool] | None = None) -> torch.Tensor:
        """Logits after `tokens`, whose keys and values are appended where `running`."""
        text = hf.model.language_model
        hidden, rope = text.embed_tokens(tokens), text.config.rope_parameters
        for (layers, _), positions in zip(self.segments, self.positions, strict=True):
            for number in layers:
                layer = text.layers[number]
                x, attention = layer.input_layernorm(hidden), layer.self_attn
                parts = (attention.q_proj, attention.k_proj, attention.v_proj)
                q, k, v = (part(x).unflatten(-1, (-1, 32)) for part in parts)
                q, k = (rotated(part, positions, rope) for part in (q, k))
                seen = []
                for row in range(len(tokens)):
                    held = []
                    for kept, new in ((self.keys[number], k), (self.values[number], v)):
                        if running is None or running[row]:
                            kept[row] = torch.cat([kept[row], new[None, row]])
                        held.append(kept[row].repeat_interleave(q.shape[1] // 2, 1))
                    weights = torch.einsum("hd,nhd->hn", q[row], held[0]) / 32**0.5
                    seen.append(torch.einsum("hn,nhd->hd", weights.softmax(-1), held[1]).flatten())
                hidden = hidden + attention.o_proj(torch.stack(seen))
                hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            positions += 1
        return hf.lm_head(text.norm(hidden))

    def check(self, leases: Sequence[KvLease]) -> None:
        """That the leases hold what this holds."""
        for lease in leases:
            for layer in lease.layers:
                for row, expected in enumerate(self.keys[layer]):
                    keys, values = lease.rows(row, layer, len(expected))
                    torch.testing.assert_close(keys.cpu(), expected, atol=5e-5, rtol=0)
                    torch.testing.assert_close(values.cpu(), self.values[layer][row], atol=5e-5, rtol=0)


ONE = [(range(0, 6), [40, 7, 64])]
TWO = [(range(0, 2), [70, 33, 90]), (range(2, 6), [20, 30, 61])]
THREE = [(range(0, 1), [95, 60, 31]), (range(1, 5), [50, 32, 28]), (range(5, 6), [1, 30, 20])]


@pytest.fixture
def short_chunks(monkeypatch):
    for module in (lanes, decode, device_decode):
        monkeypatch.setattr(module, "CHUNK", 4)


@pytest.mark.parametrize("segments", [ONE, TWO, THREE], ids=["one", "two", "three"])
@torch.no_grad()
def test_steps_over_segments_on_a_cpu(model, hf_model, segments, short_chunks):
    """Over block and chunk borders; one row retires. A recorded step is the eager one, bit by bit."""
    case = Case(segments)
    leases = [case.on(model.engine) for _ in range(2)]
    loops = [
        DecodeLoop(model.base.decoder, own, [p.clone() for p in case.positions], ROOM, record=record)
        for own, record in zip(leases, (True, False), strict=True)
    ]
    tokens, running = torch.tensor([3, 14, 159]), [True] * 3
    for step in range(ROOM):
        recorded, eager = (loop.step(tokens) for loop in loops)
        assert torch.equal(recorded, eager), step
        expected = case.step(hf_model, tokens, running)
        torch.testing.assert_close(recorded[running], expected[running], atol=2e-4, rtol=0)
        tokens = (expected.argmax(-1) + step) % 600
        if step in (2, 5):
            running[1 if step == 2 else 2] = False
            for loop in loops:
                loop.retire(~torch.tensor(running))
    for loop, own in zip(loops, leases, strict=True):
        case.check(own)
        counts = [[n + grown for n, grown in zip(rows, (ROOM, 3, 6), strict=True)] for _, rows in segments]
        assert loop.lengths.tolist() == counts
        assert [lease.lengths.tolist() for lease in own] == [rows for _, rows in segments]
        with pytest.raises(GlimpseError, match="pool is full"):
            loop.step(tokens)
    can = recording.available("cpu", model.dtype, decode._OPS)
    assert (loops[0].recording is not None) == can and loops[1].recording is None


@pytest.mark.parametrize("segments", [TWO, THREE], ids=["two", "three"])
@torch.no_grad()
def test_a_captured_step_serves_other_lengths_positions_and_blocks(hf_model, segments, short_chunks):
    """Fewer rows too. The host reads nothing."""
    others = [
        [(layers, [n // 2 + 1 for n in lengths]) for layers, lengths in segments],
        [(layers, [2 * n, n, n + 4, 5]) for layers, (n, *_) in segments],
    ]
    tokens = torch.tensor([3, 14, 159, 26])
    held = []
    with device() as here:
        ours = here.model(None, capture=TapeCapture())
        ours.engine = roomy(ours)
        for seed, rows in enumerate([segments, *others]):
            case = Case(rows, seed)
            held.append(case.on(ours.engine))  # keeps its blocks: the next one begins elsewhere
            positions = [p.to("cuda") for p in case.positions]
            with here.gpu.nothing_waits():
                ours.engine.lease_all(rows)
                loop = DeviceLoop(ours.engine, held[-1], positions, ROOM)
            batch = len(rows[0][1])
            fed, running = tokens[:batch], [True] * batch
            for step in range(ROOM):
                given, over = fed.to("cuda"), ~torch.tensor(running).to("cuda")
                here.waits.clear()
                with here.gpu.nothing_waits():
                    if step == 6:
                        loop.retire(over)
                    found = loop.step(given)
                assert not here.waits
                expected = case.step(hf_model, fed, running)
                torch.testing.assert_close(found.cpu()[running], expected[running], atol=2e-4, rtol=0)
                fed = (expected.argmax(-1) + step) % 600
                if step == 5:
                    running[-1] = False
            case.check(held[-1])
            loop.close()
        steps = [key for key in ours.engine.graphs._held if key[0] == "step"]
        layers = tuple(layers for layers, _ in segments)
        widths = (LEAST_WIDTH,) * len(layers)
        assert steps == [("step", 4, widths, ours.engine.pool.generation, layers)]
        assert [tape.replays for tape in tapes(ours)] == [3 * ROOM - 1]


@torch.no_grad()
def test_other_widths_and_other_segments_are_captured_on_their_own(hf_model):
    """As many lanes, but other memory: what chooses tokens for one must not for the other."""
    wide = [(range(0, 2), [300, 8, 4]), (range(2, 6), [20, 30, 61])]
    early = [(range(0, 1), [70, 33, 90]), (range(1, 6), [20, 30, 61])]
    first = torch.randn(3, 640, generator=torch.Generator().manual_seed(1))
    with device() as here:
        ours = here.model(None, capture=TapeCapture())
        ours.engine = roomy(ours)
        for seed, rows in enumerate([TWO, wide, early, TWO, early, ONE, wide]):
            case = Case(rows, seed)
            leases = case.on(ours.engine)
            loop = DeviceLoop(ours.engine, leases, [p.to("cuda") for p in case.positions], ROOM)
            found = list(loop.tokens(first.to("cuda"), Choice(), 5))
            tokens = [first.argmax(-1)]
            while len(tokens) < 5:
                tokens.append(case.step(hf_model, tokens[-1]).argmax(-1))
            assert torch.stack(found).tolist() == torch.stack(tokens).tolist()
            loop.close()
            for lease in leases:
                lease.release()
        steps = [(key[2], key[4]) for key in ours.engine.graphs._held if key[0] == "step"]
        two, other = tuple(layers for layers, _ in TWO), tuple(layers for layers, _ in early)
        assert sorted(steps, key=str) == sorted(
            [((8, 8), two), ((16, 8), two), ((8, 8), other), ((8,), (range(6),))], key=str
        )
        assert sum(key[0] == "pick" for key in ours.engine.graphs._held) == 3


@torch.no_grad()
def test_leases_of_two_pools_are_decoded_without_a_capture(hf_model):
    """Whoever leases one by one may meet a pool that grows in between."""
    case = Case(TWO)
    with device() as here:
        ours = here.model(None, capture=TapeCapture())
        leases = [ours.engine.lease([n + ROOM for n in rows], layers) for layers, rows in reversed(TWO)]
        leases = case.fill(leases[::-1])
        assert leases[0].pool is not leases[1].pool
        loop = DeviceLoop(ours.engine, leases, [p.to("cuda") for p in case.positions], ROOM)
        tokens = torch.tensor([5, 6, 7])
        for _ in range(3):
            expected = case.step(hf_model, tokens)
            torch.testing.assert_close(loop.step(tokens.to("cuda")).cpu(), expected, atol=2e-4, rtol=0)
            tokens = expected.argmax(-1)
        assert not tapes(ours) and LAG < ROOM


@pytest.mark.parametrize("on_device", [False, True], ids=["cpu", "device"])
@torch.no_grad()
def test_one_segment_cut_in_two_says_the_same(model, on_device):
    """Prefill's keys and values moved to two leases: tokens, logits, `kv`, and the room after all."""
    batch, _ = make_batch([[5, (3, 5), 7], [3], [9, (2, 2), 4, (4, 3), 2]])
    with device() as here:
        ours = here.model(capture=TapeCapture()) if on_device else model
        expected = ours.prefill(**batch, max_new_tokens=9)
        found = ours.prefill(**batch, max_new_tokens=9)
        state = found._state
        (whole,) = state.leases
        parts = [(layers, list(whole.capacities)) for layers in (range(0, 3), range(3, 6))]
        rooms = state._rooms
        rooms.leases, rooms.next_positions = ours.engine.lease_all(parts), rooms.next_positions * 2
        for lease in state.leases:
            lease.lengths = whole.lengths
            for layer in lease.layers:
                lease.keys(layer).copy_(whole.keys(layer)), lease.values(layer).copy_(whole.values(layer))
        whole.release()
        tokens, logits = found.decode(9)
        wanted, theirs = expected.decode(9)
        assert tokens.tolist() == wanted.tolist() and logits.tolist() == theirs.tolist()
        for layer in (*range(6), -1):
            for row in range(3):
                for a, b in zip(found.kv(row, layer), expected.kv(row, layer), strict=True):
                    assert a.shape == b.shape and a.tolist() == b.tolist()
        with pytest.raises(IndexError):
            found.kv(0, 6)
        state.leases[1].lengths = state.leases[1].lengths - 1  # it is the layer's own that count
        differ = [len(expected.kv(2, layer)[0]) - len(found.kv(2, layer)[0]) for layer in range(6)]
        assert differ == [0, 0, 0, 1, 1, 1]
        if on_device:
            pool = ours.engine.pool
            del lease, whole, rooms, state, found, expected
            gc.collect()
            assert pool.runs.free == pool.blocks


@pytest.mark.parametrize(
    "layers",
    [[range(0, 3)], [range(0, 3), range(4, 6)], [range(0, 4), range(3, 6)], [range(3, 6), range(0, 3)]],
    ids=["too few", "gap", "twice", "order"],
)
def test_leases_that_are_not_all_layers_in_order(model, layers):
    leases = [model.engine.lease([4], own) for own in layers]
    nowhere = [torch.zeros(3, 1, dtype=torch.int64)] * len(leases)
    with pytest.raises(GlimpseError, match="expected layers 0 to 5 in order"):
        DecodeLoop(model.base.decoder, leases, nowhere, 1)
    with device() as here:
        ours = here.model(None)
        leases = [ours.engine.lease([4], own) for own in layers]
        with pytest.raises(GlimpseError, match="expected layers 0 to 5 in order"):
            DeviceLoop(ours.engine, leases, [p.to("cuda") for p in nowhere], 1)


@pytest.mark.parametrize("longest", [[70], [300], [512, 257], [1000, 600, 90], [64, 2000]], ids=str)
def test_a_warm_up_knows_all_widths_that_shorter_prompts_need(longest):
    def widths(rows):
        return tuple(bucket(-(-n // BLOCK_SIZE), LEAST_WIDTH) for n in rows)

    shorter = [
        widths([-(-n * part // 1) for n in longest]) for part in (Fraction(n, 4000) for n in range(1, 4001))
    ]
    found = _shorter(longest)
    assert found[0] == tuple(longest) and len(set(map(widths, found))) == len(found)
    assert set(map(widths, found)) == set(shorter)

# SPDX-License-Identifier: Apache-2.0
"""A recording replays exactly what was called, on what memory holds then."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
import torch

from glimpse_kernels import (
    Recording,
    UnsupportedError,
    _ext,
    compact,
    decode_attention,
    force_backend,
    recording,
    rms_norm,
    rope,
    swiglu,
)
from tests.kernels.kernel_cases import forced_isa, isas_here

HEADERS = Path(__file__).parents[2] / "csrc" / "include" / "glimpse"
pytestmark = pytest.mark.skipif(
    _ext.compiled() is None, reason=f"compiled extension not available: {_ext.compiled_error()}"
)

BATCH, HEADS, KV, DIM, BLOCK, BLOCKS = 3, 4, 2, 8, 4, 12


class Sublayer:
    """The attention half of a decode step without its products, all on static memory."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.x = torch.randn(BATCH, HEADS * DIM).to(dtype)
        self.hidden = torch.randn(BATCH, HEADS * DIM).to(dtype)
        self.weight = torch.rand(HEADS * DIM).to(dtype)
        self.q = torch.zeros(BATCH, HEADS * DIM, dtype=dtype)
        self.k, self.v = torch.randn(2, BATCH, KV, DIM).to(dtype).unbind(0)
        self.pools = [torch.zeros(BLOCKS, BLOCK, KV, DIM, dtype=dtype) for _ in range(2)]
        self.table = torch.arange(BLOCKS, dtype=torch.int32).view(BATCH, -1)
        self.lengths = torch.zeros(BATCH, dtype=torch.int32)
        self.slots = torch.full((BATCH,), -1, dtype=torch.int32)
        self.cos, self.sin = torch.zeros(BATCH, DIM // 2), torch.zeros(BATCH, DIM // 2)
        self.attended = torch.zeros(BATCH, HEADS, DIM, dtype=dtype)
        self.out = torch.zeros(BATCH, HEADS * DIM, dtype=dtype)

    def feed(self, step: int, active: list[bool]) -> None:
        """What a step brings: other rows, positions, lengths and slots."""
        generator = torch.Generator().manual_seed(step)
        for t in (self.x, self.hidden, self.k, self.v):
            t.copy_(torch.randn(t.shape, generator=generator))
        angles = torch.randn(self.cos.shape, generator=generator)
        torch.cos(angles, out=self.cos)
        torch.sin(angles, out=self.sin)
        rows = torch.arange(BATCH) * (BLOCKS // BATCH * BLOCK) + step
        on = torch.tensor(active)
        self.slots.copy_(torch.where(on, rows, -1))
        self.lengths.copy_(torch.where(on, step + 1, 0))

    def run(self) -> None:
        rms_norm(self.x, self.weight, 1e-6, residual=self.hidden, out=self.q)
        k_slots, v_slots = (pool.flatten(0, 1) for pool in self.pools)
        q = self.q.view(BATCH, HEADS, DIM)
        rope(q, self.k, self.cos, self.sin, v=self.v, k_out=k_slots, v_out=v_slots, slots=self.slots)
        decode_attention(q, *self.pools, self.table, self.lengths, out=self.attended)
        swiglu(self.attended.flatten(1), self.q, out=self.out)


def twins(dtype: torch.dtype) -> tuple[Sublayer, Sublayer]:
    torch.manual_seed(1)
    first = Sublayer(dtype)
    torch.manual_seed(1)
    return first, Sublayer(dtype)


def same(a: Sublayer, b: Sublayer) -> bool:
    pairs = [(a.out, b.out), (a.hidden, b.hidden), *zip(a.pools, b.pools, strict=True)]
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("isa", isas_here())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replays_are_the_calls_again_with_other_lengths_and_slots(isa: str, dtype: torch.dtype) -> None:
    recorded, eager = twins(dtype)
    with forced_isa(isa):
        steps: Recording | None = None
        for step in range(2 * BLOCK + 1):  # over two block borders
            active = [True, step < 5, step % 3 != 1]
            for layer in (recorded, eager):
                layer.feed(step, active)
            eager.run()
            if steps is None:
                with Recording() as steps:
                    recorded.run()
            else:
                steps.replay()
            assert same(recorded, eager), step
    assert (
        steps is not None
        and steps.ops == ("rms_norm", "rope", "decode_attention", "swiglu")
        and len(steps) == 4
    )


def test_the_instruction_set_is_that_of_the_replay() -> None:
    recorded, eager = twins(torch.float32)
    with forced_isa("baseline"), Recording() as steps:
        recorded.run()
    for isa in isas_here():
        with forced_isa(isa):
            for layer in (recorded, eager):
                layer.feed(2, [True, True, True])
            steps.replay()
            eager.run()
            assert same(recorded, eager), isa


def test_replay_on_another_thread_and_recording_on_one_only() -> None:
    recorded, eager = twins(torch.float32)
    seen: list[int] = []

    def elsewhere() -> None:
        with Recording() as own:  # a recording here does not disturb the one there
            eager.run()
        seen.append(len(own))

    with Recording() as steps:
        recorded.run()
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert seen == [4] and len(steps) == 4
    for layer in (recorded, eager):
        layer.feed(1, [True, False, True])
    eager.run()
    thread = threading.Thread(target=steps.replay)
    thread.start()
    thread.join()
    assert same(recorded, eager)


def test_replay_lets_other_threads_run() -> None:
    x = torch.randn(4000, 1000)
    weight, out = torch.ones(1000), torch.empty(4000, 1000)
    with Recording() as steps:
        for _ in range(100):
            rms_norm(x, weight, 1e-6, out=out)
    thread = threading.Thread(target=steps.replay)
    turns = 0
    thread.start()
    while thread.is_alive():
        turns += 1
    assert turns > 100  # holding the GIL it would be the few before the replay began


def test_compact_is_refused_by_name_and_the_rest_stays_usable() -> None:
    src, dst = torch.randn(4, 3), torch.zeros(2, 3)
    index = torch.tensor([3, 1], dtype=torch.int32)
    x, out = torch.randn(2, 3), torch.zeros(2, 3)
    with Recording() as steps:
        with pytest.raises(TypeError, match="compact: cannot be recorded"):
            compact(index, None, None, None, None, None, rows=[(src, dst)])
        swiglu(x, x, out=out)
    assert steps.ops == ("swiglu",) and not dst.any()
    compact(index, None, None, None, None, None, rows=[(src, dst)])
    assert torch.equal(dst, src[[3, 1]])


def test_ops_whose_params_hold_structs_of_the_call_are_all_refused() -> None:
    """An op with a pointer to another params struct must be named in recording.cpp: the struct dies with the call."""
    source = (HEADERS.parents[1] / "cpu" / "recording.cpp").read_text()
    names = re.search(r"not_recorded\[\] = \{([^}]*)\}", source)
    assert names is not None
    refused = set(re.findall(r'"(\w+)"', names[1]))
    found = set()
    for header in HEADERS.glob("*.h"):
        params = re.search(r"typedef struct glimpse_(\w+)_params \{(.*?)\}", header.read_text(), re.DOTALL)
        if params and re.search(r"\bglimpse_\w+\s*\*", params[2]):
            found.add(params[1])
    assert found == refused


def test_recordings_do_not_nest() -> None:
    x, out = torch.randn(2, 3), torch.zeros(2, 3)
    with Recording() as steps:
        swiglu(x, x, out=out)
        with pytest.raises(ValueError, match="do not nest"), Recording():
            pass
        with pytest.raises(ValueError, match="has not ended"):
            steps.replay()
        swiglu(x, x, out=out)
    assert len(steps) == 2
    with pytest.raises(ValueError, match="begun already"), steps:
        pass
    with Recording():
        with pytest.raises(ValueError, match="while this thread is recording"):
            steps.replay()


def test_an_exception_leaves_the_thread_not_recording() -> None:
    x, out = torch.randn(2, 3), torch.zeros(2, 3)
    steps = Recording()
    with pytest.raises(KeyError), steps:
        swiglu(x, x, out=out)
        raise KeyError
    assert len(steps) == 0
    with pytest.raises(ValueError, match="found none"):
        steps.replay()
    with steps:  # and it may begin again
        swiglu(x, x, out=out)
    assert len(steps) == 1
    del steps


def test_a_failing_op_is_named() -> None:
    """The kernel looks at its numbers again at each replay, so slots that are wrong then fail then."""
    layer, _ = twins(torch.float32)
    layer.feed(0, [True] * BATCH)
    with Recording() as steps:
        layer.run()
    layer.lengths.fill_(BLOCKS * BLOCK + 1)
    try:
        decode_attention(
            layer.q.view(BATCH, HEADS, DIM), *layer.pools, layer.table, layer.lengths, out=layer.attended
        )
    except ValueError as error:
        with pytest.raises(ValueError, match=r"op 3 of 4 \(decode_attention\): ") as caught:
            steps.replay()
        assert str(error) in str(caught.value)
    else:
        pytest.fail("expected a kernel that refuses lengths past its table")


def test_an_empty_recording_and_what_is_not_recorded() -> None:
    x = torch.ones(2, 3)
    with Recording() as steps:
        x.add_(1)
    steps.replay()
    assert len(steps) == 0 and x.eq(2).all()


def test_keep_holds_the_memory() -> None:
    x, out = torch.randn(2, 64), torch.zeros(2, 64)
    want = torch.nn.functional.silu(x) * x
    with Recording() as steps:
        swiglu(x, x, out=out)
    steps.keep(x)
    address = x.data_ptr()
    del x
    assert all(t.data_ptr() != address for t in [torch.randn(2, 64) for _ in range(50)])
    steps.replay()
    torch.testing.assert_close(out, want)


def test_where_it_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    assert recording.available() and recording.available("cpu", torch.bfloat16, ("rms_norm", "rope"))
    assert "not of cuda" in recording.unavailable("cuda")
    assert "float16" in recording.unavailable("cpu", torch.float16, ("rms_norm",))
    with force_backend("cpu"):
        assert recording.available()
    with force_backend("naive"):
        assert "naive is forced" in recording.unavailable()
        with pytest.raises(UnsupportedError, match="naive is forced"):
            Recording()
    monkeypatch.setattr(_ext, "_load", lambda: (None, "not built"))
    assert recording.unavailable() == "compiled extension not available (not built)"

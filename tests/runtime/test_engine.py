# SPDX-License-Identifier: Apache-2.0
"""What is kept between calls: memory to decode in, captured work, and how it is made beforehand."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import glimpse_runtime as glimpse
from glimpse_runtime import graphs as graphs_module
from glimpse_runtime.engine import Engine
from glimpse_runtime.graphs import CudaCapture, Graphs
from glimpse_runtime.memory import Unlimited, memory_of, readable
from glimpse_runtime.tail import row_buckets
from tests.graph_tape import Tape, TapeCapture

from .conftest import make_batch
from .on_stand_in import device, tapes
from .test_pool import FakeMemory, bytes_of


def kinds(model, kind):
    """(lanes, widths) of captured steps, or (lanes, what it can do) of captured choices, oldest first."""
    return [key[1:3] for key in model.engine.graphs._held if key[0] == kind]


def test_a_warm_up_captures_the_largest_first_and_calls_replay_it(model):
    batch, _ = make_batch([[9, (2, 2), 4], [3], [7]])
    expected = model.generate(**batch, max_new_tokens=4, eos_token_id=None)
    seen = []
    with device() as here:
        gpu = here.model(capture=TapeCapture())
        report = gpu.warmup(
            batch_sizes=[1, 4, 2], tokens=70, max_new_tokens=4, progress=lambda *at: seen.append(at)
        )
        assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
        assert kinds(gpu, "step") == [(4, (8,)), (2, (8,)), (1, (8,))]
        assert [lanes for lanes, _ in kinds(gpu, "pick")] == [4, 2, 1]
        assert report.graphs == len(gpu.engine.graphs) == 6 and report.seconds > 0
        assert report.kv_rows == gpu.engine.pool.blocks * 32 >= 4 * 70
        assert report.kv_bytes == bytes_of(gpu.engine.pool.blocks)
        assert gpu.engine.pool.runs.free == gpu.engine.pool.blocks
        pool = gpu.engine.pool
        assert torch.equal(gpu.generate(**batch, max_new_tokens=4, eos_token_id=None), expected)
        assert gpu.engine.pool is pool
        assert len(kinds(gpu, "step")) == len(kinds(gpu, "pick")) == 3


def test_a_warm_up_with_a_prompt_makes_the_calls_themselves(model):
    batch, alone = make_batch([[5, (3, 5), 7]])
    options = {"max_remain_ratio": 0.4, "do_sample": True, "top_k": 5}
    with device() as here:
        gpu = here.model(capture=TapeCapture())
        report = gpu.warmup(alone[0], batch_sizes=[2, 1], max_new_tokens=300, **options)
        assert kinds(gpu, "step") == [
            (2, (16,)),
            (2, (8,)),
            (1, (16,)),
            (1, (8,)),
        ]  # 300 new rows are more than 8 blocks
        assert all(kind.sample and kind.top_k == 5 for _, kind in kinds(gpu, "pick"))
        held = len(gpu.engine.graphs)
        assert report.graphs == held > 4  # layers behind the stage too
        gpu.generate(**batch, max_new_tokens=300, min_new_tokens=2, eos_token_id=list(range(640)), **options)
        assert len(gpu.engine.graphs) == held + 1  # another way to choose: not before two tokens


def test_behind_a_warm_up_shorter_prompts_find_their_layers_captured(model):
    """Whatever number of rows stays: nothing is captured any more."""
    _, alone = make_batch([[40, (12, 12), 60]])
    with device() as here:
        gpu = here.model(capture=TapeCapture())
        gpu.warmup(alone[0], max_new_tokens=4, threshold=0.0)
        tails = [key[2] for key in gpu.engine.graphs._held if key[0] == "tail"]
        assert tails == row_buckets(tails[0]) and tails[0] >= 40 + 144 + 60 and tails[-1] == 64
        held = len(gpu.engine.graphs)
        for rows in ([5, (3, 5), 7], [30, (9, 7), 20], [2, (12, 12), 60]):
            batch, _ = make_batch([rows])
            options = {"threshold": 0.0, "max_new_tokens": 4, "eos_token_id": None}
            expected = model.generate(**batch, **options)
            assert torch.equal(gpu.generate(**batch, **options), expected)
        assert len(gpu.engine.graphs) == held


def test_a_warm_up_can_make_the_pool_as_large_as_there_is_room():
    _, alone = make_batch([[5, (3, 5), 7]])
    with device() as here:
        gpu = here.model()
        gpu.engine = Engine(
            gpu.base.decoder, capture=TapeCapture(), memory=FakeMemory(bytes_of(100)), graph_bytes=bytes_of(2)
        )
        report = gpu.warmup(alone[0], batch_sizes=[2], max_new_tokens=3, kv_share=0.5)
        # Half of what is free, less what captured work may hold; the fake device saw no call take anything.
        assert report.kv_bytes == bytes_of(48) and report.kv_rows == 48 * 32
        with pytest.raises(glimpse.GlimpseError, match="too small"):
            gpu.prefill(**make_batch([[48 * 32]])[0], max_new_tokens=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_sizes": []}, "batch_sizes"),
        ({"batch_sizes": [2, 0]}, "batch_sizes"),
        ({"tokens": 0}, "tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"kv_share": 0.5}, "kv_share: expected inputs"),
        ({"kv_share": 1.5, "inputs": {"input_ids": torch.tensor([[3]])}}, "kv_share: expected a share"),
        ({"inputs": {"input_ids": torch.tensor([[3], [4]])}}, "expected one prompt, found 2"),
        ({"inputs": {}}, "input_ids"),
    ],
)
def test_warm_ups_that_make_no_sense(model, options, message):
    with pytest.raises(glimpse.GlimpseError, match=message):
        model.warmup(**options)


def test_a_cpu_has_little_to_warm_up(model):
    report = model.warmup()
    assert (report.graphs, report.graph_bytes, report.kv_rows, report.kv_bytes) == (0, 0, 0, 0)
    report = model.warmup(make_batch([[5, (3, 5), 7]])[1][0], batch_sizes=[2], max_new_tokens=5, kv_share=0.9)
    assert report.graphs == report.kv_bytes == 0


def test_captured_work_keeps_to_its_budget(model):
    """Each piece costs something; what was not used for longest goes, and comes back when it is needed."""

    class Costly(TapeCapture):
        def __call__(self, work) -> Tape:
            tape = super().__call__(work)
            tape.cost = 10
            return tape

    with device() as here:
        gpu = here.model(None)
        gpu.engine = Engine(gpu.base.decoder, capture=Costly(), graph_bytes=40)
        for rows in ([[4]], [[4], [5]], [[6]], [[9], [2], [3]], [[7]]):
            batch, _ = make_batch(rows)
            options = {"max_new_tokens": 3, "eos_token_id": None}
            found = gpu.generate(**batch, **options)
            assert torch.equal(found, model.generate(**batch, plan=None, **options))
            assert gpu.engine.graphs.cost <= 40
        assert gpu.engine.graphs.cost == 40
        # A bound below what one call needs: that stays for the call, and nothing is captured for every token.
        gpu.engine = Engine(gpu.base.decoder, capture=Costly(), graph_bytes=5)
        for _ in range(2):
            gpu.generate(**make_batch([[4]])[0], max_new_tokens=6, eos_token_id=None)
            assert gpu.engine.graphs.cost == 20 and len(tapes(gpu)) == 2
        gpu.generate(**make_batch([[4], [5]])[0], max_new_tokens=6, eos_token_id=None)
        assert gpu.engine.graphs.cost == 20 and len(tapes(gpu)) == 4


def test_streams_follow_each_other():
    """Static memory is written by one stream at a time: another one waits for what the last one was given."""

    class Stream:
        def __init__(self):
            self.waited = []

        def wait_stream(self, other):
            self.waited.append(other)

    first, second = Stream(), Stream()
    with device() as here:
        engine = here.model(None).engine
        callers = [first, first, second, first]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "current_stream", lambda device=None: callers[0])
            while callers:
                with engine.call():
                    callers.pop(0)
    assert first.waited == [second] and second.waited == [first]


def test_memory_that_all_graphs_have_left_is_not_shared_again(monkeypatch):
    """torch lets a graph join the memory of others only as long as one of these is there."""
    pools, handles = [], iter(range(100))

    class CudaGraph:
        def replay(self): ...

        def reset(self): ...

    @contextmanager
    def capturing(graph, *, pool, stream, capture_error_mode):
        pools.append(pool)
        yield

    for name, fake in {
        "Stream": lambda device, priority: None,
        "CUDAGraph": CudaGraph,
        "graph": capturing,
        "graph_pool_handle": lambda: next(handles),
        "empty_cache": lambda: None,
        "mem_get_info": lambda device: (5, 9),
        "current_stream": lambda device: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    graphs, done = Graphs(CudaCapture(torch.device("cuda"))), []
    for key in "aab":
        graphs.run(key, lambda: done.append(1))
    assert len(set(pools)) == 1 and len(done) == 4  # twice for each key that is new, replays do nothing here
    graphs.drop(lambda key: key == "a")
    graphs.run("c", lambda: None)
    assert len(set(pools)) == 1
    graphs.drop()
    graphs.run("a", lambda: None)
    graphs.run("b", lambda: None)
    assert pools[-1] == pools[-2] != pools[0]


def test_a_capture_is_undisturbed(monkeypatch):
    """No garbage collection, no inference mode, and after a failure the caller's stream is the current one again."""
    seen, current = [], ["caller's"]

    @contextmanager
    def capturing(graph, *, pool, stream, capture_error_mode):
        current[0] = "capture's"
        yield
        current[0] = "caller's"

    for name, fake in {
        "Stream": lambda device, priority: None,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None, reset=lambda: None),
        "graph": capturing,
        "graph_pool_handle": lambda: 0,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device: (5, 9),
        "current_stream": lambda device: current[0],
        "set_stream": lambda stream: current.__setitem__(0, stream),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def work():
        seen.append((current[0], gc.isenabled(), torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        if len(seen) == 4:
            raise RuntimeError("not in a capture")

    graphs = Graphs(CudaCapture(torch.device("cuda")))
    with torch.inference_mode():
        graphs.run("first", work)
        assert seen == [("caller's", True, True, False), ("capture's", False, False, False)]
        with pytest.raises(RuntimeError, match="not in a capture"):
            graphs.run("second", work)
        assert torch.is_inference_mode_enabled()
    assert current == ["caller's"] and gc.isenabled() and "second" not in graphs


def test_definitions_that_read_the_device_are_not_captured(monkeypatch, caplog):
    """Until their kernels have passed on a GPU, the definitions serve there: each call would end in the middle of a capture."""
    monkeypatch.setattr(graphs_module, "CudaCapture", lambda device: "captured")
    gpu = torch.device("cuda:0")
    for serves, wanted in (("triton", "captured"), ("naive", None)):
        monkeypatch.setattr(graphs_module.dispatch, "choose", lambda op, *given, serves=serves: serves)
        assert graphs_module.capture_on(gpu, torch.bfloat16) == wanted
    assert "rope" in caplog.text
    assert graphs_module.capture_on(torch.device("cpu"), torch.float32) is None


def test_memory_in_words():
    assert [readable(n) for n in (5, 2048, 3 << 20, 5 << 29)] == ["5 bytes", "2.0 KiB", "3.0 MiB", "2.5 GiB"]
    assert isinstance(memory_of(torch.device("cpu")), Unlimited)
    assert memory_of(torch.device("cpu")).free() > 1 << 50

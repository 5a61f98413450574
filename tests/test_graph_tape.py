# SPDX-License-Identifier: Apache-2.0
"""The stand-in for CUDA graphs freezes what a graph freezes, and nothing else."""

from __future__ import annotations

import torch

from glimpse_kernels import rms_norm
from glimpse_runtime.graphs import Graphs, bucket
from tests.graph_tape import TapeCapture
from tests.stand_in import stand_in_gpu


def test_replay_reads_memory_again() -> None:
    x, y = torch.arange(4.0), torch.empty(4)
    graphs = Graphs(TapeCapture())

    def work() -> None:
        torch.add(rms_norm(x[None], torch.ones(4), 1e-6)[0], x[1:].sum(), out=y)

    for start in (0.0, 3.0, -2.0):
        x.copy_(torch.arange(4.0) + start)
        graphs.run("same", work)
        wanted = x / (x.square().mean() + 1e-6).sqrt() + x[1:].sum()
        torch.testing.assert_close(y, wanted)
    assert len(graphs) == 1 and graphs.capture.tapes[0].replays == 2  # type: ignore[union-attr]


def test_numbers_of_the_host_are_frozen() -> None:
    """The mistake it is there to show: a Python number taken from a tensor."""
    length, y = torch.tensor(2), torch.empty(1)
    graphs = Graphs(TapeCapture())

    def work() -> None:
        y.fill_(float(length))

    graphs.run("same", work)
    length.fill_(5)
    graphs.run("same", work)
    assert y.item() == 2.0


def test_random_numbers_are_fresh_and_state_counts_once() -> None:
    count, noise = torch.zeros(1), torch.empty(3)
    graphs = Graphs(TapeCapture())

    def work() -> None:
        count.add_(1)
        noise.exponential_()

    seen = []
    for _ in range(3):
        graphs.run("same", work)
        seen.append(noise.clone())
    assert count.item() == 3
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_on_a_gpu_that_is_none() -> None:
    with stand_in_gpu() as gpu:
        x = torch.arange(6, dtype=torch.float32, device="cuda").view(2, 3)
        y, at = torch.empty(3, device="cuda"), torch.zeros(1, device="cuda", dtype=torch.int64)
        graphs = Graphs(TapeCapture())

        def work() -> None:
            y.copy_(x.index_select(0, at)[0] * 2)

        for row in (0, 1, 0):
            at.fill_(row)
            with gpu.nothing_waits():
                graphs.run("same", work)
            assert y.cpu().tolist() == [6.0 * row, 6.0 * row + 2, 6.0 * row + 4]


class _Costly:
    def __init__(self, cost: int) -> None:
        self.cost, self.gone = cost, False

    def replay(self) -> None:
        assert not self.gone

    def reset(self) -> None:
        self.gone = True


def test_budget_drops_what_was_not_used_for_longest() -> None:
    made: dict[str, _Costly] = {}
    costs = {"a": 40, "b": 40, "c": 40, "huge": 500}
    now = ""

    def capture(work: object) -> _Costly:
        made[now] = _Costly(costs[now])
        return made[now]

    graphs = Graphs(capture, budget=100)
    for now in ("a", "b", "a", "c"):
        graphs.run(now, lambda: None)
    assert "a" in graphs and "b" not in graphs and "c" in graphs and graphs.cost == 80
    assert made["b"].gone and not made["a"].gone
    now = "huge"
    graphs.run(now, lambda: None)
    assert len(graphs) == 1 and "huge" in graphs  # the newest stays whatever it costs
    graphs.drop(lambda key: key == "huge")
    assert not len(graphs) and made["huge"].gone


def test_without_capture_work_is_done_every_time() -> None:
    done = []
    graphs = Graphs(None)
    for _ in range(3):
        graphs.run("same", lambda: done.append(1))
    assert len(done) == 3 and not len(graphs)


def test_buckets() -> None:
    assert [bucket(n) for n in (0, 1, 2, 3, 4, 5, 64, 65)] == [1, 1, 2, 4, 4, 8, 64, 128]
    assert bucket(3, least=16) == 16

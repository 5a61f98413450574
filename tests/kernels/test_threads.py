# SPDX-License-Identifier: Apache-2.0
"""Threads of the kernels: a team that stands by for replays, idle threads, pinning, the number."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from glimpse_kernels import Recording, _ext, rms_norm, swiglu
from glimpse_kernels.rms_norm.naive import rms_norm as plain_norm
from glimpse_kernels.swiglu.naive import swiglu as plain_swiglu

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    _ext.compiled() is None, reason=f"compiled extension not available: {_ext.compiled_error()}"
)
OPENMP = ("OMP_", "GOMP_", "KMP_", "MKL_", "GLIMPSE_NUM_THREADS")


def run(program: str, **environment: str) -> str:
    """What a program prints that runs with these OpenMP variables and no others."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(OPENMP)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(_ext.extension().__file__)],
        env={**clean, **environment}, cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class Chain:
    """Calls with work for several threads, and small ones between them."""

    def __init__(self, rows: int = 96, cols: int = 1000) -> None:
        self.x = torch.randn(rows, cols)
        self.weight = torch.rand(cols)
        self.small, self.small_out = torch.randn(1, 8), torch.empty(1, 8)
        self.outs = [torch.empty(rows, cols) for _ in range(8)]

    def run(self) -> None:
        last = self.x
        for out in self.outs:
            rms_norm(last, self.weight, 1e-6, out=out)
            swiglu(self.small, self.small, out=self.small_out)
            swiglu(out, self.x, out=out)
            last = out

    def expected(self) -> torch.Tensor:
        last = self.x
        for _ in self.outs:
            last = plain_norm(last, self.weight, 1e-6)
            last = plain_swiglu(last, self.x)
        return last


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_a_team_replays_what_was_recorded(threads: int) -> None:
    """With more threads than cores, too: members that get no core are not waited for."""
    chain, module = Chain(), _ext.extension()
    module.set_num_threads(2)  # a team needs calls with work for several threads
    try:
        with Recording() as steps:
            chain.run()
        module.set_num_threads(threads)
        for seed in range(30):
            torch.manual_seed(seed)
            chain.x.copy_(torch.randn(chain.x.shape))
            for out in chain.outs:
                out.fill_(float("nan"))
            steps.replay()
            torch.testing.assert_close(chain.outs[-1], chain.expected(), rtol=1e-3, atol=1e-4)
    finally:
        module.set_num_threads(0)


def test_teams_of_two_python_threads() -> None:
    """Each caller leads a team of its own, and plain calls come between."""
    chains, module = [Chain(), Chain()], _ext.extension()
    module.set_num_threads(2)
    try:
        recordings = []
        for chain in chains:
            with Recording() as steps:
                chain.run()
            recordings.append(steps)
        both = threading.Barrier(2)

        def repeat(number: int) -> bool:
            chain, want = chains[number], chains[number].expected()
            both.wait(timeout=60)
            fine = True
            for turn in range(60):
                chain.outs[-1].fill_(float("nan"))
                chain.run() if turn % 3 == 0 else recordings[number].replay()
                fine &= torch.allclose(chain.outs[-1], want, rtol=1e-3, atol=1e-4)
            return fine

        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(repeat, (0, 1))) == [True, True]
    finally:
        module.set_num_threads(0)


ALONE = """
import ctypes, importlib.util, math, sys, time
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "torch" not in sys.modules and module.thread_pool() == "own threads"
rows, cols = 64, 4096
x = (ctypes.c_float * (rows * cols))(*(i % 7 - 3 for i in range(rows * cols)))
outs = [(ctypes.c_float * (rows * cols))() for _ in range(4)]
module.set_num_threads(3)
steps = module.Recording()
steps.begin()
for out in outs:
    module.swiglu(*map(ctypes.addressof, (x, x, out)), rows, cols, cols, cols, cols, 0)
steps.end()
want = [v * v / (1 + math.exp(-v)) for v in range(-3, 4)]
for turn in range(50):
    for out in outs:
        ctypes.memset(out, 0xFF, ctypes.sizeof(out))
    steps.replay()
    for out in outs:
        assert all(abs(out[i] - want[i % 7]) < 1e-4 for i in range(0, rows * cols, 997))
"""
"""Replays on the pool of a process that has no OpenMP."""

BUSY = """
import os, time, torch
from glimpse_kernels import _ext, Recording, rms_norm
x, weight = torch.randn(256, 2048), torch.rand(2048)
outs = [torch.empty_like(x) for _ in range(8)]
torch.set_num_threads(2)
with Recording() as steps:
    for out in outs:
        rms_norm(x, weight, 1e-6, out=out)
for _ in range(20):
    steps.replay()
torch.mm(x, x.T)
"""
"""Replays on torch's threads."""

IDLE = """
time.sleep(0.05)  # OpenMP's threads spin for some milliseconds before they sleep
before = time.process_time()
time.sleep(0.3)
print(time.process_time() - before)
"""


@pytest.mark.parametrize("program", [ALONE, BUSY], ids=["own pool", "OpenMP"])
def test_idle_threads_do_not_spin(program: str) -> None:
    assert float(run(program + IDLE)) < 0.02


def test_passive_waiting() -> None:
    assert float(run(BUSY + IDLE.replace("0.05", "0.002"), OMP_WAIT_POLICY="passive")) < 0.02


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity of threads on this system")
@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="torch without OpenMP")
def test_kernels_are_pinned_as_openmp_is() -> None:
    program = """
import os, time, torch
every = os.sched_getaffinity(0)  # before OpenMP starts
from glimpse_kernels import _ext
torch.set_num_threads(2)
used, deadline = set(), time.monotonic() + 60
while len(used) < 2 and time.monotonic() < deadline:
    used |= set(_ext.extension().thread_ids(8))
print(*sorted(len(os.sched_getaffinity(i)) for i in used))
"""
    cores = len(os.sched_getaffinity(0))
    assert run(program) == f"{cores} {cores}"
    assert run(program, OMP_PROC_BIND="true", OMP_PLACES="threads") == "1 1"


NUMBER = """
import torch
import glimpse_kernels
from glimpse_kernels._ext import extension
print(torch.get_num_threads(), extension().num_threads())
torch.set_num_threads(2)
print(torch.get_num_threads(), extension().num_threads())
"""


def test_one_number_for_torch_and_kernels() -> None:
    """The variable sets torch's number, which kernels follow; a later call of torch's own function still counts."""
    assert run(NUMBER, GLIMPSE_NUM_THREADS=" 3 ").split("\n") == ["3 3", "2 2"]
    assert run(NUMBER, GLIMPSE_NUM_THREADS="3", OMP_NUM_THREADS="1").split("\n") == ["3 3", "2 2"]


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "1025", "9" * 30])
def test_no_number_of_threads(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIMPSE_NUM_THREADS", text)
    with pytest.raises(
        ValueError, match=f"GLIMPSE_NUM_THREADS: expected a whole number from 1 to 1024, found '{text}'"
    ):
        _ext.requested_threads()


def test_unset_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIMPSE_NUM_THREADS", " ")
    assert _ext.requested_threads() is None

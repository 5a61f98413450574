# SPDX-License-Identifier: Apache-2.0
"""The compiled extension: instruction sets, threads, and a clean boundary between them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glimpse_kernels import _ext, attention
from tests.kernels.kernel_cases import cu_seqlens, forced_isa, isas_here

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    _ext.compiled() is None, reason=f"compiled extension not available: {_ext.compiled_error()}"
)

FLAGS = {
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512bf16": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"},
}
LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "torch" not in sys.modules
"""
"""Loads the extension by its path into a process that has no torch."""


def cpu_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split(":")[1].split())
    return set()


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, str(_ext.extension().__file__)],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_baseline_is_always_here() -> None:
    assert isas_here()[-1] == "baseline"


@pytest.mark.skipif(not cpu_flags(), reason="no CPU flags in /proc/cpuinfo (not x86-64 Linux)")
def test_instruction_sets_are_those_of_the_machine() -> None:
    flags = cpu_flags()
    want = [name for name in ("avx2", "avx512", "avx512bf16") if FLAGS[name] <= flags]
    assert sorted(isas_here()) == sorted([*want, "baseline"])


def test_set_isa() -> None:
    module = _ext.extension()
    before = module.isa()
    for name in isas_here():
        with forced_isa(name):
            assert module.isa() == name
    module.set_isa("auto")
    assert module.isa() == isas_here()[0]
    module.set_isa(before)
    with pytest.raises(ValueError, match="found 'sse9'"):
        module.set_isa("sse9")


def test_environment_chooses_the_instruction_set() -> None:
    program = LOAD + "print(module.isa())"
    assert run(program, GLIMPSE_CPU_ISA="baseline").stdout.strip() == "baseline"
    assert run(program, GLIMPSE_CPU_ISA="auto").stdout.strip() == isas_here()[0]
    refused = run(program, GLIMPSE_CPU_ISA="sse9")
    assert refused.returncode != 0
    assert "GLIMPSE_CPU_ISA" in refused.stderr and "found 'sse9'" in refused.stderr


def test_threads_follow_torch() -> None:
    module = _ext.extension()
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert module.num_threads() == count
    finally:
        torch.set_num_threads(before)
    module.set_num_threads(5)
    assert module.num_threads() == 5
    module.set_num_threads(0)
    assert module.num_threads() == before


def test_one_pool_with_torch() -> None:
    """Kernels run on the threads torch's own parallel ops run on: the process gains no thread by calling a kernel.

    In a process of its own, where no other test has started threads: torch's pool is started first by a torch op, then
    the kernels run, and the thread list may not have changed.
    """
    program = """
import os, torch
from glimpse_kernels._ext import extension
import glimpse_kernels
module = extension()
torch.set_num_threads(2)
tasks = lambda: {int(name) for name in os.listdir("/proc/self/task")}
torch.randn(1 << 22).exp_().sum()
before = tasks()
used = set()
for _ in range(50):
    used |= set(module.thread_ids(8))
q = torch.randn(512, 4, 64)
bounds = torch.tensor([0, 512], dtype=torch.int32)
glimpse_kernels.attention(q, q, q, bounds, bounds, causal=True)
after = tasks()
print(module.thread_pool(), len(used), before == after, used <= before)
"""
    result = run(program)
    assert result.returncode == 0, result.stderr
    *pool, used, unchanged, subset = result.stdout.split()
    if torch.backends.openmp.is_available():
        assert pool[0] == "OpenMP"
        assert (used, unchanged, subset) == ("2", "True", "True")


def test_own_threads_without_openmp() -> None:
    """In a process without torch the extension brings a pool of its own and still does every task once."""
    program = (
        LOAD
        + """
module.set_num_threads(3)
for _ in range(200):
    ids = module.thread_ids(7)
    assert len(ids) == 7 and len(set(ids)) <= 3, ids
used = set()
for _ in range(50):
    used |= set(module.thread_ids(16))
print(module.thread_pool(), "/", len(used))
"""
    )
    result = run(program)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "own threads / 3"


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_more_threads_than_cores_and_fewer_tasks_than_threads(threads: int) -> None:
    module = _ext.extension()
    q, k, v = (torch.randn(5, 1, 8) for _ in range(3))
    bounds = cu_seqlens([5])
    want = attention(q, k, v, bounds, bounds, causal=True)
    module.set_num_threads(threads)
    try:
        assert torch.equal(attention(q, k, v, bounds, bounds, causal=True), want)
    finally:
        module.set_num_threads(0)


def test_no_vector_code_is_shared_between_instruction_sets() -> None:
    """The kernels of each instruction set are local to their object; nothing of them can be merged by the linker."""
    nm = subprocess.run(
        ["nm", "-C", "--defined-only", _ext.extension().__file__], capture_output=True, text=True
    )
    if nm.returncode != 0:
        pytest.skip("nm is not installed, or the module is stripped")
    merged = [line for line in nm.stdout.splitlines() if " W " in line or " u " in line]
    sets = ("glimpse::avx512bf16", "glimpse::avx512", "glimpse::avx2", "glimpse::baseline")
    assert not [line for line in merged if any(name in line for name in sets)]

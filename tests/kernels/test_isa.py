# SPDX-License-Identifier: Apache-2.0
"""The compiled extension: instruction sets, threads, and a clean boundary between them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glimpse_kernels import _ext, attention, select_tokens
from tests.kernels.kernel_cases import cu_seqlens, forced_isa, forced_threads, isas_here

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
import os, time, torch
from glimpse_kernels._ext import extension
import glimpse_kernels
module = extension()
torch.set_num_threads(2)
tasks = lambda: {int(name) for name in os.listdir("/proc/self/task")}
torch.randn(1 << 22).exp_().sum()
before = tasks()
used = set()
deadline = time.monotonic() + 60  # a busy machine may leave the second thread without a task many times over
while len(used) < 2 and time.monotonic() < deadline:
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
import time
used, deadline = set(), time.monotonic() + 60
while len(used) < 3 and time.monotonic() < deadline:
    used |= set(module.thread_ids(16))
print(module.thread_pool(), "/", len(used))
"""
    )
    result = run(program)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "own threads / 3"


def test_attention_does_not_depend_on_the_number_of_threads() -> None:
    lengths = [300, 1, 129]
    q, k, v = (torch.randn(sum(lengths), heads, 40) for heads in (6, 3, 3))
    bounds = cu_seqlens(lengths)
    found = []
    for count in (1, 2, 3, 5):
        with forced_threads(count):
            found.append(attention(q, k, v, bounds, bounds, causal=True))
    start = 0
    for n in lengths:
        qs, ks, vs = (x[start : start + n].transpose(0, 1).double() for x in (q, k, v))
        ks, vs = ks.repeat_interleave(2, 0), vs.repeat_interleave(2, 0)
        logits = qs @ ks.transpose(1, 2) * 40**-0.5
        logits = logits.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
        want = (torch.softmax(logits, -1) @ vs).transpose(0, 1)
        torch.testing.assert_close(found[0][start : start + n].double(), want, rtol=1e-5, atol=1e-5)
        start += n
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_two_python_threads_at_once() -> None:
    """Two callers share the pool; each gets what it gets alone."""
    n = 400
    q, k, v = (torch.randn(n, 4, 64) for _ in range(3))
    bounds, logits = cu_seqlens([n]), torch.randn(n)

    def attend() -> list[Tensor]:
        return [attention(q, k, v, bounds, bounds, causal=True)]

    def choose() -> list[Tensor]:
        found = select_tokens(
            logits,
            bounds,
            threshold=0.0,
            caps=torch.tensor([n // 4], dtype=torch.int32),
            floors=torch.tensor([1], dtype=torch.int32),
            token_rows=torch.arange(n, dtype=torch.int32),
            row_keep=torch.zeros(n, dtype=torch.bool),
            cu_seqlens=bounds,
            capacity=n,
        )
        return [found.keep, found.counts, found.index, found.cu_seqlens]

    def repeat(call: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
        return [call() for _ in range(40)]

    alone = attend(), choose()
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(repeat, (attend, choose)))
    for want, results in zip(alone, together, strict=True):
        for found in results:
            assert all(torch.equal(a, b) for a, b in zip(want, found, strict=True))


SETS = ("avx512bf16", "avx512", "avx2", "baseline")
IN_A_SET = re.compile(r"glimpse::(" + "|".join(SETS) + r")::")
CORE = {
    "glimpse::num_threads",
    "glimpse::parallel_tasks",
    "glimpse::parallel_calls",
    "glimpse::with_team",
    "glimpse::thread_scratch",
    "glimpse::thread_pool_name",
    "glimpse::fail",
    "glimpse::recording",
    "glimpse::run_and_record",
    *(
        f"glimpse::{{}}::{name}"
        for name in (
            "work_entry match_library loaded_library Pool::run Pool::~Pool openmp own_pool parallel_for machine_threads "
            "start relax patience team_entry Team::lead Team::run Team::follow Team::publish Team::changed run_steps "
            "always best find table_in_use can_be_recorded has_avx2 has_avx512 has_avx512bf16"
        ).split()
    ),
}
"""Functions of common.cpp, dispatch.cpp, parallel.cpp and recording.cpp; the anonymous namespace is written {}."""


def shared_names(symbols: str) -> list[str]:
    """Lines of `nm -C` with functions of the kernels that are neither private to an instruction set nor known core code.

    The host side of the CUDA kernels (`glimpse::cuda`) is compiled once, without vector flags."""
    found = []
    for line in symbols.splitlines():
        fields = line.strip().split(maxsplit=2)
        if len(fields) != 3 or fields[1] not in "tTwWuViI":
            continue
        kind, name = fields[1:]
        if IN_A_SET.search(name):
            if kind not in "tT":  # weak: the linker keeps one of several, whichever comes first
                found.append(line)
            continue
        head = re.split(r"[(<\[]", name.replace("(anonymous namespace)", "{}"))[0].split()
        qualified = head[-1] if head else ""
        if qualified.startswith("glimpse::") and not qualified.startswith(
            ("glimpse::python::", "glimpse::cuda::")
        ):
            if qualified not in CORE:
                found.append(line)
    return found


def shared_vector_code(disassembly: str) -> list[str]:
    """Functions of `objdump -d -C` with AVX instructions (their names begin with v) outside the AVX sets."""
    found, name = [], ""
    for line in disassembly.splitlines():
        header = re.match(r"[0-9a-f]+ <(.*)>:$", line)
        if header:
            name = header[1]
            within = IN_A_SET.search(name)
            known = within is not None and within[1] != "baseline"
            narrow = within is not None and within[1] == "avx2"
        elif name and "\t" in line:
            instruction = line.split("\t", 1)[1].lstrip()
            wide = "%zmm" in instruction or "{%k" in instruction
            if (not known and instruction.startswith("v")) or (narrow and wide):
                found.append(f"{name}: {instruction}")
                name = ""
    return found


def test_no_vector_code_is_shared_between_instruction_sets() -> None:
    """Nothing of a kernel can be merged by the linker, and no AVX instruction stands outside the AVX objects."""
    path = str(_ext.extension().__file__)
    symbols = subprocess.run(["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True)
    code = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", "-C", path], capture_output=True, text=True, check=True
    )
    if symbols.stdout.strip():
        assert all(f"glimpse::{name}::attention(" in symbols.stdout for name in (*isas_here(), "baseline"))
        assert shared_names(symbols.stdout) == []
        assert shared_vector_code(code.stdout) == []
    else:  # stripped: what is left are the names a linker could still merge with those of others
        exported = subprocess.run(
            ["nm", "-D", "-C", "--defined-only", path], capture_output=True, text=True, check=True
        )
        assert "glimpse::" not in exported.stdout


@pytest.mark.parametrize(
    ("line", "caught"),
    [
        ("0000000000001000 t glimpse::avx2::attention(glimpse_attention_params const&)", False),
        ("0000000000001000 W float glimpse::avx2::(anonymous namespace)::dot<float>(float const*)", True),
        ("0000000000001000 u glimpse::avx512::table", True),
        ("0000000000001000 W glimpse::smaller(long, long)", True),
        ("0000000000001000 t long glimpse::smaller<long>(long, long)", True),
        ("0000000000001000 t glimpse::(anonymous namespace)::planted(float*)", True),
        ("0000000000001000 t glimpse::fail(glimpse_status, char const*, ...)", False),
        ("0000000000001000 t glimpse::(anonymous namespace)::openmp() [clone .cold]", False),
        (
            "0000000000001000 t void glimpse::python::call<glimpse_rope_params>(glimpse_rope_params const&)",
            False,
        ),
        ("0000000000001000 b glimpse::(anonymous namespace)::fixed_threads", False),
    ],
)
def test_shared_names_are_seen(line: str, caught: bool) -> None:
    assert bool(shared_names(line)) is caught


@pytest.mark.parametrize(
    ("name", "instruction", "caught"),
    [
        ("std::vector<float>::push_back(float&&)", "vmovss (%rax),%xmm0", True),
        ("glimpse::baseline::rope(glimpse_rope_params const&)", "vaddps %ymm0,%ymm1,%ymm2", True),
        ("glimpse::baseline::rope(glimpse_rope_params const&)", "addps %xmm0,%xmm1", False),
        ("glimpse::avx2::rope(glimpse_rope_params const&)", "vaddps %ymm0,%ymm1,%ymm2", False),
        ("glimpse::avx2::rope(glimpse_rope_params const&)", "vaddps %zmm0,%zmm1,%zmm2", True),
        ("glimpse::avx512::rope(glimpse_rope_params const&)", "vaddps %zmm0,%zmm1,%zmm2", False),
    ],
)
def test_shared_vector_code_is_seen(name: str, instruction: str, caught: bool) -> None:
    assert bool(shared_vector_code(f"0000000000001000 <{name}>:\n    1000:\t{instruction}\n")) is caught


def test_a_misspelt_instruction_set_is_an_error() -> None:
    """Not a silent return to the PyTorch definitions."""
    program = "from glimpse_kernels import _ext; print(_ext.extension().isa())"
    assert run(program, GLIMPSE_CPU_ISA=" Baseline ").stdout.strip() == "baseline"
    assert run(program, GLIMPSE_CPU_ISA="").stdout.strip() == isas_here()[0]
    refused = run(program, GLIMPSE_CPU_ISA="avx-512")
    assert refused.returncode != 0
    assert (
        "ValueError: GLIMPSE_CPU_ISA: expected one of auto, avx512bf16, avx512, avx2, baseline; found 'avx-512'"
        in refused.stderr
    )


def test_an_instruction_set_the_machine_lacks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ImportError(
            "GLIMPSE_CPU_ISA: CPU instruction set: expected one that this machine has, found avx512"
        )

    monkeypatch.setattr(_ext.importlib, "import_module", refuse)
    with pytest.raises(ValueError, match="GLIMPSE_CPU_ISA: .* that this machine has, found avx512"):
        _ext._load.__wrapped__()

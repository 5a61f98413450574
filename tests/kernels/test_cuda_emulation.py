# SPDX-License-Identifier: Apache-2.0
"""The emulation of CUDA notices what it is there to notice: kernels with mistakes (csrc/cuda/tests/emulation_kernels.cpp).

On the plain host that is what CUDA itself would refuse or never finish, and results that depend on the order of threads; under the
sanitizers each pair of accesses that nothing orders, and each step outside.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

from tests.kernels.test_cuda_units import ROOT, SOURCE, missing, tool

PROGRAM = "glimpse_emulation_tests"


@lru_cache(maxsize=3)
def program(sanitizer: str) -> Path:
    """Built with it ("none": without)."""
    build = ROOT / "build" / f"cuda-emulation-{sanitizer}"
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in (
        ("cmake", "-S", str(SOURCE), "-B", str(build), "-G", "Ninja", f"-DGLIMPSE_SANITIZE={sanitizer}"),
        ("cmake", "--build", str(build), "--target", PROGRAM),
    ):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning:" not in done.stdout, done.stdout
    return build / PROGRAM


def run(sanitizer: str, *names: str) -> subprocess.CompletedProcess[str]:
    # Sanitizers know where programs lie that are not moved about.
    fixed = ["setarch", "-R"] if tool("setarch") else []
    return subprocess.run(
        [*fixed, str(program(sanitizer)), *names], capture_output=True, text=True, timeout=300
    )


def skip_without(sanitizer: str, folder: Path) -> None:
    why = missing(sanitizer, folder)
    if why:
        pytest.skip(why)


def test_on_the_host() -> None:
    if not all(map(tool, ("cmake", "ninja", "c++"))):
        pytest.skip("no cmake, ninja and C++ compiler")
    done = run("none")
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed, 0 failed$", done.stdout.rstrip())
    assert passed and int(passed[1]) >= 12, done.stdout


CLEAN = "sanitizer_clean_barriers"
RACES = (
    "without_a_barrier",
    "before_writing_again",
    "although_shuffled",
    "over_the_barrier_that_orders_nothing",
    "of_blocks",
)
STEPS = ("the_end", "shared_memory")


# One test for each program, so that workers side by side do not build the same one.
def test_threads_that_meet_without_a_barrier(tmp_path: Path) -> None:
    skip_without("thread", tmp_path)
    for name in (CLEAN, *(f"sanitizer_race_{what}" for what in RACES)):
        done = run("thread", name)
        assert f"ok   {name}" in done.stdout, done.stdout + done.stderr
        assert ("WARNING: ThreadSanitizer: data race" in done.stderr) is (name != CLEAN), (name, done.stderr)


def test_steps_outside_of_memory(tmp_path: Path) -> None:
    skip_without("address", tmp_path)
    for name in (CLEAN, *(f"sanitizer_step_over_{what}" for what in STEPS)):
        done = run("address", name)
        found = "ERROR: AddressSanitizer: heap-buffer-overflow" in done.stderr
        assert found is (name != CLEAN), (name, done.stderr)
        assert (done.returncode == 0) is (name == CLEAN)

# SPDX-License-Identifier: Apache-2.0
"""The C++ tests of the CUDA kernels (csrc/cuda/tests), emulated on the host under AddressSanitizer and ThreadSanitizer.

AddressSanitizer sees each step outside of a tensor, ThreadSanitizer two threads of a launch that meet in memory without a barrier
between them: what compute-sanitizer's memcheck and racecheck look for on a GPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "csrc" / "cuda" / "tests"


def tool(name: str) -> str:
    """As this environment or the machine has it."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") or ""


def missing(sanitizer: str, folder: Path) -> str:
    """Why these tests cannot be built here; empty where they can."""
    for name in ("cmake", "ninja", "c++"):
        if not tool(name):
            return f"no {name}"
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    made = subprocess.run(
        [tool("c++"), f"-fsanitize={sanitizer}", str(probe), "-o", str(folder / "probe")], capture_output=True
    )
    return "" if made.returncode == 0 else f"this compiler has no -fsanitize={sanitizer}"


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_under_sanitizer(sanitizer: str, tmp_path: Path) -> None:
    why = missing(sanitizer, tmp_path)
    if why:
        pytest.skip(why)
    build = ROOT / "build" / f"cuda-tests-{sanitizer}"
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)

    for command in (
        ("cmake", "-S", str(SOURCE), "-B", str(build), "-G", "Ninja", f"-DGLIMPSE_SANITIZE={sanitizer}"),
        ("cmake", "--build", str(build)),
    ):
        done = run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning:" not in done.stdout, done.stdout
    # Sanitizers know where programs lie that are not moved about.
    program = [*(["setarch", "-R"] if tool("setarch") else []), str(build / "glimpse_cuda_tests")]
    done = run(*program)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    assert done.stdout.rstrip().endswith(" 0 failed"), done.stdout
    assert "WARNING: ThreadSanitizer" not in done.stderr, done.stderr[-8000:]

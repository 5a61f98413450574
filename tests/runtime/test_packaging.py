# SPDX-License-Identifier: Apache-2.0
"""The repository as a package: pins, licence headers, installing without torch and without a C++ compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
SOURCES = ("*.py", "*.cpp", "*.h", "*.cu", "*.cuh", "*.cmake", "CMakeLists.txt", "Makefile", "pyproject.toml")
FOLDERS = (".ci", "bench", "cmake", "csrc", "glimpse_kernels", "glimpse_lab", "glimpse_runtime", "tests")


def pins() -> dict[str, list[Requirement]]:
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        text = line.split("#")[0].strip()
        if text:
            requirement = Requirement(text)
            found.setdefault(requirement.name.lower().replace("_", "-"), []).append(requirement)
    return found


def asked() -> list[Requirement]:
    """Every requirement of pyproject.toml (read without tomllib, which Python 3.10 lacks)."""
    text = (ROOT / "pyproject.toml").read_text()
    names = ("dependencies", "test", "train", "compare", "triton", "dev", "requires")
    lists = [re.search(rf"^{name} = \[(.*?)\]$", text, re.S | re.M) for name in names]
    assert all(lists)
    quoted = [item for found in lists if found for item in re.findall(r'"([^"]+)"', found.group(1))]
    return [Requirement(item) for item in quoted if not item.startswith("glimpse-engine")]


def test_every_requirement_is_pinned_inside_its_range():
    known = pins()
    for requirement in asked():
        fixed = known.get(requirement.name.lower().replace("_", "-"))
        assert fixed, f"{requirement.name} has no pin in constraints.txt"
        for pin in fixed:
            (specifier,) = pin.specifier
            assert specifier.operator == "==" and requirement.specifier.contains(specifier.version), str(pin)


@pytest.mark.parametrize(
    ("name", "floor"),
    [("torch", "2.11.0"), ("transformers", "5.17.0"), ("torch", "2.10"), ("transformers", "5.10")],
)
def test_ranges_reach_back(name, floor):
    (requirement,) = [item for item in asked() if item.name == name]
    assert requirement.specifier.contains(floor)


def sources() -> list[Path]:
    found = [path for folder in FOLDERS for pattern in SOURCES for path in (ROOT / folder).rglob(pattern)]
    found += [ROOT / name for name in ("CMakeLists.txt", "Makefile", "pyproject.toml", ".ci/run")]
    return [path for path in found if path.is_file() and "__pycache__" not in path.parts]


def test_every_source_file_names_its_licence():
    assert len(sources()) > 50
    silent = [
        path
        for path in sources()
        if "SPDX-License-Identifier: Apache-2.0" not in "".join(path.open().readlines()[:3])
    ]
    assert not silent
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_rooms_stay_small():
    """300 and 500 lines are the rule of thumb; well past it a file holds two things."""

    def lines(path: Path) -> int:
        return len(path.read_text().splitlines())

    long = [
        f"{path}: {lines(path)}" for path in (ROOT / "glimpse_runtime").rglob("*.py") if lines(path) > 360
    ]
    long += [
        f"{path}: {lines(path)}" for path in (ROOT / "glimpse_kernels").rglob("*.py") if lines(path) > 600
    ]
    assert not long


@pytest.fixture(scope="module")
def without_compiler(tmp_path_factory) -> Path:
    """The unpacked wheel of a machine that has neither torch nor a C++ compiler."""
    pytest.importorskip(
        "scikit_build_core", reason="building needs the build tools, which make venv installs"
    )
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"
    skip = shutil.ignore_patterns("golden", "__pycache__", "*.so", ".*", "build", "demo_out")
    shutil.copytree(ROOT, source, ignore=skip)
    no_torch = root / "no_torch"
    no_torch.mkdir()
    (no_torch / "torch.py").write_text("raise ImportError('no torch on this machine')\n")
    environment = {
        **os.environ,
        "CXX": "/nonexistent/c++",
        "CC": "/nonexistent/cc",
        "PYTHONPATH": str(no_torch),
    }
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--wheel-dir",
        str(root),
    ]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = root.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(root / "unpacked")
    return root / "unpacked"


def test_installs_without_a_compiler(without_compiler):
    names = {
        str(path.relative_to(without_compiler)) for path in without_compiler.rglob("*") if path.is_file()
    }
    assert {"glimpse_kernels/__init__.py", "glimpse_runtime/cli.py", "glimpse_lab/demo.py"} <= names
    assert not [name for name in names if name.endswith(".so")]
    assert not [name for name in names if name.startswith("tests")]


def test_runs_on_the_definitions_and_says_once_what_is_lost(without_compiler, tmp_path):
    program = (
        "import logging, sys; logging.basicConfig(format='%(message)s')\n"
        # An editable install of the checkout answers imports before the path does.
        "sys.meta_path[:] = [f for f in sys.meta_path if 'scikit' not in type(f).__module__ + type(f).__name__.lower()]\n"
        "import torch, glimpse_kernels as k\n"
        "assert k.__file__.startswith(sys.argv[1]), k.__file__\n"
        "x = torch.tensor([[3.0, 4.0]])\n"
        "y = k.rms_norm(x, torch.ones(2), 0.0); k.rms_norm(x, torch.ones(2), 0.0); k.swiglu(x, x)\n"
        "assert torch.allclose(y, x / 12.5 ** 0.5)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(without_compiler)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(without_compiler)],
        capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("glimpse_kernels:")]
    assert len(said) == 1 and "compiled CPU kernels not available" in said[0] and "slower" in said[0]


def configured(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """What CMake says of the package with a CUDA compiler that is not there."""
    pytest.importorskip("pybind11", reason="building needs the build tools, which make venv installs")
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cmake = shutil.which("cmake", path=beside)
    if cmake is None or shutil.which("c++") is None:
        pytest.skip("cmake or a C++ compiler is missing")
    command = [cmake, "-S", str(ROOT), "-B", str(folder), f"-DPython_EXECUTABLE={sys.executable}", *options]
    environment = {name: value for name, value in os.environ.items() if name != "GLIMPSE_CUDA"}
    return subprocess.run(command, capture_output=True, text=True, env={**environment, "PATH": beside})


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("AUTO", "/nonexistent/nvcc does not run"),
        ("OFF", "GLIMPSE_CUDA=OFF"),
        ("ON", "/nonexistent/nvcc does not run"),
    ],
)
def test_without_nvcc_the_build_says_so_in_one_line(wanted, said, tmp_path):
    nvcc = [] if wanted == "OFF" else ["-DCMAKE_CUDA_COMPILER=/nonexistent/nvcc"]
    done = configured(tmp_path, f"-DGLIMPSE_CUDA={wanted}", *nvcc)
    told = [line for line in (done.stdout + done.stderr).splitlines() if "CUDA" in line and line.strip()]
    assert (done.returncode == 0) is (wanted != "ON"), done.stderr
    assert any(line.endswith(said) for line in told), told
    if wanted != "ON":
        assert told == [f"-- Glimpse: CUDA kernels: {said}"]


NVCC = """#!/bin/sh
case "$*" in
  --version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
  --list-gpu-arch) printf "compute_80\\ncompute_90\\n" ;;
  *) echo "nvcc fatal   : half of me is missing" >&2; exit 1 ;;
esac
"""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "nvcc 13.0 builds nothing here: "),
        (
            ("-DCMAKE_CUDA_ARCHITECTURES=90a;native",),
            "CMAKE_CUDA_ARCHITECTURES: expected some like 80, 90a or 100-real, found native",
        ),
    ],
    ids=["half a toolkit", "architectures"],
)
def test_an_nvcc_that_builds_nothing_does_not_hurt(options, said, tmp_path):
    """Such as that of a toolkit without the static runtime."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    done = configured(tmp_path / "build", f"-DCMAKE_CUDA_COMPILER={nvcc}", *options)
    assert done.returncode == 0, done.stderr
    told = [line for line in (done.stdout + done.stderr).splitlines() if "Glimpse: CUDA kernels" in line]
    assert len(told) == 1 and f"CUDA kernels: {said}" in told[0] and told[0][-1] not in ": ", told
    assert "CMake Error" not in done.stderr


def test_make_lists_its_targets():
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(
        f"\n  {target} " in shown for target in ("venv", "demo", "test", "lint", "train-tiny", "clean")
    )

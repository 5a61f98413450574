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
SOURCES = ("*.py", "*.cpp", "*.h", "*.cu", "CMakeLists.txt", "Makefile", "pyproject.toml")
FOLDERS = (".ci", "bench", "csrc", "glimpse_kernels", "glimpse_lab", "glimpse_runtime", "tests")


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
    names = ("dependencies", "test", "train", "triton", "dev", "requires")
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


def test_make_lists_its_targets():
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(
        f"\n  {target} " in shown for target in ("venv", "demo", "test", "lint", "train-tiny", "clean")
    )

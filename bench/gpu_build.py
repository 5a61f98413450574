# SPDX-License-Identifier: Apache-2.0
"""Builds the extension with its CUDA kernels for this machine's GPU and this Python, without installing anything.

python3 -m bench.gpu_build                for the GPU that is here
python3 -m bench.gpu_build --arch 90a     for another one

cmake and ninja work in build/gpu; the extension is put beside the Python sources (git ignores both). What is built already from
the same sources with the same tools is taken as it is.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.cuda_compiled import find_tool
from bench.gpu_facts import ROOT, native_sources
from glimpse_kernels import dispatch

FOLDER = ROOT / "build" / "gpu"
PACKAGE = ROOT / "glimpse_kernels"
SECONDS = 150.0
SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]
STAMP = "built.json"
TESTS = "glimpse_cuda_tests"
"""Project (csrc/cuda/tests) and program of the C++ unit tests of the kernels."""
PROBE = """
from glimpse_kernels import _C
print(_C.__file__, _C.cuda_build, (_C.cuda.missing() if hasattr(_C, "cuda") else _C.cuda_build) or "", sep="\\n")
"""


class Missing(Exception):
    """What the machine lacks, in words."""


@dataclass
class Build:
    """made: the file is there, whether made now or before (cached). says: what it has for GPUs; idle: why none of it can run
    here. why: what went wrong; missing: that is a tool this machine does not have."""

    made: bool = False
    missing: bool = False
    cached: bool = False
    arch: str = ""
    seconds: float = 0.0
    says: str = ""
    idle: str = ""
    file: str = ""
    why: str = ""
    tools: dict[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        if not self.made:
            return f"no CUDA C++ kernels: {self.why}"
        how = "there already" if self.cached else f"built in {self.seconds:.0f} s"
        return f"extension {how}: {self.says}{f', which cannot run here: {self.idle}' if self.idle else ''}"


def architecture(capability: tuple[int, int]) -> str:
    """As cmake has it. Hopper's own instructions need the "a"."""
    return "90a" if capability == (9, 0) else f"{capability[0]}{capability[1]}"


def find(*names: str) -> str | None:
    """A program in PATH or beside this Python, whose environment may not be active."""
    beside = Path(sys.executable).parent
    for name in names:
        found = shutil.which(name) or shutil.which(name, path=str(beside))
        if found:
            return found
    return None


def pybind11(folder: Path) -> str:
    """What find_package is to be told: pybind11's own cmake folder, or one made around the headers that torch brings."""
    done = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, timeout=60
    )
    if done.returncode == 0 and done.stdout.strip():
        return done.stdout.strip()
    headers = Path(torch.__file__).parent / "include"
    if not (headers / "pybind11" / "pybind11.h").exists():
        raise Missing("pybind11 is neither installed nor among torch's headers")
    made = folder / "pybind11"
    made.mkdir(parents=True, exist_ok=True)
    (made / "pybind11Config.cmake").write_text(SHIM.replace("@HEADERS@", headers.as_posix()))
    return str(made)


SHIM = """# Stands in for pybind11's own cmake files around the headers in torch.
function(pybind11_add_module target)
  cmake_parse_arguments(PARSE_ARGV 1 given "MODULE;SHARED;NO_EXTRAS" "" "")
  Python_add_library(${target} MODULE WITH_SOABI ${given_UNPARSED_ARGUMENTS})
  target_include_directories(${target} SYSTEM PRIVATE "@HEADERS@")
  set_target_properties(${target} PROPERTIES CXX_VISIBILITY_PRESET hidden CUDA_VISIBILITY_PRESET hidden)
endfunction()
add_library(pybind11::module INTERFACE IMPORTED)
target_include_directories(pybind11::module SYSTEM INTERFACE "@HEADERS@")
target_link_libraries(pybind11::module INTERFACE Python::Module)
set(pybind11_FOUND TRUE)
"""


def tools() -> dict[str, str]:
    """Name → program. Missing with all that is not there."""
    nvcc = find_tool("nvcc")
    found = {
        "nvcc": str(nvcc) if nvcc else None,
        "cmake": find("cmake"),
        "ninja": find("ninja", "ninja-build", "make"),
        "C++ compiler": os.environ.get("CXX") or find("c++", "g++", "clang++"),
    }
    absent = [name for name, place in found.items() if not place]
    if absent:
        raise Missing(f"not on this machine: {', '.join(absent)}")
    return {name: place for name, place in found.items() if place}


def configure(
    found: Mapping[str, str], arch: str, source: Path, folder: Path, options: Sequence[str]
) -> list[str]:
    """The command that writes the build files."""
    generator = "Unix Makefiles" if Path(found["ninja"]).name == "make" else "Ninja"
    return [
        found["cmake"], "-S", str(source), "-B", str(folder), "-G", generator, f"-DCMAKE_MAKE_PROGRAM={found['ninja']}",
        f"-DCMAKE_CUDA_ARCHITECTURES={arch}", f"-DCMAKE_CUDA_COMPILER={found['nvcc']}", *options,
    ]  # fmt: skip


def fingerprint(found: Mapping[str, str], arch: str, options: Sequence[str]) -> str:
    """Of everything the result depends on."""
    said = subprocess.run([found["nvcc"], "--version"], capture_output=True, text=True, timeout=60).stdout
    parts = [native_sources(), said, arch, sys.version, SUFFIX, *options, *sorted(found.values())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def build(
    arch: str, deadline: float, folder: Path = FOLDER, package: Path = PACKAGE, options: Sequence[str] = ()
) -> Build:
    """The extension, until the deadline (`time.monotonic`). Never raises for what a machine lacks or a compiler says."""
    result = Build(arch=arch)

    def make(found: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        key, target = fingerprint(found, arch, options), package / f"_C{SUFFIX}"
        stamp = _stamped(folder, key, target)
        if stamp is not None:
            result.cached, result.says, result.idle = True, stamp["says"], stamp["idle"]
        else:
            (folder / STAMP).unlink(missing_ok=True)
            more = [
                "-DCMAKE_BUILD_TYPE=Release", "-DGLIMPSE_CUDA=ON", f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11(folder)}", *options,
            ]  # fmt: skip
            _make(found, configure(found, arch, ROOT, folder, more), folder, "_C", deadline)
            _place(folder / f"_C{SUFFIX}", target)
            result.says, result.idle = _probe(target)
            known = {"key": key, "sum": _sum(target), "says": result.says, "idle": result.idle}
            (folder / STAMP).write_text(json.dumps(known) + "\n")
        result.file = str(target)

    return _told(result, make)


def build_tests(arch: str, deadline: float, folder: Path = FOLDER / "tests") -> Build:
    """The C++ unit tests for the device: `file` is their program. What did not change is not compiled again."""
    result = Build(arch=arch)

    def make(found: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        source = ROOT / "csrc" / "cuda" / "tests"
        _make(found, configure(found, arch, source, folder, ["-DGLIMPSE_ON_GPU=ON"]), folder, TESTS, deadline)
        result.file, result.says = str(folder / TESTS), "for a GPU"

    return _told(result, make)


def _told(result: Build, make: Callable[[Mapping[str, str]], None]) -> Build:
    """Does it, and writes down how it went."""
    began = time.monotonic()
    try:
        result.tools = tools()
        make(result.tools)
        result.made = True
    except (Missing, OSError, subprocess.SubprocessError, RuntimeError) as problem:
        result.why, result.missing = str(problem)[:1500], isinstance(problem, Missing)
    result.seconds = round(time.monotonic() - began, 1)
    return result


def _make(
    found: Mapping[str, str], configured: Sequence[str], folder: Path, target: str, deadline: float
) -> None:
    log = folder / "build.log"
    log.unlink(missing_ok=True)
    _run(configured, log, deadline)
    jobs = str(os.cpu_count() or 2)
    _run([found["cmake"], "--build", str(folder), "--target", target, "--parallel", jobs], log, deadline)


def _stamped(folder: Path, key: str, target: Path) -> dict[str, str] | None:
    """What was said of a build from the same things, if its result is still in its place."""
    try:
        known: dict[str, str] = json.loads((folder / STAMP).read_text())
    except (OSError, ValueError):
        return None
    if known.get("key") != key or not {"sum", "says", "idle"} <= known.keys() or not target.exists():
        return None
    return known if known["sum"] == _sum(target) else None


def _sum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _run(command: Sequence[str], log: Path, deadline: float) -> None:
    """With its children in a process group of their own, which ends with the time. RuntimeError with the telling lines."""
    with log.open("ab") as sink:
        sink.write((" ".join(command) + "\n").encode())
        sink.flush()
        process = subprocess.Popen(command, cwd=ROOT, stdout=sink, stderr=sink, start_new_session=True)
        try:
            status = process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise RuntimeError(f"{Path(command[0]).name} {command[1]}: out of time: {telling(log)}") from None
    if status:
        raise RuntimeError(f"{Path(command[0]).name} {command[1]}: status {status}: {telling(log)}")


def telling(log: Path) -> str:
    """The lines of a build's log that say what is wrong, else its last ones."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    heads = [re.search(r"\berror\b|FAILED", line, re.IGNORECASE) for line in lines]
    # cmake says what is wrong below the line that says where.
    wrong = [
        line for i, line in enumerate(lines) if heads[i] or (i and lines[i - 1].startswith("CMake Error"))
    ]
    return " / ".join((wrong or lines[-3:])[:6])[:1200]


def _place(made: Path, target: Path) -> None:
    """In one step: a process that imports it meanwhile sees the old file or the new one."""
    passing = target.with_name(f".{target.name}.new.{os.getpid()}")
    shutil.copyfile(made, passing)
    passing.replace(target)


def _probe(target: Path) -> tuple[str, str]:
    """What the extension says of its CUDA kernels, and why they cannot run here, in a process of its own. One that cannot be
    loaded is taken away again."""
    top = target.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=top, env=dict(os.environ, PYTHONPATH=str(top)),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if done.returncode:
        target.unlink(missing_ok=True)
        raise RuntimeError(f"the extension cannot be loaded: {(done.stderr.strip() or 'no words')[-400:]}")
    file, says, idle = done.stdout.splitlines()[-3:]
    if not target.samefile(file):
        raise RuntimeError(f"this Python takes the extension from {file}, not the one built for the GPU")
    return says, idle


def wanted(ops: Sequence[str]) -> bool:
    """Whether one of these ops (all, if none is named) has a CUDA C++ kernel."""
    return any(r.backend == "cuda" and (not ops or r.op in ops) for r in dispatch.support_table())


def here() -> str:
    """The architecture of the current GPU."""
    return architecture(torch.cuda.get_device_capability())


def main(
    arch: Annotated[str, typer.Option(help="Such as 80, 90a, 100; the GPU's own if not given.")] = "",
    seconds: Annotated[float, typer.Option(help="Time limit.")] = 600.0,
) -> None:
    """Exit status 1 if nothing was built."""
    if not arch and not torch.cuda.is_available():
        raise typer.BadParameter(
            "no CUDA device in sight of this Python's torch; name one", param_hint="--arch"
        )
    done = build(arch or here(), time.monotonic() + seconds)
    print(done.line())
    raise typer.Exit(0 if done.made else 1)


if __name__ == "__main__":
    typer.run(main)

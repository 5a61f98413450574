# SPDX-License-Identifier: Apache-2.0
"""The extension built for a GPU that is not here: bookkeeping with stand-ins for cmake and compute-sanitizer."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from bench import gpu_build, gpu_native

CMAKE = """#!/bin/sh
echo "cmake $*" >> {folder}/calls
case "$*" in
  *--build*) {what} ;;
esac
"""


def script(file: Path, text: str) -> str:
    file.write_text(text)
    file.chmod(0o755)
    return str(file)


class Machine:
    """Folders, and a cmake that writes down how it is called and then does `what`."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.built, self.package = folder, folder / "build", folder / "package"
        self.package.mkdir()
        self.cmake(f"echo made > {self.built}/_C{gpu_build.SUFFIX}")
        found = {
            "nvcc": script(folder / "nvcc", "#!/bin/sh\necho release 13.0\n"),
            "cmake": str(folder / "cmake"),
        }
        found |= {"ninja": "/usr/bin/ninja", "C++ compiler": "/usr/bin/c++"}
        monkeypatch.setattr(gpu_build, "tools", lambda: found)
        monkeypatch.setattr(gpu_build, "pybind11", lambda folder: "/pybind11")
        monkeypatch.setattr(gpu_build, "_probe", lambda target: ("nvcc 13.0: sm_90a", "no CUDA driver"))

    def cmake(self, what: str) -> None:
        text = CMAKE.format(folder=self.folder, what=what)
        script(self.folder / "cmake", text)

    def calls(self) -> list[str]:
        """Since the last question."""
        file = self.folder / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return lines

    def build(self, arch: str = "90a", seconds: float = 30.0) -> gpu_build.Build:
        return gpu_build.build(arch, time.monotonic() + seconds, self.built, self.package)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_built_once_and_put_beside_the_sources(machine: Machine) -> None:
    first = machine.build()
    assert first.made and not first.cached and first.says == "nvcc 13.0: sm_90a"
    assert first.line().endswith(" s: nvcc 13.0: sm_90a, which cannot run here: no CUDA driver")
    assert [p.name for p in machine.package.iterdir()] == [f"_C{gpu_build.SUFFIX}"]
    configured, built = machine.calls()
    assert "-DCMAKE_CUDA_ARCHITECTURES=90a" in configured and "-DGLIMPSE_CUDA=ON" in configured
    assert " --target _C " in built
    again = machine.build()
    assert (
        again.made
        and again.cached
        and (again.says, again.idle) == (first.says, first.idle)
        and not machine.calls()
    )


@pytest.mark.parametrize("change", ["architecture", "sources", "file", "folder"])
def test_built_anew_when_something_changed(
    machine: Machine, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.build()
    machine.calls()
    target = machine.package / f"_C{gpu_build.SUFFIX}"
    if change == "sources":
        monkeypatch.setattr(gpu_build, "native_sources", lambda: "others")
    elif change == "file":
        target.write_text("of another build")
    elif change == "folder":
        target.unlink()
    done = machine.build("100" if change == "architecture" else "90a")
    assert done.made and not done.cached and len(machine.calls()) == 2
    assert target.read_text() == "made\n"


def test_what_a_compiler_says_is_told(machine: Machine) -> None:
    machine.cmake("echo 'compact.cu(7): error: no such thing'; exit 2")
    done = machine.build()
    assert not done.made and not done.missing and "status 2" in done.why and "compact.cu(7)" in done.why
    assert done.line().startswith("no CUDA C++ kernels: ") and not list(machine.package.iterdir())
    machine.cmake(f"echo made > {machine.built}/_C{gpu_build.SUFFIX}")
    assert machine.build().made


def test_what_cmake_says_is_told_with_its_reason(tmp_path: Path) -> None:
    log = tmp_path / "build.log"
    log.write_text(
        "-- looking\nCMake Error at cuda.cmake:106 (message):\n  GLIMPSE_CUDA=ON: no nvcc\n\n\nCall Stack\n"
    )
    assert gpu_build.telling(log) == "CMake Error at cuda.cmake:106 (message): / GLIMPSE_CUDA=ON: no nvcc"


def test_a_build_that_takes_too_long_is_ended(machine: Machine) -> None:
    machine.cmake("sleep 60")
    began = time.monotonic()
    done = machine.build(seconds=1.0)
    assert not done.made and "out of time" in done.why and time.monotonic() - began < 20


def test_missing_tools_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_build, "find", lambda *names: None)
    monkeypatch.setattr(gpu_build, "find_tool", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    done = gpu_build.build("90a", time.monotonic() + 5, tmp_path / "build", tmp_path)
    assert not done.made and done.missing
    assert done.why == "not on this machine: nvcc, cmake, ninja, C++ compiler"


def test_architectures_of_gpus() -> None:
    assert [gpu_build.architecture(c) for c in ((8, 0), (8, 6), (9, 0), (10, 0), (12, 0))] == [
        "80",
        "86",
        "90a",
        "100",
        "120",
    ]


SAID = {
    "clean": (0, "========= COMPUTE-SANITIZER\n12 tests\n========= ERROR SUMMARY: 0 errors\n"),
    "errors": (
        86,
        "========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 4 bytes\n========= ERROR SUMMARY: 3 errors\n",
    ),
    "races": (86, "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"),
    "no races": (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"),
    "refused": (1, "========= COMPUTE-SANITIZER\n========= Error: Device not supported. Please refer to\n"),
    "broken": (127, "error while loading shared libraries: libInterceptor.so\n"),
    "fails under it": (1, "========= ERROR SUMMARY: 0 errors\n"),
    "slow": (None, ""),
}


@pytest.mark.parametrize(
    ("name", "fine", "words"),
    [
        ("clean", True, "nothing found"),
        ("errors", False, "3 found"),
        ("races", False, "2 found"),
        ("no races", True, "nothing found"),
        ("refused", None, "does not work here: Device not supported"),
        ("broken", None, "does not work here: status 127: error while loading"),
        ("fails under it", False, "status 1"),
        ("slow", None, "out of time"),
    ],
)
def test_what_the_sanitizer_said(name: str, fine: bool | None, words: str) -> None:
    found, told = gpu_native.judge(*SAID[name])
    assert found is fine and words in told


SANITIZER = """#!/bin/sh
[ "$2" = racecheck ] && { echo "========= RACECHECK SUMMARY: 1 hazard displayed"; exit 86; }
[ "$2" = synccheck ] && { echo "========= Error: Device not supported."; exit 1; }
"$7" && echo "========= ERROR SUMMARY: 0 errors"
"""


def test_unit_tests_under_every_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sanitizer = Path(script(tmp_path / "sanitizer", SANITIZER))
    monkeypatch.setattr(gpu_native, "find_tool", lambda name: sanitizer)
    program = Path(script(tmp_path / "tests", "#!/bin/sh\nexit 0\n"))
    said: list[str] = []
    done = gpu_native.check(program, time.monotonic() + 60, said.append)
    assert [(r.how, r.fine) for r in done.runs] == [
        ("plain", True),
        ("memcheck", True),
        ("racecheck", False),
        ("synccheck", None),
    ]
    assert not done.fine and len(said) == 4 and done.record()["runs"][2]["words"] == "1 found"


def test_tools_are_not_asked_about_tests_that_fail(tmp_path: Path) -> None:
    program = Path(script(tmp_path / "tests", "#!/bin/sh\necho wrong; exit 3\n"))
    done = gpu_native.check(program, time.monotonic() + 60, lambda text: None)
    assert [(r.how, r.fine, r.words) for r in done.runs] == [("plain", False, "status 3")]
    assert "wrong" in done.runs[0].said
    script(program, "#!/bin/sh\necho 5 passed, 1 failed; exit 1\n")
    done = gpu_native.check(program, time.monotonic() + 60, lambda text: None)
    assert not done.fine and done.runs[0].words == "5 passed, 1 failed"


def test_unit_tests_are_built_for_the_device(machine: Machine) -> None:
    done = gpu_build.build_tests("90a", time.monotonic() + 30, machine.built)
    assert done.made and done.file == str(machine.built / gpu_build.TESTS)
    configured, built = machine.calls()
    assert "csrc/cuda/tests" in configured and "-DGLIMPSE_ON_GPU=ON" in configured
    assert f" --target {gpu_build.TESTS} " in built


def test_without_unit_tests_or_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in (True, False):
        made = gpu_build.Build(missing=missing, why="no nvcc")
        monkeypatch.setattr(gpu_build, "build_tests", lambda arch, deadline, made=made: made)
        none = gpu_native.build_and_check("90a", time.monotonic() + 60, lambda text: None)
        assert none.fine is missing and none.why == "not built: no nvcc" and not none.runs
    slow = Path(script(tmp_path / "tests", "#!/bin/sh\nsleep 30\n"))
    done = gpu_native.check(slow, time.monotonic() + 1, lambda text: None)
    assert done.runs[0].words == "out of time" and done.fine

# SPDX-License-Identifier: Apache-2.0
"""The CUDA C++ kernels in the built extension, by their machine code: nothing in local memory, wide loads and stores, one page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from bench.cuda_compiled import TOOL, find_tool
from bench.occupancy import ARCHS, SHARED_STATIC
from glimpse_kernels import _ext, dispatch
from tests.kernels.compile_reports import ROOT, compile_report

PAGE = ROOT / "docs" / "cuda-kernels.md"
OPS = [row.op for row in dispatch.support_table() if row.backend == "cuda"]
WIDE = ("compact", "decode_attention", "glimpse_scores")
"""Ops that are about moving memory."""
Kernel = dict[str, Any]


def nothing_to_read() -> str:
    """What this machine lacks for there to be CUDA kernels in the extension, or to read them; empty if it lacks nothing."""
    module = _ext.compiled()
    if module is None:
        return f"the extension is not built: {_ext.compiled_error()}"
    if not hasattr(module, "cuda") and (find_tool("nvcc") is None or module.cuda_build == "GLIMPSE_CUDA=OFF"):
        return f"the extension has no CUDA kernels: {module.cuda_build}"
    return "" if find_tool() else f"no {TOOL} in PATH, beside nvcc or in the triton package"


pytestmark = pytest.mark.skipif(bool(nothing_to_read()), reason=nothing_to_read())


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `bench.cuda_compile` says of the extension."""
    return compile_report(tmp_path_factory, "bench.cuda_compile")


def named(kernel: Kernel) -> str:
    return f"{kernel['name']} sm_{kernel['arch']}: "


def test_the_extension_has_kernels_where_there_is_nvcc() -> None:
    module = _ext.extension()
    assert hasattr(module, "cuda"), module.cuda_build


def test_what_is_read_was_built_from_these_sources() -> None:
    """An extension of yesterday proves nothing about kernels of today."""
    built = Path(_ext.extension().__file__).stat().st_mtime
    folders = ROOT / "csrc" / "cuda", ROOT / "csrc" / "include" / "glimpse"
    sources = [file for folder in folders for file in folder.glob("*.*h")] + [*folders[0].glob("*.cu")]
    newer = [file.name for file in sources if file.stat().st_mtime > built]
    assert not newer, "changed after the extension was built; run: make venv"


def test_there_is_machine_code_for_every_architecture_of_the_build(compiled: dict[str, Any]) -> None:
    targets = re.findall(r"sm_(\w+)(-virtual)?", _ext.extension().cuda_build)
    assert compiled["architectures"] == [arch for arch, virtual in targets if not virtual]


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_kernels_for_every_architecture(compiled: dict[str, Any], op: str) -> None:
    assert hasattr(_ext.extension().cuda, op)
    found = {kernel["arch"] for kernel in compiled["kernels"] if kernel["home"] == op}
    assert found == set(compiled["architectures"])


def test_nothing_is_kept_in_local_memory(compiled: dict[str, Any]) -> None:
    """Neither spilled registers nor arrays that the compiler could not keep in registers."""
    assert not [
        named(k) + f"stack {k['stack']}, {k['local_loads']} loads, {k['local_stores']} stores"
        for k in compiled["kernels"]
        if k["stack"] or k["local_loads"] or k["local_stores"]
    ]


def test_limits_are_kept(compiled: dict[str, Any]) -> None:
    assert not compiled["faults"]
    large = [k for k in compiled["kernels"] if k["shared"] > 1024 * SHARED_STATIC]
    assert not [named(k) + f"{k['shared']} bytes of static shared memory" for k in large]


def test_every_kernel_says_how_many_threads_it_has(compiled: dict[str, Any]) -> None:
    """Without a launch bound the compiler plans for 1024 threads, and a block may have more registers than there are."""
    working = [k for k in compiled["kernels"] if k["parameters"]]
    assert not [named(k) for k in working if not 32 <= k["threads"] <= 1024]


@pytest.mark.parametrize("op", [op for op in WIDE if op in OPS])
def test_memory_moves_sixteen_bytes_at_a_time(compiled: dict[str, Any], op: str) -> None:
    for arch in compiled["architectures"]:
        kernels = [k for k in compiled["kernels"] if k["home"] == op and k["arch"] == arch]
        loads = {name for k in kernels for name in k["code"] if re.match(r"(LDG|LDGSTS)\.E.*\.128\b", name)}
        assert loads, f"{op} sm_{arch}: no load of 16 bytes"
        if op == "compact":
            both = [k for k in kernels if "16" in k["loads"] and "16" in k["stores"]]
            assert both, f"{op} sm_{arch}: no kernel with both loads and stores of 16 bytes"


def test_the_page_shows_these_kernels(compiled: dict[str, Any]) -> None:
    page = PAGE.read_text()
    built_for = [int(re.sub(r"\D", "", arch)) for arch in compiled["architectures"]]
    if f"nvcc {compiled['nvcc']} " not in page or built_for != list(ARCHS):
        pytest.skip(f"the page is about another build than nvcc {compiled['nvcc']} for {built_for}")
    assert page == compiled["page"], "run: python -m bench.cuda_compile --markdown docs/cuda-kernels.md"

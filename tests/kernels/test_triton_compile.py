# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiles for the GPUs we name, keeps its values in registers, and uses the instructions it was written for.

The kernels are compiled in a process of their own, as this one may interpret them; compiled once, they are in Triton's cache.
"""

from __future__ import annotations

from typing import Any

import pytest

from glimpse_kernels import dispatch
from tests.kernels.compile_reports import ROOT, compile_report
from tests.kernels.kernel_cases import needs_triton

PAGE = ROOT / "docs" / "triton-kernels.md"
ARCHS = (80, 90, 100)
MOST_SHARED = {80: 99, 90: 227, 100: 227}
"""KiB of shared memory a program may take. What is compiled for 8.0 also runs on 8.6, 8.9 and 12.x, which have 99."""

BY_TORCH = {"vip_conditions"}
"""Ops whose wrapper hands all the work to torch."""

pytestmark = needs_triton
OPS = [row.op for row in dispatch.support_table() if row.backend == "triton"]
Kernel = dict[str, Any]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `bench.triton_compile` says of all ops, and its table."""
    return compile_report(tmp_path_factory, "bench.triton_compile")


def named(kernel: Kernel) -> str:
    constants = " ".join(f"{name}={value}" for name, value in kernel["constants"].items())
    return f"{kernel['name']} sm_{kernel['arch']} {constants}: "


def test_every_row_compiles(compiled: dict[str, Any]) -> None:
    assert not compiled["faults"]


@pytest.mark.parametrize("op", [op for op in OPS if op not in BY_TORCH])
def test_every_op_has_kernels_for_every_gpu(compiled: dict[str, Any], op: str) -> None:
    assert {kernel["arch"] for kernel in compiled["kernels"] if op in kernel["ops"]} == set(ARCHS)


def test_nothing_is_spilled(compiled: dict[str, Any]) -> None:
    """In fp32, which serves tests and training, only what keeps a kernel from running counts."""
    hot = [k for k in compiled["kernels"] if k["dtypes"] != ["fp32"]]
    assert not [
        named(k) + f"{k['spilled']} bytes, stack {k['stack']}" for k in hot if k["spilled"] or k["stack"]
    ]


def test_shared_memory_fits(compiled: dict[str, Any]) -> None:
    large = [
        named(k) + f"{k['shared'] / 1024:.0f} KiB"
        for k in compiled["kernels"]
        if k["shared"] > 1024 * MOST_SHARED[k["arch"]]
    ]
    assert not large


@pytest.mark.parametrize("name", ["attention_kernel", "received_attention_kernel"])
def test_attention_runs_on_the_tensor_cores_of_hopper(compiled: dict[str, Any], name: str) -> None:
    found = [
        k for k in compiled["kernels"] if k["name"] == name and k["arch"] == 90 and k["dtypes"] != ["fp32"]
    ]
    assert found
    assert not [named(k) for k in found if "wgmma" not in k["features"]]
    assert not [named(k) for k in found if k["serialized"]]


@pytest.mark.parametrize("name", ["compact_kernel", "decode_attention_kernel"])
def test_memory_is_read_sixteen_bytes_at_a_time(compiled: dict[str, Any], name: str) -> None:
    found = [k for k in compiled["kernels"] if k["name"] == name]
    assert found
    assert not [named(k) for k in found if "ld128" not in k["features"]]


def test_the_page_shows_these_kernels(compiled: dict[str, Any]) -> None:
    import triton

    page = PAGE.read_text()
    if f"Triton {triton.__version__} " not in page:
        pytest.skip(f"the page is about another Triton than {triton.__version__}")
    assert page == compiled["page"], "run: python -m bench.triton_compile --markdown docs/triton-kernels.md"

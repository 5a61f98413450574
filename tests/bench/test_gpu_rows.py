# SPDX-License-Identifier: Apache-2.0
"""The rows of the GPU benchmark on tensors that claim to be on a GPU: built there, right, and ours waits for nothing."""

from __future__ import annotations

import pytest
import torch

from bench.gate import Gate
from bench.gpu_worker import Job, cases, kernels, load_rows
from bench.op_registry import Case
from glimpse_kernels import _cuda, _triton, dispatch
from tests.stand_in import stand_in_gpu

pytestmark = pytest.mark.skipif(
    not _triton.interpreting(), reason=_triton.missing() or "kernels are compiled here"
)


def rows() -> list[object]:
    """Every row by every backend the op has here."""
    load_rows()
    return [
        pytest.param(case, backend, id=f"{case.row.op}: {case.row.what}, {backend}")
        for case in cases(Job(rehearse=True))
        for backend in kernels(case.row.op, "cuda")
    ]


def test_ops_with_two_kernels_have_rows_by_both() -> None:
    by_row: dict[str, set[str]] = {}
    for case in cases(Job(rehearse=True)):
        by_row.setdefault(case.row.op, set()).update(kernels(case.row.op, "cuda"))
    for row in dispatch.support_table():
        if row.backend == "triton" or (
            row.backend == "cuda" and _cuda.emulating() and hasattr(_cuda.module(), row.op)
        ):
            assert row.backend in by_row.get(row.op, ()), f"{row.op}: no row by {row.backend}"


@pytest.mark.parametrize(("case", "backend"), rows())
def test_row(case: Case, backend: str) -> None:
    dropped: dict[str, str] = {}
    with (
        torch.inference_mode(),
        stand_in_gpu() as seen,
        torch.device("cuda"),
        dispatch.force_backend(backend),
    ):
        work = case.build()
        assert not seen.reads
        gate = Gate(work, case.dtype, dropped)
        seen.reads.clear()
        found = work.ours()
        assert not seen.reads, "the host waits for the device"
        verdict = gate.check(lambda: found)
    assert not verdict.fault
    assert all(result.device.type == "cuda" for result in found)
    # What CPU tensors cannot show: torch's packed attention and cuDNN's.
    assert set(dropped) <= {"FA2, varlen", "FA2, varlen_attn", "cuDNN"}, dropped

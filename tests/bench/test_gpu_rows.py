# SPDX-License-Identifier: Apache-2.0
"""The rows of the GPU benchmark on tensors that claim to be on a GPU: built there, right, and ours waits for nothing."""

from __future__ import annotations

import pytest
import torch

from bench.gate import Gate
from bench.gpu_worker import Job, cases, load_rows
from bench.op_registry import Case
from glimpse_kernels import _triton, dispatch
from tests.stand_in import stand_in_gpu

pytestmark = pytest.mark.skipif(
    not _triton.interpreting(), reason=_triton.missing() or "kernels are compiled here"
)


def rows() -> list[Case]:
    load_rows()
    return cases(Job(rehearse=True))


@pytest.mark.parametrize("case", rows(), ids=lambda case: f"{case.row.op}: {case.row.what}")
def test_row(case: Case) -> None:
    dropped: dict[str, str] = {}
    with (
        torch.inference_mode(),
        stand_in_gpu() as seen,
        torch.device("cuda"),
        dispatch.force_backend("triton"),
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

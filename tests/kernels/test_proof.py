# SPDX-License-Identifier: Apache-2.0
"""A GPU kernel that has never run on a GPU is not chosen by itself, and the record of those that have is kept."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from glimpse_kernels import _cuda, _triton, dispatch, explain, force_backend, proof
from tests.kernels.kernel_cases import needs_triton

RMS = proof.Proof("rms_norm", "triton", "NVIDIA H200", "2026-11-21", "0123abcd", 12)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_cache", {})
    monkeypatch.setattr(dispatch, "_logged", set())


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[tuple[str, str], proof.Proof]]:
    found: dict[tuple[str, str], proof.Proof] = {}
    monkeypatch.setattr(proof, "record", lambda: found)
    yield found


@needs_triton
def test_an_unproven_kernel_is_passed_over_and_that_is_said_once(
    records: dict[tuple[str, str], proof.Proof], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="glimpse_kernels"):
        for _ in range(2):
            assert dispatch.choose("rms_norm", "cuda", torch.bfloat16) == "naive"
    assert len(caplog.records) == 1
    assert "never run on a GPU" in caplog.text and "GLIMPSE_BACKEND=triton" in caplog.text


@needs_triton
def test_a_proven_kernel_is_chosen(
    records: dict[tuple[str, str], proof.Proof], caplog: pytest.LogCaptureFixture
) -> None:
    records[RMS.op, RMS.backend] = RMS
    with caplog.at_level(logging.WARNING, logger="glimpse_kernels"):
        assert dispatch.choose("rms_norm", "cuda", torch.bfloat16) == "triton"
        assert dispatch.choose("rms_norm", "cuda", torch.float32, grad=True) == "naive"
    assert not caplog.records
    assert dispatch.choose("swiglu", "cuda", torch.bfloat16) == "naive"


@needs_triton
def test_a_forced_kernel_needs_no_proof(records: dict[tuple[str, str], proof.Proof]) -> None:
    for row in dispatch.support_table():
        if row.device != "cuda" or (row.backend == "cuda" and not hasattr(_cuda.module(), row.op)):
            continue
        with force_backend(row.backend):
            for dtype in row.dtypes or (torch.int64,):
                assert dispatch.choose(row.op, "cuda", dtype) == row.backend, explain(row.op, "cuda", dtype)


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is on only where there is no GPU")
def test_the_interpreter_is_never_chosen_but_can_be_forced(
    records: dict[tuple[str, str], proof.Proof],
) -> None:
    assert dispatch.choose("rms_norm", "cpu", torch.float16) == "naive"
    with force_backend("triton"):
        assert dispatch.choose("rms_norm", "cpu", torch.float16) == "triton"
    assert ("triton", True, "Triton, interpreted") in explain("rms_norm", "cpu")


def test_without_triton_the_definition_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "missing", lambda: "Triton is not installed")
    assert dispatch.choose("rms_norm", "cuda", torch.bfloat16) == "naive"
    assert ("triton", False, "Triton is not installed") in explain("rms_norm", "cuda")


def test_a_record_can_be_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "proof.json"
    monkeypatch.setattr(proof, "RECORD", path)
    proof.write({(RMS.op, RMS.backend): RMS}, path)
    proof.record.cache_clear()
    try:
        assert proof.record() == {("rms_norm", "triton"): RMS}
        assert proof.proven("rms_norm", "triton") and not proof.proven("attention", "triton")
    finally:
        monkeypatch.undo()
        proof.record.cache_clear()


def test_the_record_of_this_version_names_only_what_exists() -> None:
    rows = {(row.op, row.backend) for row in dispatch.support_table()}
    assert set(proof.record()) <= rows

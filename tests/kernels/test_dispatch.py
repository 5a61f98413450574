# SPDX-License-Identifier: Apache-2.0
"""Which backend serves, what is said when it is not the fastest, and what is refused."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import glimpse_kernels
from glimpse_kernels import (
    UnsupportedError,
    _ext,
    _triton,
    attention,
    dispatch,
    explain,
    force_backend,
    support_table,
)

ROOT = Path(__file__).parents[2]
needs_extension = pytest.mark.skipif(
    _ext.compiled() is None, reason=f"compiled extension not available: {_ext.compiled_error()}"
)


def tiny_attention(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.ones(2, 1, 4).to(dtype)
    bounds = torch.tensor([0, 2], dtype=torch.int32)
    result = attention(x, x, x, bounds, bounds, causal=False)
    assert isinstance(result, torch.Tensor)
    return result


def without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ext, "_load", lambda: (None, "not built"))
    monkeypatch.setattr(dispatch, "_cache", {})
    monkeypatch.setattr(dispatch, "_logged", set())


def test_every_op_is_exported_and_has_a_definition() -> None:
    for op in dispatch.ops():
        assert callable(getattr(glimpse_kernels, op)), op
        rows = [row for row in support_table() if row.op == op]
        assert any(row.backend == "naive" and row.device == "any" for row in rows), op
        for row in rows:
            if row.backend == "triton" and _triton.missing():
                continue
            module = importlib.import_module(f"glimpse_kernels.{row.folder}.{row.backend}")
            assert callable(getattr(module, op)), row


@needs_extension
@pytest.mark.parametrize("op", [row.op for row in support_table() if row.backend == "cpu"])
def test_cpu_backend_serves_every_op(op: str) -> None:
    row = next(row for row in support_table() if row.op == op and row.backend == "cpu")
    for dtype in row.dtypes or (torch.int64,):
        assert dispatch.choose(op, "cpu", dtype) == "cpu", explain(op, "cpu", dtype)


def test_gradients_go_through_the_definition() -> None:
    assert dispatch.choose("attention", "cpu", torch.float32, grad=True) == "naive"
    assert ("cpu", False, "has no backward and autograd is recording") in explain("attention", grad=True)


def test_half_precision_falls_back_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "_cache", {})
    monkeypatch.setattr(dispatch, "_logged", set())
    if _ext.compiled() is None:
        monkeypatch.setattr(dispatch, "_report_fallback", lambda *arguments: None)
    with caplog.at_level(logging.WARNING, logger="glimpse_kernels"):
        for _ in range(2):
            dispatch._cache.clear()
            assert (tiny_attention(torch.float16) == 1).all()
    if _ext.compiled() is not None:
        assert len(caplog.records) == 1
        assert "has no float16 kernel" in caplog.text


def test_missing_extension_is_said_once_for_all_ops(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_extension(monkeypatch)
    with caplog.at_level(logging.WARNING, logger="glimpse_kernels"):
        tiny_attention()
        tiny_attention(torch.bfloat16)
        dispatch.select("rms_norm", "cpu", torch.float32)
    assert [record.getMessage() for record in caplog.records] == [
        "glimpse_kernels: compiled CPU kernels not available (not built); using PyTorch definitions, slower"
    ]
    assert explain("attention")[0] == ("cpu", False, "compiled extension not available (not built)")


def test_forced_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    without_extension(monkeypatch)
    with force_backend("cpu"), pytest.raises(UnsupportedError, match="backend cpu .forced. .*not built"):
        tiny_attention()
    assert (tiny_attention() == 1).all()


def test_unsupported_dtype_names_every_backend() -> None:
    with pytest.raises(
        UnsupportedError, match="float64 on cpu.*cpu: has no float64.*naive: has no float64"
    ) as caught:
        tiny_attention(torch.float64)
    assert isinstance(caught.value, TypeError)


def test_wrong_names() -> None:
    with pytest.raises(ValueError, match="found 'rocm'"), force_backend("rocm"):
        pass
    with pytest.raises(ValueError, match="found 'atention'"):
        explain("atention")


def test_force_backend_nests_and_restores() -> None:
    before = dispatch.forced_backend()
    with force_backend("naive"):
        with force_backend("auto"):
            assert dispatch.forced_backend() == "auto"
        assert dispatch.choose("attention", "cpu", torch.float32) == "naive"
    assert dispatch.forced_backend() == before


@pytest.mark.parametrize(
    ("value", "want"),
    [
        ("naive", "naive"),
        ("CPU ", "cpu"),
        ("", "auto"),
        ("auto", "auto"),
        (None, "auto"),
        (" cuda, Triton", "cuda,triton"),
    ],
)
def test_environment(monkeypatch: pytest.MonkeyPatch, value: str | None, want: str) -> None:
    monkeypatch.delenv("GLIMPSE_BACKEND", raising=False)
    if value is not None:
        monkeypatch.setenv("GLIMPSE_BACKEND", value)
    assert dispatch._from_environment() == want


@pytest.mark.parametrize("value", ["gpu", "cuda,gpu", "auto,cuda", "cuda,"])
def test_environment_with_an_unknown_name(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("GLIMPSE_BACKEND", value)
    words = f"GLIMPSE_BACKEND: expected one of auto, cuda, triton, cpu, naive; found '{value}'"
    with pytest.raises(ValueError, match=words):
        dispatch._from_environment()


def test_of_several_the_first_that_can_serve() -> None:
    with force_backend("triton,naive"):
        assert dispatch.choose("attention", "cpu", torch.float32, grad=True) == "naive"
    with force_backend("naive,cpu"):
        assert dispatch.choose("attention", "cpu", torch.float32) == "naive"
    with force_backend("triton,cpu"), pytest.raises(UnsupportedError, match="backend triton,cpu .forced."):
        dispatch.choose("attention", "cpu", torch.float32, grad=True)


def test_documented_table_is_the_table() -> None:
    """docs/kernels.md holds exactly what `dispatch.table_markdown` prints."""
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert dispatch.table_markdown() in page, (
        "the table in docs/kernels.md is not what table_markdown() prints"
    )


class OnGpu(torch.Tensor):
    """Says that it is on a GPU of this number."""

    device: torch.device  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, number: int) -> OnGpu:
        return torch.ones(2).as_subclass(cls)

    def __init__(self, number: int) -> None:
        self.number = number

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return torch.device("cuda", args[0].number)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("gpus", [1, 2])
def test_triton_runs_on_the_gpu_of_its_tensors(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device; with one GPU that is the one, and calls go straight to the kernel."""
    current, seen = [0], []

    @contextmanager
    def device(wanted: torch.device | None) -> Iterator[None]:
        before = current[0]
        current[0] = before if wanted is None or wanted.index is None else wanted.index
        try:
            yield
        finally:
            current[0] = before

    def kernel(*args: object, eps: float = 0.0) -> float:
        seen.append(current[0])
        return eps

    module = importlib.import_module("glimpse_kernels.rms_norm.naive")
    monkeypatch.setattr(module, "rms_norm", kernel)
    monkeypatch.setattr(dispatch, "_module_name", lambda row: "glimpse_kernels.rms_norm.naive")
    monkeypatch.setattr(dispatch, "choose", lambda *_, **__: "triton")
    monkeypatch.setattr(dispatch, "_cache", {})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "device", device)
    serve = dispatch.select("rms_norm", "cuda", torch.bfloat16)
    assert (serve is kernel) == (gpus == 1)
    assert dispatch.select("rms_norm", "cuda", torch.bfloat16) is serve
    assert serve(OnGpu(1), eps=0.5) == 0.5
    serve([OnGpu(1), OnGpu(1)], None)
    serve(OnGpu(0))
    serve(None)
    assert seen == ([1, 1, 0, 0] if gpus > 1 else [0, 0, 0, 0])
    assert current == [0]
    assert dispatch.select("rms_norm", "cpu", torch.bfloat16) is kernel


@pytest.mark.parametrize(
    "capability, want", [(75, None), (80, "80"), (86, "80"), (90, "90"), (100, "100"), (120, "80")]
)
def test_configuration_of_a_capability(capability: int, want: str | None) -> None:
    """That of the highest one that is not above it; 12.x is no 10.0. The same when asked again."""
    configs = _triton.Configs("test", {(80, "key"): "80", (90, "key"): "90", (100, "key"): "100"})
    if want is None:
        with pytest.raises(KeyError, match="no launch configuration"):
            configs.pick(capability, "key")
    else:
        assert configs.pick(capability, "key") == want
        configs.table.clear()  # found once, it is not looked for again
        assert configs.pick(capability, "key") == want

# SPDX-License-Identifier: Apache-2.0
"""Who computes `attention` on a GPU: measurements, fallbacks, and what is put right behind a library. No GPU needed."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glimpse_kernels import _triton, dispatch, force_backend, proof
from glimpse_kernels import measured as record
from glimpse_kernels.attention import _flash, choice, flash_attn, torch_flash
from glimpse_kernels.attention.naive import attention as naive_attention
from tests.kernels.kernel_cases import cu_seqlens, needs_triton

CALL = choice.Call(
    dtype=torch.bfloat16, dim=128, v_dim=128, heads=28, kv_heads=4, causal=True, positions=False,
    segments=1, queries=1000, keys=1000, bounded=False,
)  # fmt: skip
KEY = "bfloat16 causal 128/128 grouped 1024x1024"


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing remembered before or after."""
    caches: tuple[Any, ...] = (choice.choose, record.record, torch_flash.missing, flash_attn.missing)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def measured(monkeypatch: pytest.MonkeyPatch, path: Path, **seconds: float) -> None:
    monkeypatch.setattr(record, "RECORD", path / "measured.json")
    record.write({"GPU": {"attention": {KEY: seconds}}} if seconds else {})


def available(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for module in (torch_flash, flash_attn):
        here = module.__name__.rpartition(".")[2] in names
        monkeypatch.setattr(module, "missing", lambda here=here: "" if here else "not here")
    choice.choose.cache_clear()


def proven(monkeypatch: pytest.MonkeyPatch, yes: bool) -> None:
    monkeypatch.setattr(proof, "proven", lambda op, backend: yes)


def test_fastest_that_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured(monkeypatch, tmp_path, triton=2e-5, torch_flash=1e-5, flash_attn=0.5e-5)
    proven(monkeypatch, True)
    available(monkeypatch, "torch_flash")
    assert choice.choose(CALL, "GPU") == "torch_flash"
    available(monkeypatch, "torch_flash", "flash_attn")
    assert choice.choose(CALL, "GPU") == "flash_attn"
    available(monkeypatch)
    assert choice.choose(CALL, "GPU") == "triton"
    available(monkeypatch, "torch_flash")
    assert choice.choose(replace(CALL, positions=True), "GPU") == "triton"
    assert choice.choose(replace(CALL, queries=10), "GPU") == "triton"  # another kind of call
    assert choice.choose(CALL, "another GPU") == "triton"


def test_without_a_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What nobody has seen run on a GPU like this is not chosen: neither ours nor a library behind our wrapper."""
    measured(monkeypatch, tmp_path, flash_attn=1e-5)
    available(monkeypatch, "flash_attn", "torch_flash")
    other = replace(CALL, queries=10)
    proven(monkeypatch, False)
    assert choice.choose(other, "GPU") == "flash_attn"  # it was measured there on another kind of call
    assert choice.choose(replace(other, v_dim=64), "GPU") == "triton"
    assert choice.choose(other, "another GPU") == "triton"
    choice.choose.cache_clear()
    proven(monkeypatch, True)
    assert choice.choose(other, "GPU") == "triton"


def test_kinds_of_calls() -> None:
    assert CALL.key() == KEY
    windows = replace(CALL, causal=False, segments=256, queries=16384, keys=16384, heads=4, dim=80)
    assert windows.key() == "bfloat16 full 80/128 each 64x64"
    assert replace(CALL, positions=True).key() == KEY.replace("causal", "positions")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"dtype": torch.float32}, "16-bit kernels only, not float32"),
        ({"v_dim": 64}, "equal head dimensions, not 128 and 64"),
        ({"dim": 264, "v_dim": 264}, "not 264"),
        ({"dim": 84, "v_dim": 84}, "not 84"),
        ({"positions": True}, "no q_positions"),
        ({"keys": 0}, "nothing"),
        ({"rising": False}, "positive scale"),
        ({"aligned": False}, "multiples of 16 bytes"),
        ({"segments": 5}, "for 5 segments"),
        ({"segments": 5, "bounded": True}, ""),
    ],
)
@pytest.mark.parametrize("module", [torch_flash, flash_attn], ids=["torch", "package"])
def test_what_a_library_serves(
    monkeypatch: pytest.MonkeyPatch, module: types.ModuleType, change: dict[str, Any], words: str
) -> None:
    available(monkeypatch, "torch_flash", "flash_attn")
    reason = module.serves(replace(CALL, **change))
    assert words in reason and bool(words) == bool(reason)


@needs_triton
def test_libraries_that_are_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.backends.cuda.is_built():
        assert torch_flash.missing() == "PyTorch is built without CUDA"
    monkeypatch.setitem(sys.modules, "flash_attn", package("2.5.9"))
    assert "2.5.9 is older than 2.6" in flash_attn.missing()
    flash_attn.missing.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn", package("2.8.3"))
    assert flash_attn.missing() == ""


def package(version: str, function: Callable[..., Any] = print) -> types.ModuleType:
    module = types.ModuleType("flash_attn")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    module.__version__ = version  # type: ignore[attr-defined]
    module.flash_attn_varlen_func = function  # type: ignore[attr-defined]
    return module


def library_like(seen: list[tuple[int, int]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """FlashAttention-2 as it behaves: rows outside unwritten, lse by heads, +inf where nothing is seen."""

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        most_q: int,
        most_k: int,
        causal: bool,
        scale: float | None,
    ) -> tuple[Tensor, Tensor]:
        seen.append((most_q, most_k))
        out, lse = naive_attention(q, k, v, cu_q, cu_k, causal=causal, scale=scale, return_lse=True)
        lse[lse == float("-inf")] = float("inf")
        row = torch.arange(q.shape[0])
        outside = (row < cu_q[0]) | (row >= cu_q[-1])
        out[outside] = float("nan")
        lse[outside] = float("nan")
        return out, lse.transpose(0, 1).contiguous()

    return run


needs_interpreter = pytest.mark.skipif(not _triton.interpreting(), reason="runs a kernel on CPU tensors")


@needs_interpreter
@pytest.mark.parametrize("name", ["torch_flash", "flash_attn"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_results_of_a_library_are_made_ours(
    monkeypatch: pytest.MonkeyPatch, name: str, return_lse: bool
) -> None:
    seen: list[tuple[int, int]] = []
    run = library_like(seen)

    def aten(q, k, v, cu_q, cu_k, most_q, most_k, dropout, causal, debug, *, scale=None):  # type: ignore[no-untyped-def]
        assert dropout == 0.0 and debug is False
        return *run(q, k, v, cu_q, cu_k, most_q, most_k, causal, scale), None, None, None

    def varlen(q, k, v, cu_q, cu_k, most_q, most_k, *, dropout_p, softmax_scale, causal, return_attn_probs):  # type: ignore[no-untyped-def]
        assert dropout_p == 0.0
        out, lse = run(q, k, v, cu_q, cu_k, most_q, most_k, causal, softmax_scale)
        return (out, lse, None) if return_attn_probs else out

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", aten)
    monkeypatch.setitem(sys.modules, "flash_attn", package("2.8.3", varlen))
    serve = {"torch_flash": torch_flash, "flash_attn": flash_attn}[name].attention
    q, k, v = (torch.randn(n, h, 24).half() for n, h in ((40, 6), (30, 2), (30, 2)))
    cu_q, cu_k = cu_seqlens([9, 0, 6]) + 18, cu_seqlens([4, 3, 8]) + 2
    want, want_lse = naive_attention(q, k, v, cu_q, cu_k, causal=True, scale=0.3, return_lse=True)
    for out in (None, torch.full((40, 2, 6, 24), float("nan")).half()[:, 1]):
        found = serve(
            q,
            k,
            v,
            cu_q,
            cu_k,
            causal=True,
            scale=0.3,
            max_seqlen_q=9 if out is None else None,
            out=out,
            return_lse=return_lse,
        )
        values = found[0] if return_lse else found
        assert torch.equal(values, want)
        assert out is None or values.data_ptr() == out.data_ptr()
        assert not return_lse or torch.equal(found[1], want_lse)
    assert seen == [(9, 30), (40, 30)]


@needs_interpreter
def test_one_bound_for_self_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    run = library_like(seen)
    monkeypatch.setattr(
        torch.ops.aten, "_flash_attention_forward", lambda *a, scale: run(*a[:7], a[8], scale)
    )
    q, k, v = (torch.randn(20, 2, 8).half() for _ in range(3))
    bounds = cu_seqlens([8, 12])
    torch_flash.attention(q, k, v, bounds, bounds, causal=False, max_seqlen_q=12)
    torch_flash.attention(q, k, v, bounds, bounds.clone(), causal=False, max_seqlen_q=12)
    assert seen == [(12, 12), (12, 20)]


@pytest.mark.parametrize(
    ("rows", "bounds", "hint", "want"),
    [
        (1, [0, 1], None, 1),
        (1, [0, 0], None, 1),  # the lone row is outside, which `finish` sees
        (2, [0, 0, 1, 2], 1, 2),  # an empty segment
        (3, [0, 1, 1, 2], 1, 2),  # as many rows as segments, and yet not one each
        (1, [0, 0, 1], None, 2),
        (2, [1, 2], 1, 2),
    ],
)
def test_a_bound_of_one_is_for_a_lone_row(rows: int, bounds: list[int], hint: int | None, want: int) -> None:
    """With it and shared key heads, FlashAttention-2 takes row i for segment i (`seqlenq_ngroups_swapped`)."""
    q, k = torch.zeros(rows, 4, 8), torch.zeros(9, 2, 8)
    cu_q = torch.tensor(bounds, dtype=torch.int32)
    assert _flash.longest(q, k, cu_q, cu_q.clone(), hint) == (want, 9)


@needs_triton
def test_an_lse_of_another_shape_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.ops.aten, "_flash_attention_forward", lambda q, *a, scale: (q, torch.zeros(1, 2, 20))
    )
    q = torch.randn(20, 2, 8).half()
    bounds = cu_seqlens([20])
    with pytest.raises(RuntimeError, match=r"lse of shape \[Hq, Tq\] = \[2, 20\], found \[1, 2, 20\]"):
        torch_flash.attention(q, q, q, bounds, bounds, causal=False, return_lse=True)


def test_what_the_op_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """`provider` describes the tensors; nothing is asked where a backend is forced."""
    asked: list[choice.Call] = []
    monkeypatch.setattr(record, "gpu", lambda index: "GPU")

    def choose(call: choice.Call, device: str) -> str:
        asked.append(call)
        return "torch_flash"

    monkeypatch.setattr(choice, "choose", choose)
    q, k, v = torch.zeros(6, 4, 8).half(), torch.zeros(9, 2, 8).half(), torch.zeros(9, 2, 17).half()[..., :16]
    words: dict[str, Any] = {
        "segments": 3,
        "causal": True,
        "scale": -1.0,
        "positions": False,
        "bounded": True,
    }
    with force_backend("auto"):
        assert choice.provider(q, k, v, **words) is torch_flash.attention
    assert asked == [
        choice.Call(torch.float16, 8, 16, 4, 2, True, False, 3, 6, 9, True, aligned=False, rising=False)
    ]
    with force_backend("naive"):
        assert choice.provider(q, k, v, **words) is None
    monkeypatch.setattr(choice, "choose", lambda call, device: choice.OURS)
    assert dispatch.forced_backend() != "auto" or choice.provider(q, k, v, **words) is None

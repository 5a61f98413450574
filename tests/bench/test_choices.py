# SPDX-License-Identifier: Apache-2.0
"""How choices among kernels are measured and kept, rehearsed without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import choice_cases, choices, gpu_status
from bench.choice_cases import Choice, Contest
from bench.choices import Found
from bench.gpu_timing import HostWatch
from bench.op_registry import Results, Work
from glimpse_kernels import _cuda, _triton, dispatch, force_backend, measured
from tests.stand_in import stand_in_gpu

ROOT = Path(__file__).parents[2]
rehearsed = pytest.mark.skipif(
    not (_triton.interpreting() and _cuda.emulating()),
    reason="the interpreter and the emulation are needed, and a machine without a GPU",
)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.choices", *arguments]
    env = os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1000)


@rehearsed
def test_rehearsal_writes_a_record(tmp_path: Path) -> None:
    file = tmp_path / "measured.json"
    done = run("patchify", "attention", "--rehearse", "--seconds", "600", "--output", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())["rehearsal"]
    assert set(found) == {"patchify", "attention"}
    assert set(found["patchify"]) == {"uint8 4096", "uint8 8192x4096"}  # 56 x 56 is nearest to 4096
    for times in found["patchify"].values():
        assert set(times) == {"cuda", "triton"} and all(s > 0 for s in times.values())
    assert "float32 causal 16/16 grouped 1x64" in found["attention"]
    assert all(set(times) == {"triton"} for times in found["attention"].values())


def test_without_a_gpu_and_with_unknown_ops(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        done = run("--dry")
        assert done.returncode == 2 and "no CUDA device" in done.stderr
    if _triton.interpreting() and _cuda.emulating():
        done = run("swiglu", "--rehearse", "--dry")
        assert done.returncode == 2 and "swiglu" in done.stderr


@rehearsed
def test_every_call_is_right_and_told_by_its_op() -> None:
    """Each of the grid, tiny: built, checked by every backend the op has here, and kept under a kind that the op named."""
    seen: dict[str, set[str]] = {}
    with stand_in_gpu(), torch.inference_mode(), torch.device("cuda"):
        for choice, among in choices.plan((), "cuda", rehearse=True):
            if choice.label in seen.setdefault(choice.op, set()):
                continue
            seen[choice.op].add(choice.label)
            found = Found()
            choices.measure(choice, among, HostWatch(), found)
            assert not found.faults and len(found.kinds) == 1
            (kind,) = found.kinds
            assert choice.op == "attention" or measured.order(kind)[1], kind
    both = {op for op in choices.names() if len(choices.providers(op, "cuda", lambda *_: True)) > 1}
    assert set(seen) == both | {"attention"}


def test_the_grid_has_every_op_with_two_kernels() -> None:
    assert {choice.op for choice in choice_cases.between_backends()} >= set(choices.names()) - {"attention"}


def of_values(values: dict[str, float], kinds: tuple[str, ...] = ("float32 1x8",)) -> Choice:
    """A call whose providers give these values; the right one is 1."""

    def give(value: float) -> Callable[[], Results]:
        if value == 0.0:
            return lambda: 1 // 0  # type: ignore[return-value]
        return lambda: (torch.full((3,), value),)

    def build(providers: tuple[str, ...], told: set[str]) -> Contest:
        told.update(kinds)
        calls = {name: give(values[name]) for name in providers}
        return Contest(Work(give(1.0), give(1.0), give(1.0), 0.0, "flop"), calls, calls)

    return Choice("select_tokens", "a call", torch.float32, build)


def test_who_is_wrong_gets_no_time() -> None:
    found = Found()
    values = {"triton": 1.0, "cuda": 1.5, "other": 0.0}
    times = choices.measure(of_values(values), tuple(values), HostWatch(), found)
    assert set(times) == {"triton"} and set(found.means()["float32 1x8"]) == {"triton"}
    assert [fault.partition(": ")[0] for fault in found.faults] == [
        "select_tokens, cuda",
        "select_tokens, other",
    ]
    assert "error 5.00e-01" in found.faults[0] and "ZeroDivisionError" in found.faults[1]
    choices.measure(of_values({"cuda": 2.0}), ("cuda",), HostWatch(), found)
    assert found.means() == {}  # nobody was right on both calls of the kind


def test_calls_of_one_kind_count_alike() -> None:
    found = Found({"k": [{"cuda": 1.0, "triton": 4.0}, {"cuda": 3.0, "triton": 2.0}], "l": [{"cuda": 1.0}]})
    assert found.means() == {"k": {"cuda": 2.0, "triton": 3.0}, "l": {"cuda": 1.0}}


def test_what_is_found_enters_the_record() -> None:
    """Measured to its end, an op is written anew; cut short, it is added to. Other ops and GPUs stay."""
    record = {"A": {"compact": {"old": {"cuda": 1.0}}, "vip": {"v": {"cuda": 1.0}}}, "B": {}}
    found = Found({"new": [{"cuda": 2.0}]})
    wanted = {"A": {"compact": {"new": {"cuda": 2.0}}, "vip": {"v": {"cuda": 1.0}}}, "B": {}}
    assert choices.merged(record, "A", "compact", found) == wanted
    found.whole = False
    assert set(choices.merged(record, "A", "compact", found)["A"]["compact"]) == {"old", "new"}
    assert choices.merged(record, "A", "compact", Found(whole=False)) == record
    assert choices.merged({}, "A", "compact", Found()) == {}


def test_a_call_that_cannot_be_made_leaves_the_others() -> None:
    def broken(providers: tuple[str, ...], told: set[str]) -> Contest:
        raise RuntimeError("no such kernel")

    def too_large(providers: tuple[str, ...], told: set[str]) -> Contest:
        raise torch.cuda.OutOfMemoryError("out of memory")

    good = of_values({"triton": 1.0, "cuda": 1.0})
    bad, large = (
        Choice("select_tokens", build.__name__, torch.float32, build) for build in (broken, too_large)
    )
    told: list[tuple[str, set[str]]] = []
    faults = choices.run(
        [(bad, ("triton", "cuda")), (large, ("triton", "cuda")), (good, ("triton", "cuda"))], HostWatch(), float("inf"),
        lambda choice, times: None, lambda op, found: told.append((op, set(found.means()))),
    )  # fmt: skip
    assert (
        len(faults) == 1
        and "broken: RuntimeError: no such kernel" in faults[0]
        and told == [("select_tokens", {"float32 1x8"})]
    )


def test_out_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Found] = []
    pair = of_values({"cuda": 1.0}), ("cuda",)
    assert choices.run([pair], HostWatch(), 0.0, lambda *_: None, lambda op, found: told.append(found)) == []
    assert not told[0].whole and not told[0].kinds


def test_only_proven_kernels_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "names", lambda: ("compact", "patchify", "attention"))
    monkeypatch.setattr(choices, "usable", lambda op, device: ("triton", "cuda"))
    proven = {("compact", "triton"), ("compact", "cuda"), ("patchify", "cuda")}
    monkeypatch.setattr(choices.proof, "proven", lambda op, backend: (op, backend) in proven)
    assert choices.providers("patchify", "cuda", choices.proof.proven) == ("cuda",)
    assert {choice.op for choice, _ in choices.plan((), "cuda", rehearse=False)} - {"attention"} == {
        "compact"
    }
    assert not list(choices.plan(("patchify",), "cuda", rehearse=False))


def test_kinds_are_noted_of_one_op() -> None:
    kinds: set[str] = set()
    with choice_cases.noted("compact", kinds), force_backend("naive"):
        dispatch.select("compact", "cuda", torch.bfloat16, size=(100, 5000))
        dispatch.select("compact", "cuda", torch.bfloat16)
        dispatch.select("rope", "cuda", torch.bfloat16, size=(1,))
    assert kinds == {"bfloat16 128x4096"}


def test_the_page_shows_the_record() -> None:
    record: dict[str, Any] = {
        "NVIDIA H200": {
            "compact": {
                "bfloat16 4096x64": {"cuda": 2e-5, "triton": 1.25e-5},
                "bfloat16 128x64": {"cuda": 4e-6, "triton": 5e-6},
            }
        }
    }
    text = gpu_status.render([], [], record)
    small = "| NVIDIA H200 | `compact` | bfloat16 128x64 | cuda | cuda 4.0, triton 5.0 |"
    large = "| NVIDIA H200 | `compact` | bfloat16 4096x64 | triton | triton 12.5, cuda 20.0 |"
    assert f"{small}\n{large}" in text
    assert "Nothing has been measured yet" in gpu_status.render([], [], {})

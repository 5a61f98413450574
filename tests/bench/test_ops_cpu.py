# SPDX-License-Identifier: Apache-2.0
"""The kernel benchmark runs, covers every op, and prints no number for a wrong result."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
import typer
from torch import Tensor
from typer.testing import CliRunner

from bench import ops_cpu, timing
from bench.ceilings import Ceilings
from bench.gate import Verdict, judge
from bench.op_registry import REGISTRY, TINY, Work, sizes
from bench.op_report import Outcome
from glimpse_kernels import dispatch

FIGURES = {"ours_s", "torch_s", "ratio", "rate", "share_of_ceiling", "samples"}

app = typer.Typer()
app.command()(ops_cpu.main)


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def serving(op: str) -> str:
    """Module of the backend that serves an op here."""
    backend = dispatch.choose(op, "cpu", torch.float32)
    return f"glimpse_kernels.{op}.{backend}"


def test_quick_run_measures_every_op(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    code, text = run("--quick", "--threads", "1", "--output", str(file))
    assert code == 0, text
    figures = json.loads(file.read_text())
    assert {row["op"] for row in figures["rows"]} == set(dispatch.ops())
    assert {row["dtype"] for row in figures["rows"]} == {"bf16", "fp32", "-"}
    for row in figures["rows"]:
        assert set(row) >= FIGURES and row["fault"] is None
        assert row["ours_s"] > 0 and row["torch_s"] > 0 and row["error"] <= row["allowed"]
    assert (
        figures["threads"] == 1
        and figures["read_bytes_s"] > 0
        and set(figures["gemm_flop_s"]) == {"bf16", "fp32"}
    )


def test_wrong_backend_gets_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(serving("swiglu"))
    right = module.swiglu

    def wrong(gate: Tensor, up: Tensor, *, out: Tensor | None = None) -> Tensor:
        result: Tensor = right(gate, up, out=out)
        result[-1, -1] += 1.0  # one element of the last row
        return result

    monkeypatch.setattr(module, "swiglu", wrong)
    file = tmp_path / "figures.json"
    code, text = run("swiglu", "rms_norm", "--quick", "--threads", "1", "--output", str(file))
    assert code == 1
    assert "wrong result, not timed" in text
    for row in json.loads(file.read_text())["rows"]:
        if row["op"] == "swiglu":
            assert row["fault"] and not set(row) & FIGURES
        else:
            assert row["fault"] is None and set(row) >= FIGURES
    line = next(
        line for line in text.splitlines() if "swiglu" in line and "vision" in line and "fp32" in line
    )
    assert "wrong" in line and "%" not in line


def test_raising_backend_gets_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> Tensor:
        raise RuntimeError("out of order")

    monkeypatch.setattr(importlib.import_module(serving("swiglu")), "swiglu", broken)
    code, text = run("swiglu", "--quick", "--dtype", "fp32", "--threads", "1")
    assert code == 1 and "RuntimeError: out of order" in text


def constant(value: float) -> tuple[Tensor]:
    return (torch.full((4,), value),)


@pytest.mark.parametrize(
    ("ours", "plain", "tolerance", "passes"),
    [
        (1.0, 1.0, None, True),
        (1.0 + 2e-6, 1.0, None, False),  # 17 units in the last place
        (1.0 + 2e-6, 1.0 + 1e-6, None, True),  # twice what plain torch is off by
        (1.0, 1.1, None, False),  # a plain contender that computes something else is no yardstick
        (float("nan"), 1.0, None, False),
        (float("nan"), 1.0, 1e-5, False),
        (1.0 + 1e-6, 1.0, 0.0, False),
        (1.0 + 1e-6, 1.0, 1e-5, True),
    ],
)
def test_gate(ours: float, plain: float, tolerance: float | None, passes: bool) -> None:
    work = Work(
        lambda: constant(ours), lambda: constant(plain), lambda: constant(1.0), 1.0, "byte", tolerance
    )
    assert (judge(work, torch.float32).fault == "") is passes


def test_gate_looks_at_shapes_and_at_every_result() -> None:
    right = (torch.ones(4), torch.ones(4))
    for found in ((torch.ones(4),), (torch.ones(4), torch.ones(5)), (torch.ones(4), torch.zeros(4))):
        work = Work(lambda found=found: found, lambda: right, lambda: right, 1.0, "byte")  # type: ignore[misc]
        assert judge(work, torch.float32).fault


def test_rows_are_unique_and_sizes_come_from_the_shapes() -> None:
    names = [(row.op, row.what) for row in REGISTRY.rows]
    assert len(set(names)) == len(names)
    big = sizes("3b")
    assert (big.image, big.rows, big.patches, big.kept, big.dim, big.vision_dim) == (
        1024,
        1085,
        4096,
        136,
        128,
        80,
    )
    dtypes = [torch.float32, torch.bfloat16]
    once = [case for case in REGISTRY.cases(["patchify"], [big, sizes("mid")], dtypes)]
    assert [case.row.what for case in once] == ["1 picture", "resize + patches"]
    assert len(list(REGISTRY.cases(["patchify"], [big, TINY], dtypes))) == 4  # two sizes of picture
    assert not [case for case in REGISTRY.cases([], [big], dtypes, "cpu") if case.row.where == "gpu"]


def test_interleaving_rotates_who_goes_first() -> None:
    calls: list[str] = []
    contenders = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    samples = timing.interleaved(
        contenders, now=timing.clock(False), repeats=4, seconds=9.0, before=lambda: calls.append("-")
    )
    assert "".join(calls) == "-a-b-c-b-c-a-c-a-b-a-b-c"
    assert [len(times) for times in samples.values()] == [4, 4, 4]


def test_short_calls_are_repeated_within_a_sample() -> None:
    time = iter(range(10**6))
    samples = timing.interleaved(
        {"a": lambda: None, "b": lambda: None}, now=lambda: next(time) * 2**-12, repeats=2, seconds=9.0
    )
    # The clock ticks 0.24 ms a look: two calls fill a sample of 0.4 ms and share the tick that passes.
    assert samples == {"a": [2**-13, 2**-13], "b": [2**-13, 2**-13]}


def test_the_fastest_plain_torch_is_the_yardstick() -> None:
    case = next(REGISTRY.cases(["swiglu"], [TINY], [torch.float32]))
    samples = {"ours": [2.0, 2.0, 9.0], "slow": [8.0, 1.0, 8.0], "fast": [3.0, 3.0, 3.0]}
    row = Outcome(case, Verdict(0.0, 0.0), samples, 60.0, "byte").record(Ceilings(40.0, {}))
    assert (row["torch_by"], row["ratio"], row["rate"], row["share_of_ceiling"]) == ("fast", 1.5, 30.0, 0.75)


def test_bad_arguments() -> None:
    for arguments in (["softmax"], ["--dtype", "fp8"], ["--shape", "70b"], ["--cpu-time"]):
        code, text = run(*arguments, "--quick")
        assert code == 2 and "Invalid value" in text
    code, text = run("rope", "--list")
    assert code == 0 and text.count("rope") == 3

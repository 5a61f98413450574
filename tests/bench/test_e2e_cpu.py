# SPDX-License-Identifier: Apache-2.0
"""The measurement of whole requests runs, reports every contender and aim, and survives Ctrl-C."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from bench import e2e_cpu
from bench.e2e_memory import peak
from bench.e2e_report import AIMS, grids, markdown
from bench.e2e_run import TINY_FOLDER, Contender, Pace, Setting, contenders
from bench.shapes import SHAPES

NAMES = ["transformers", "unpruned", "pruned", "int8 unpruned", "int8 pruned"]

app = typer.Typer()
app.command()(e2e_cpu.main)


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("e2e") / "figures.json"
    code, text = run("--shape", "tiny", "--quick", "--output", str(file))
    assert code == 0, text
    assert all(name in text for name in NAMES)
    assert max(map(len, text.splitlines())) <= 130 and "…" not in text
    return file


def test_quick_run_measures_every_contender(quick: Path) -> None:
    record = json.loads(quick.read_text())
    assert list(record["median"]) == NAMES and record["rounds"] == 1 and not record["interrupted"]
    assert record["setting"]["image_tokens"] == 144 and record["setting"]["new_tokens"] == 4
    looks = record["ceilings"]
    assert len(looks["read"]) == len(looks["gemm"]) == 2 * len(NAMES) + 1 and min(looks["read"]) > 0
    for name, m in record["median"].items():
        assert m["ttft"] > 0 and m["decode"] > 0
        assert m["share_ttft"] == pytest.approx(m["flop"] / m["ttft"] / m["gemm"])
        assert m["share_decode"] == pytest.approx(m["bytes"] / m["decode"] / m["read"])
        if name == "transformers":
            assert m["flop"] == record["median"]["unpruned"]["flop"]
            continue
        assert m["vision"] + m["before"] + m["select"] + m["after"] <= m["ttft"]
        assert 0 < m["outside"] < 1  # steps were replayed, and not all of a step is
        assert ("kept" in m) is ("share_select" in m) is ("unpruned" not in name)
    plain, pruned, int8 = (record["median"][name] for name in ("unpruned", "pruned", "int8 unpruned"))
    assert pruned["flop_after"] < plain["flop_after"] / 4 and pruned["flop_vision"] == plain["flop_vision"]
    assert int8["bytes"] < 0.6 * plain["bytes"]


def test_a_written_record_renders_again(quick: Path) -> None:
    code, text = run("--render", str(quick), "--markdown")
    assert code == 0
    for line in text.splitlines():
        if line.startswith("| "):
            assert line.endswith(" |")
    assert text.count("| --- |") == 3 and "| outside the replay, pruned | <= 25 % |" in text
    assert text == markdown(json.loads(quick.read_text())) + "\n"


def median(ttft: float, decode: float, **more: float) -> dict[str, float]:
    return {
        "ttft": ttft,
        "decode": decode,
        "flop": 1e12,
        "bytes": 5e8,
        "share_ttft": 0.5,
        "share_decode": 0.8,
        **more,
    }


def test_aims_of_mid() -> None:
    medians = {
        "transformers": median(5.5, 0.06),
        "unpruned": median(3.3, 0.02),
        "pruned": median(2.5, 0.015),
        "int8 unpruned": median(3.3, 0.0125),
        "int8 pruned": median(3.3, 0.008),
    }
    held = {"weights": 0.9, "kv": 0.1, "imports": 0.3, "loaded": 1.3, "load_peak": 1.4, "peak": 1.45}
    record: dict[str, Any] = {
        "setting": {"shape": "mid", "dtype": "bf16", "image_tokens": 1, "prompt_tokens": 2},
        "median": medians,
        "memory": {"unpruned": held},
        "ceilings": {"read": [1.0], "gemm": [1.0], "forms": {"bf16 product: F.linear": 1.0}},
    }
    aims = {row[0]: tuple(row[1:]) for row in grids(record)[-1].rows}
    assert aims["first token, unpruned"] == (">= 1.8 x", "1.67 x", "no")
    assert aims["first token, pruned"] == (">= 1.8 x", "2.20 x", "yes")
    assert aims["first token where transformers takes 5.5 s, unpruned"][1:] == ("3.30 s", "yes")
    assert aims["decode, unpruned"] == (">= 3.5 x", "3.00 x", "no")
    assert aims["decode, pruned"] == (">= 3.5 x", "4.00 x", "yes")
    assert aims["decode of the read limit, pruned"] == (">= 80 %", "80 %", "yes")
    assert aims["int8 decode over bf16, unpruned"] == (">= 1.7 x", "1.60 x", "no")
    assert aims["int8 decode over bf16, pruned"][1:] == ("1.88 x", "yes")
    assert aims["peak / (weights + KV), unpruned"] == ("<= 1.2", "1.45", "no")
    assert aims["the same less the libraries, unpruned"] == ("<= 1.2", "1.15", "yes")
    record["setting"]["dtype"] = "fp32"
    assert grids(record)[-1].title != "Aims"


def test_aims_name_shapes_there_are() -> None:
    assert set(AIMS) <= {*SHAPES, "tiny"}


def test_interrupt_reports_whole_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = e2e_cpu.request, iter(range(2 * len(NAMES) + 2))

    def stopped(*arguments: Any) -> dict[str, Any]:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(e2e_cpu, "request", stopped)
    file = tmp_path / "figures.json"
    code, text = run("--shape", "tiny", "--quick", "--repeats", "3", "--output", str(file))
    assert code == 130 and "interrupted: 1 whole round" in text
    assert {len(runs) for runs in json.loads(file.read_text())["runs"].values()} == {1}


def test_memory_of_a_process() -> None:
    setting = Setting("tiny", 0, "bf16", 0.1, 4)
    base, modules = TINY_FOLDER / "base", TINY_FOLDER / "glimpse"
    found = peak(Contender("pruned", "plain", True), setting, base, modules, 1)
    weights = (base / "model.safetensors").stat().st_size + (modules / "new_modules_gp.pt").stat().st_size
    assert found["weights"] * 2**30 == pytest.approx(weights, rel=0.1)
    assert (
        0.05 < found["imports"] <= found["loaded"] <= found["load_peak"] and found["peak"] > found["weights"]
    )
    rows = found["kv"] * 2**30 / (2 * 10 * 2 * 32 * 2)
    assert 16 < rows < 16 + 144
    with pytest.raises(RuntimeError, match="memory of pruned: .*nowhere"):
        peak(Contender("pruned", "plain", True), setting, Path("/nowhere"), modules, 1)


def test_the_clock_stands_while_the_machine_is_looked_at() -> None:
    clock = iter(range(100))
    rates = iter([10.0, 20.0, 40.0])
    pace = Pace(lambda: next(rates), 2, lambda: float(next(clock)))
    for _ in range(1 + 7):  # the prompt and seven tokens
        pace.put(torch.zeros(1))
    # The clock ticks once a look at it: token 1 at 0; looks after tokens 2, 4 and 6 from 1 to 2, 3 to 4 and 5 to 6.
    assert pace.first == 0 and pace.stood == 3
    assert pace.stretches() == [(2, 1.0, 15.0), (2, 1.0, 30.0)]


def test_the_recorded_command_names_no_files() -> None:
    given = [
        "--shape",
        "3b",
        "--output",
        "/some where/x.json",
        "--markdown",
        "--repeats",
        "2",
        "--output=y.json",
    ]
    assert e2e_cpu._command(given) == "python -m bench.e2e_cpu --shape 3b --repeats 2"
    assert e2e_cpu._command([]) == "python -m bench.e2e_cpu"


def test_bad_arguments() -> None:
    for arguments in (
        ["--shape", "70b"],
        ["--dtype", "fp8"],
        ["--new-tokens", "1"],
        ["--render", "/nowhere.json"],
    ):
        code, text = run(*arguments, "--quick")
        assert code == 2 and "Invalid value" in text


def test_contenders_are_named_once() -> None:
    assert [c.name for c in contenders()] == NAMES

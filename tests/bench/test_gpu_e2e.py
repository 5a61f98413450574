# SPDX-License-Identifier: Apache-2.0
"""Whole requests on a GPU, rehearsed without one: every row, the bookkeeping around rows that fail, the targets, the page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_e2e, gpu_e2e_plan, gpu_e2e_report, gpu_e2e_worker, gpu_facts, gpu_status
from bench.gpu_e2e_contenders import Keep, Runtime
from bench.gpu_e2e_measure import Row, described, flops, step_bytes
from bench.gpu_e2e_seams import Beat, Marks, runtime_seams
from bench.gpu_e2e_worker import Job
from bench.gpu_e2e_world import FULL, SMALL, World

ROOT = Path(__file__).parents[2]
FACTS = {
    "device": "NVIDIA H200",
    "date": "2026-11-21",
    "time": "2026-11-21T10:00:00+00:00",
    "torch": "2.11.0",
}
CEILINGS = {"copy_bytes_s": 4e12, "gemm_flop_s": {"bf16": 8e14}}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "OUT")} | environment
    command = [sys.executable, "-m", "bench.gpu_e2e", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)


def test_rehearsal_takes_every_row(tmp_path: Path) -> None:
    done = run("--rehearse", "--seconds", "800", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(next(tmp_path.glob("rehearsal*-e2e-*.json")).read_text())
    assert report["kind"] == "rehearsal" and not report.get("problems"), report.get("problems")
    assert report["ceilings"]["copy_bytes_s"] > 0 and report["serving"]["attention"] == "cpu"
    rows = report["rows"]
    assert [row["name"] for row in rows] == [row.name for row in gpu_e2e_plan.rows(SMALL)]
    wrong = [gpu_e2e_report.line(row, {}) for row in rows if not gpu_e2e_report.done(row)]
    assert not wrong
    assert not [note for row in rows for note in row.get("notes", ())]
    for row in rows:
        if row["kind"] == "request":
            phases = {"preprocess", "vision", "after"} | ({"before", "select"} if row["ratio"] else set())
            assert set(row["phases"]) == phases and min(row["phases"].values()) > 0
            assert row["first_s"] > 0 and row["step_s"] > 0
            if row["by"] == "cap" and row["ratio"]:
                assert row["kept"] == max(1, int(row["ratio"] * row["tokens"]))
            if row["contender"] == "runtime":
                assert set(row["flop"]) == phases - {"preprocess"}
    assert [t["name"] for t in report["targets"] if t["measured"] is None] == []
    assert "checks all passed" in done.stdout and f"{len(rows)} of {len(rows)} rows" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_one_line_and_status_2() -> None:
    done = run()
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "no CUDA device" in done.stderr


@pytest.mark.parametrize("scale", [FULL, SMALL])
def test_the_plan_has_what_the_targets_need(scale: Any) -> None:
    plan = gpu_e2e_plan.rows(scale)
    kinds = [row.kind for row in plan]
    assert kinds[: kinds.count("check")] == ["check"] * kinds.count("check")
    assert (
        len({row.name for row in plan}) == len(plan) == len({tuple(described(row).values()) for row in plan})
    )
    quick = gpu_e2e_plan.rows(scale, quick=True)
    assert quick == plan[: len(quick)]
    figures = {
        "phases": {"before": 1.0, "select": 1.0, "after": 1.0}, "flop": {"after": 1.0}, "first_s": 1.0, "step_s": 1.0,
        "step_bytes": 1.0, "tokens_s": 1.0, "kv_bytes": 1.0, "peak_gib": 1.0,
    }  # fmt: skip
    found = gpu_e2e_report.check(
        [described(row) | figures for row in plan], CEILINGS, scale.tokens[1], scale.batches[-1]
    )
    assert all(target["measured"] is not None for target in found) and len(found) == 11
    first = {t["name"] for t in gpu_e2e_report.check([described(r) | figures for r in quick], CEILINGS,
             scale.tokens[1], scale.batches[-1]) if t["measured"] is not None}  # fmt: skip
    assert len(first) == 5


def figures(row: Row, **more: Any) -> dict[str, Any]:
    return described(row) | more


def test_targets_by_hand() -> None:
    asked, several, room = gpu_e2e_plan.asked, gpu_e2e_plan.several, gpu_e2e_plan.room
    pruned = {"before": 0.030, "select": 0.002, "after": 0.008}
    work = {"vision": 9e15, "before": 2e13, "select": 1e11, "after": 3e12}
    rows = [
        figures(asked("runtime", 4096, 0.074), first_s=0.1, phases={"vision": 1.0} | pruned, flop=work,
                step_s=0.004, step_bytes=15.2e9),
        figures(asked("runtime", 4096), first_s=0.2, phases={"after": 0.06}, flop={"after": 3.6e13}),
        figures(asked("original", 4096, 0.074), first_s=0.29),
        figures(several(4096, 64, 0.074), step_s=0.004, step_bytes=14e9, tokens_s=16000.0),
        figures(several(4096, 64), step_s=0.008, step_bytes=30e9, tokens_s=8000.0),
        figures(room(4096, 0.074), kv_bytes=416.0, peak_gib=0.5),
        figures(room(4096), kv_bytes=4192.0, peak_gib=0.4),
        figures(room(4096, 0.074, how="pictures"), peak_gib=0.5, fault="out of memory"),
        figures(room(4096, how="pictures"), peak_gib=0.5),
    ]  # fmt: skip
    found = [(t["measured"], t["met"]) for t in gpu_e2e_report.check(rows, CEILINGS)]
    wanted = [
        (2.9, False), (1.5, True), (75.0, True), (100 * 2.31e13 / 0.04 / 8e14, True), (95.0, True), (87.5, True),
        (93.75, True), (2.0, True), (4192 / 416, True), (1.25, False), (None, None),
    ]  # fmt: skip
    assert [(pytest.approx(m) if m else None, met) for m, met in wanted] == found


def test_the_page_tells_targets_rows_and_what_failed() -> None:
    nothing = "\n".join(gpu_e2e_report.section([]))
    assert "Nothing of this has run on a GPU yet" in nothing and nothing.count("not measured") == 11
    done = figures(gpu_e2e_plan.several(4096, 64, 0.074), step_s=0.004, step_bytes=14e9, tokens_s=16000.0, kept=303,
                   peak_gib=2.0, took_s=1.0)  # fmt: skip
    broken = figures(gpu_e2e_plan.several(4096, 64), fault="OutOfMemoryError: 2 GiB", took_s=1.0)
    checks = [
        figures(Row("check", "no_waits"), took_s=1.0),
        figures(Row("check", "finite"), skipped="no time"),
    ]
    rows = [*checks, done, broken]
    report = {
        "kind": gpu_e2e_report.KIND, "facts": FACTS, "ceilings": CEILINGS, "rows": rows, "file": "h200.json",
        "targets": gpu_e2e_report.check(rows, CEILINGS),
    }  # fmt: skip
    page = gpu_status.render([], [], {}, [report])
    assert "| decoding, 64 rows, pruned, of copy bandwidth | >= 85 % | 87.5 % | yes | `h200.json` |" in page
    assert (
        "| runtime, 64 rows of 4096 tokens, 7.4 % kept | 303 |" in page
        and "| 4.00 | 16000 | 88 % | 2.00 |" in page
    )
    assert "- runtime, 64 rows of 4096 tokens, unpruned: FAILED OutOfMemoryError: 2 GiB" in page
    assert "- check no_waits: passed" in page and "- check finite: no time" in page


def test_reports_are_found_by_their_kind(tmp_path: Path) -> None:
    for name, kind, when in (("b", "gpu-e2e", "1"), ("a", "gpu-e2e", "2"), ("c", "gpu-check", "0")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"kind": kind, "facts": {"time": when}}))
    assert [report["file"] for report in gpu_facts.results(gpu_e2e_report.KIND, tmp_path)] == [
        "b.json",
        "a.json",
    ]


def test_a_row_that_fails_does_not_stop_those_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = [Row("batch", "first"), Row("batch", "dear", seconds=500), Row("batch", "last")]

    def take(row: Row, *_: Any) -> dict[str, Any]:
        if row.name == "first":
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore words")
        return {"step_s": 1.0}

    monkeypatch.setattr(gpu_e2e_worker, "rows", lambda *_: plan)
    monkeypatch.setattr(gpu_e2e_worker, "take", take)
    lines = tmp_path / "lines"
    assert gpu_e2e_worker.main(Job(time.time() + 60, rehearse=True), lines) == 0
    facts = [json.loads(line) for line in lines.read_text().splitlines()]
    rows = [fact["row"] for fact in facts if "row" in fact]
    assert rows[0]["fault"] == "OutOfMemoryError: CUDA out of memory."
    assert "it may take 500 s" in rows[1]["skipped"] and rows[2]["step_s"] == 1.0
    assert [gpu_e2e_report.done(row) for row in rows] == [False, False, True]


WORKER = """
import json, sys, time
job, out = json.loads(sys.argv[3]), open(sys.argv[4], "a")
def tell(**fact):
    print(json.dumps(fact), file=out, flush=True)
tell(rows=9, backend="auto", serving={}, note="")
for number in range(job["start"], 9):
    tell(begin=number, name=f"row {number}", seconds=1)
    if number == 1:
        print("illegal address", file=sys.stderr)
        sys.exit(7)
    if number == 3:
        time.sleep(60)
    row = {"kind": "check", "name": f"row {number}", "contender": "", "tokens": 0, "batch": 1, "ratio": None}
    tell(row=row | {"by": "cap", "how": ""})
"""


def test_the_worker_is_started_again_behind_a_row_that_ended_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "worker"
    fake.write_text(f"#!{sys.executable}\n{WORKER}")
    fake.chmod(0o755)
    monkeypatch.setattr(gpu_e2e.sys, "executable", str(fake))
    monkeypatch.setattr(gpu_e2e, "SLACK", 1.0)
    monkeypatch.setattr(gpu_e2e, "PATIENCE", 0.0)
    report: dict[str, Any] = {"kind": "rehearsal", "facts": FACTS, "rows": []}
    one = gpu_e2e.Run(Job(time.time() + 60, rehearse=True), tmp_path / "report.json", report)
    one.supervise(tmp_path, time.monotonic() + 60)
    written = json.loads((tmp_path / "report.json").read_text())
    faults = {number: row["fault"] for number, row in enumerate(written["rows"]) if "fault" in row}
    assert list(faults) == [1, 3] and len(written["rows"]) == 9
    assert "status 7" in faults[1] and "no answer in 1 s" in faults[3]
    assert "illegal address" in written["problems"][0]
    assert not gpu_e2e.checks_passed(written)


def test_marks_give_each_phase_its_time() -> None:
    marks = Marks(torch.device("cpu"))
    for phase in ("start", "vision", "before", "before", "after"):
        marks(phase)
        time.sleep(0.02)
    found = marks.seconds()
    assert list(found) == ["vision", "before", "after"]
    assert found["before"] >= 0.04 and 0.02 <= found["after"] < 0.04 + found["vision"]


def test_the_beat_leaves_out_the_first_tokens() -> None:
    clock = iter([0.0, 1.0, 5.0, 5.5, 6.0, 6.5])
    beat = Beat(lambda: next(clock))
    for _ in range(7):  # the prompt comes first
        beat.put(torch.zeros(1))
    assert beat.step(2) == pytest.approx(0.5) and beat.step(0) == pytest.approx(1.3)
    with pytest.raises(RuntimeError, match="two tokens"):
        Beat().step(0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(SMALL, torch.device("cpu"), tmp_path_factory.mktemp("world"))


def test_the_seams_are_there(world: World) -> None:
    runtime, tokens = Runtime(world), SMALL.tokens[0]
    prompt, pixels = world.prompt(tokens), world.patches(tokens, 1)
    for keep, wanted in ((Keep(0.22), ["vision", "before", "select"]), (Keep(), ["vision"])):
        seen: list[str] = []
        options = {"plan": None} if keep.ratio is None else keep.options()
        with runtime_seams(seen.append) as missing:  # type: ignore[arg-type]
            runtime.model.generate(**prompt.inputs, pixel_values=pixels, max_new_tokens=1, **options)
        # Keys and values may be copied behind the rest of layer K, which is then a part of "after".
        assert seen[:3] == wanted and seen[3:] in ([], ["after", "select"]) and missing == []


def test_a_threshold_that_a_share_passes(world: World) -> None:
    runtime, tokens = Runtime(world), SMALL.tokens[2]
    prompt, pixels = world.prompt(tokens, seed=5), world.patches(tokens, 1, 5)
    keep = Keep(0.22, "threshold", runtime.threshold(prompt, pixels, 0.22))
    assert runtime.serve(prompt, pixels, keep, 1).kept == [int(0.22 * tokens)]


def test_what_a_step_reads_by_hand(world: World) -> None:
    config = world.hf.config.text_config
    kv = (
        2
        * config.num_hidden_layers
        * config.num_key_value_heads
        * config.hidden_size
        // config.num_attention_heads
        * 4
    )
    weights = sum(
        p.numel() for n, p in world.hf.named_parameters() if "visual" not in n and "embed_tokens" not in n
    )
    alone = step_bytes(world, [0.0])
    assert alone == 4 * (weights + config.hidden_size)
    assert step_bytes(world, [100.0, 50.0]) == alone + 150 * kv


def test_pruning_leaves_less_to_compute(world: World) -> None:
    mask = torch.zeros(64, dtype=torch.bool)
    mask[[3, 40]] = True
    plain, pruned = flops(world, 64, None), flops(world, 64, mask)
    assert plain["vision"] == pruned["vision"] and set(pruned) == {"vision", "before", "select", "after"}
    assert sum(pruned.values()) < sum(plain.values())

# SPDX-License-Identifier: Apache-2.0
"""What happens on a GPU, rehearsed without one: the whole run through the interpreter, the bookkeeping, the page."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_build, gpu_check, gpu_facts, gpu_status, gpu_targets, gpu_tests, ops_gpu
from bench.gpu_worker import SHAPES, Job, cases, load_rows
from bench.op_registry import REGISTRY, sizes
from glimpse_kernels import _cuda, dispatch
from tests.kernels.kernel_cases import needs_triton

ROOT = Path(__file__).parents[2]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
REHEARSED = [("rms_norm", "triton", 6), ("swiglu", "triton", 6), ("patchify", "triton", 2)]
"""Two tests in each dtype."""
if _cuda.emulating():
    REHEARSED.append(("patchify", "cuda", 2))
FACTS = {"device": "NVIDIA H200", "date": "2026-11-21", "time": "2026-11-21T10:00:00+00:00"}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "OUT", "PYTEST_XDIST_WORKER")
    } | environment
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500
    )


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    out = tmp_path_factory.mktemp("out")
    return run("bench.gpu_check", "--rehearse", "--seconds", "1400", OUT=str(out)), out


@needs_triton
def test_rehearsal_does_all_steps(rehearsal: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, out = rehearsal
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PROBLEM" not in done.stdout
    report = json.loads(next(out.glob("rehearsal*.json")).read_text())
    assert report["kind"] == "rehearsal" and not report.get("problems")
    assert report["facts"]["torch"] == torch.__version__ and len(report["facts"]["sources"]) == 12
    for op, backend, tests in REHEARSED:
        counts = report["tests"]["ops"][f"{op}, {backend}"]
        assert counts["passed"] == tests and not counts["failed"] + counts["skipped"] + counts["not_run"]
        assert report["tests"]["proofs"][f"{op}, {backend}"] == "proven"
    assert report["ceilings"]["copy_bytes_s"] > 0 and report["ceilings"]["gemm_flop_s"]["bf16"] > 0
    assert report["choices"]["status"] == 0 and any("causal" in line for line in report["choices"]["said"])
    assert len(report["rows"]) == report["planned_rows"] == 8
    for row in report["rows"]:
        assert row["fault"] is None and row["ours_s"] > 0 and row["ours"]["how"] == "host"
    assert [t["met"] for t in report["targets"]] == [None] * len(gpu_targets.TARGETS)


@needs_triton
def test_rehearsal_carries_home_what_it_wrote(
    rehearsal: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    _, out = rehearsal
    files = {file.name for file in out.iterdir()}
    assert {
        "proof.json",
        "gpu-status.md",
        "measured.json",
        "gpu-check.log",
        "pytest-any.log",
    } < files and len(files) <= 8
    proofs = json.loads((out / "proof.json").read_text())
    assert sorted((row["op"], row["backend"], row["tests"]) for row in proofs) == sorted(REHEARSED)
    page = (out / "gpu-status.md").read_text()
    assert all(f"| `{op}` | {backend} | {proofs[0]['date']} |" in page for op, backend, _ in REHEARSED)


@without_gpu
def test_without_a_gpu_one_line_and_status_2() -> None:
    done = run("bench.gpu_check")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "no CUDA device" in done.stderr


def test_an_unknown_op_is_refused() -> None:
    done = run("bench.gpu_check", "--only", "softmax")
    assert done.returncode == 2 and "softmax" in done.stderr


def test_the_page_is_what_the_files_say() -> None:
    proofs = json.loads((ROOT / "glimpse_kernels" / "proof.json").read_text())
    wanted = gpu_status.render(proofs, gpu_facts.results(gpu_status.KIND))
    assert gpu_status.PAGE.read_text() == wanted, "python -m bench.gpu_status writes the page anew"


def row(
    op: str, what: str, shape: str, seconds: float, rate: float = 0.0, **contenders: float
) -> dict[str, Any]:
    named = {name.replace("_", " "): {"s": s} for name, s in contenders.items()}
    return {"op": op, "case": what, "shape": shape, "ours_s": seconds, "rate": rate, "contenders": named}


def test_targets_by_hand() -> None:
    rows = [
        row("attention", gpu_targets.CAUSAL[1024], "7b", 1.0, FA2=1.5, cuDNN=1.0),
        row("attention", gpu_targets.CAUSAL[4096], "7b", 1.0, 430e12, FA2_varlen=1.1, FA2=1.3),
        row("attention", gpu_targets.WINDOWS, "7b", 1.0, loop_of_windows=2.5),
        row("attention", gpu_targets.FULL, "7b", 4.0, FA2=2.0),
        row("received_attention", "vision, full", "7b 64x64", 2.9),
        row("received_attention", "vision, full", "3b", 9.0),
        row("decode_attention", gpu_targets.DECODE, "7b", 1.0, 3.4e12),
        row("select_tokens", gpu_targets.TOGETHER, "7b 64x64", 26e-6),
        row("select_tokens", gpu_targets.SIXTEEN, "1792 px", 9e-6),
        row("compact", gpu_targets.ALL_STAY, "7b 64x64", 1.0, 2e12),
        row("compact", gpu_targets.SMALL, "7b", 11e-6),
        row("compact", gpu_targets.GATHERS, "7b 64x64", 1.0, boolean_gathers=21.0, index_select=2.0),
        row("vip", "1 picture", "7b 64x64", 0.5e-3) | {"fault": "off"},
    ]
    found = {t["name"]: (t["measured"], t["met"]) for t in gpu_targets.check(rows, {"copy_bytes_s": 4e12})}
    names = [t.name for t in gpu_targets.TARGETS]
    none = None, None
    wanted = [
        (1.5, True),
        none,
        (1.1, False),
        none,
        (430, True),
        (2.5, True),
        (1.45, True),
        (85, True),
        (26, False),
        (9, True),
        (50, False),
        (11, False),
        (21, True),
        none,
    ]
    for name, (measured, met) in zip(names, wanted, strict=True):
        assert found[name] == (pytest.approx(measured) if measured else None, met), name


@needs_triton
def test_every_target_names_rows_there_are() -> None:
    """Each row present, with the contenders that the target compares with."""
    load_rows()
    labels = {
        (c.row.op, c.row.what, c.shape_name)
        for c in REGISTRY.cases((), [sizes(*s) for s in SHAPES], [torch.bfloat16], "gpu")
    }
    asked: list[tuple[str, str, str]] = []

    class Spy(dict[tuple[str, str, str], Any]):
        def __missing__(self, key: tuple[str, str, str]) -> Any:
            asked.append(key)
            return {
                "rate": 1.0,
                "ours_s": 1.0,
                "contenders": {name: {"s": 1.0} for name in ("FA2", gpu_targets.LOOP, gpu_targets.BOOLEAN)},
            }

    for target in gpu_targets.TARGETS:
        try:
            target.look(Spy(), {"copy_bytes_s": 1.0})
        except StopIteration:
            pass
    assert len(asked) == len(gpu_targets.TARGETS) and set(asked) <= labels
    assert any(
        op == "received_attention" and "full" in what and shape == gpu_targets.PICTURE
        for op, what, shape in labels
    )


def test_results_feed_the_page(tmp_path: Path) -> None:
    target = {"name": gpu_targets.TARGETS[-1].name, "asked": "", "measured": 0.7, "unit": "ms", "met": False}
    report = {
        "kind": gpu_status.KIND,
        "facts": FACTS,
        "targets": [target],
        "tests": {"proofs": {"vip, triton": "not proven: 2 failed"}},
        "native": {
            "runs": [
                {"how": "plain", "words": "9 passed, 0 failed"},
                {"how": "memcheck", "words": "nothing found"},
            ],
            "why": "no time for racecheck",
        },
    }
    (tmp_path / "nvidia-h200-2026-11-21.json").write_text(json.dumps(report))
    (tmp_path / "cpu.json").write_text("{}")
    proof = {
        "op": "rope",
        "backend": "triton",
        "device": "NVIDIA H200",
        "date": "2026-11-21",
        "commit": "abc",
        "tests": 7,
    }
    text = gpu_status.render([proof], gpu_facts.results(gpu_status.KIND, tmp_path))
    assert "| 0.7 ms | no | NVIDIA H200, `nvidia-h200-2026-11-21.json` |" in text
    assert (
        "| `rope` | triton | 2026-11-21 | NVIDIA H200 | abc | 7 |" in text
        and "| `vip` | triton | never |" in text
    )
    assert "`vip, triton`: not proven: 2 failed" in text
    assert "on NVIDIA H200, 2026-11-21:\n\n- as they are: 9 passed, 0 failed\n" in text
    assert "- under compute-sanitizer memcheck: nothing found\n- no time for racecheck\n" in text


@pytest.mark.parametrize("op", ["rope", "patchify"])
def test_a_gpu_gets_the_extension_first(op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources that do not compile fail the run; a machine without the tools does not; ops without CUDA kernels need neither."""
    done: list[str] = []

    def build(arch: str, deadline: float) -> gpu_build.Build:
        done.append(arch)
        return answer

    monkeypatch.setattr(gpu_build, "here", lambda: "90a")
    monkeypatch.setattr(gpu_build, "build", build)
    monkeypatch.setattr(gpu_build, "build_tests", build)
    where = gpu_check.places(False, None, tmp_path)
    answer = gpu_build.Build(made=True, idle="no CUDA driver")
    assert gpu_check.Check(where, (op,), rehearse=False, seconds=60.0).build() is (op == "rope")
    done.clear()
    for missing in (True, False):
        answer = gpu_build.Build(missing=missing, why="no nvcc")
        check = gpu_check.Check(where, (op,), rehearse=False, seconds=60.0)
        wanted = missing or op == "rope"
        assert check.build() is wanted and check.native() is wanted
        if op == "patchify":
            assert check.report["problems"] == ["build: no nvcc"] and not check.report["build"]["made"]
            assert check.report["native"]["why"] == "not built: no nvcc"
    assert done == ([] if op == "rope" else ["90a"] * 4)


def outcomes(folder: Path, collected: list[tuple[str, str, str]], told: dict[str, str]) -> gpu_tests.Run:
    """collected: (test, op, dtype). told: test → outcome."""
    facts = [{"test": t, "op": op, "backend": "triton", "dtype": d} for t, op, d in collected]
    (folder / "collected.jsonl").write_text("".join(json.dumps(f) + "\n" for f in facts))
    lines = [
        {"test": t, "outcome": o, "when": "call", "seconds": 0.1, "why": "because"} for t, o in told.items()
    ]
    (folder / "outcomes.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"test": "cut sho'
    )
    return gpu_tests.count(folder, [0], 1.0)


ALL = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize(
    ("dtypes", "changed", "why"),
    [
        (ALL, {}, ""),
        (ALL[:2], {}, "not tested in float16"),
        (ALL, {1: "failed"}, "1 failed"),
        (ALL, {1: "skipped"}, "1 skipped"),
        (ALL, {1: ""}, "1 did not run"),
    ],
)
def test_what_proves_an_op(
    tmp_path: Path, dtypes: tuple[str, ...], changed: dict[int, str], why: str
) -> None:
    tests = [(f"tests/kernels/test_rope.py::{d}", "rope", d) for d in dtypes]
    told = {t[0]: changed.get(i, "passed") for i, t in enumerate(tests) if changed.get(i, "passed")}
    found = outcomes(tmp_path, tests, told)
    assert gpu_tests.verdicts(found) == {("rope", "triton"): why}
    assert found.fine is (not why or "not tested" in why or "skipped" in why)


def test_a_failure_ends_an_old_proof_and_other_ops_stay(tmp_path: Path) -> None:
    path = tmp_path / "proof.json"
    old = {"backend": "triton", "device": "NVIDIA A100", "date": "2026-01-01", "commit": "abc", "tests": 7}
    path.write_text(json.dumps([{"op": op, **old} for op in ("compact", "rope", "swiglu")]))
    tests = [(f"{op}-{d}", op, d) for op in ("rope", "swiglu", "rms_norm") for d in ALL]
    told = {t[0]: "passed" for t in tests} | {"rope-float16": "failed"}
    del told["swiglu-float16"]
    said = gpu_tests.prove(outcomes(tmp_path, tests, told), FACTS, "def", path)
    assert said == {
        "rope, triton": "no longer proven: 1 failed",
        "swiglu, triton": "not proven: 1 did not run",
        "rms_norm, triton": "proven",
    }
    rows = {r["op"]: r for r in json.loads(path.read_text())}
    assert set(rows) == {"compact", "swiglu", "rms_norm"}
    assert (rows["swiglu"]["commit"], rows["rms_norm"]["commit"], rows["rms_norm"]["tests"]) == (
        "abc",
        "def",
        3,
    )


def test_a_file_that_does_not_import_proves_nothing(tmp_path: Path) -> None:
    tests = [(f"rope-{d}", "rope", d) for d in ALL] + [(f"swiglu-{d}", "swiglu", d) for d in ALL]
    found = outcomes(tmp_path, tests, {t[0]: "passed" for t in tests})
    found.broken.append("tests/kernels/test_rope_edges.py")
    whys = gpu_tests.verdicts(found)
    assert whys["rope", "triton"] and not whys["swiglu", "triton"] and not found.fine
    found.broken = ["tests/kernels/test_cuda_graphs.py"]  # about all of them
    assert all(gpu_tests.verdicts(found).values())


def test_ops_of_one_folder_are_proven_together(tmp_path: Path) -> None:
    """The tests of `linear` are the tests of `linear_group`, too."""
    tests = [(f"linear-{d}", "linear", d) for d in ALL] + [
        ("group", "linear_group", "float32"),
        ("vip", "vip", "float32"),
    ]
    passed = {t[0]: "passed" for t in tests}
    whys = gpu_tests.verdicts(outcomes(tmp_path, tests, passed))
    names = ("linear", "linear_group", "gated_linear")
    assert [whys[op, "triton"] for op in names] == ["", "", ""]
    assert (
        whys["vip", "triton"] == whys["vip_conditions", "triton"] == "not tested in bfloat16, float16"
        and len(whys) == 5
    )
    whys = gpu_tests.verdicts(outcomes(tmp_path, tests, passed | {"linear-float16": "failed"}))
    assert [whys[op, "triton"] for op in names] == ["1 failed"] * 3
    assert gpu_tests.family(["gated_linear", "rope"]) == ["gated_linear", "rope", "linear", "linear_group"]


def test_failures_of_all_functions_are_told() -> None:
    run = gpu_tests.Run([1], 1.0)
    run.failures = [{"test": f"{name}[{i}]", "why": ""} for name in "ab" for i in range(9)]
    assert [failure["test"] for failure in run.telling()] == ["a[0]", "b[0]", "a[1]", "b[1]", "a[2]", "b[2]"]


LOSES_THE_DEVICE = """
import pytest, torch
pytestmark = pytest.mark.gpu
lost = []

def synchronize():
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, synchronize

def test_before(): pass
def test_fault(): lost.append(1)
def test_behind(): pass
def test_wrong(): assert False, "wrong"
def test_last(): pass
"""


def test_a_lost_device_fails_one_test_and_not_those_behind_it(tmp_path: Path) -> None:
    file = tmp_path / "test_rope.py"
    file.write_text(LOSES_THE_DEVICE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    command = gpu_tests.command(tmp_path, (), 1, rehearse=False)
    command[command.index(gpu_tests.TESTS)] = str(file)
    done = run(*command[2:], "-c", str(tmp_path / "pytest.ini"))
    found = gpu_tests.count(tmp_path, [done.returncode], 1.0)
    tally = found.tallies["rope", "triton"]
    assert (tally.passed, tally.failed, tally.missing) == (3, 2, 0), done.stdout
    failed = {failure["test"].split("::")[1]: failure["why"] for failure in found.failures}
    assert set(failed) == {"test_fault", "test_wrong"} and "wrong" in failed["test_wrong"]
    assert "illegal memory access" in failed["test_fault"] or "crashed" in failed["test_fault"]


WANTS_MEMORY = """
import pytest
from tests.kernels.arena import sparse_tensor
pytestmark = pytest.mark.gpu

def far():
    return [sparse_tensor([2], [2], device="cpu") for _ in range(2)]

def test_plain(): pass
def test_direct(): assert sparse_tensor([2], device="cpu").numel() == 2
def test_by_way_of_another(): assert len(far()) == 2
"""


def test_tests_that_want_the_whole_memory_run_by_themselves(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "test_rope.py").write_text(WANTS_MEMORY)
    for memory, wanted in (("small", ["test_plain"]), ("large", ["test_direct", "test_by_way_of_another"])):
        folder = tmp_path / memory
        folder.mkdir()
        command = gpu_tests.command(folder, (), 0, rehearse=False, memory=memory)
        command[command.index(gpu_tests.TESTS)] = str(tmp_path)
        done = run(*command[2:], "-c", str(tmp_path / "pytest.ini"), "--import-mode=importlib")
        lines = (folder / f"collected-{memory}.jsonl").read_text().splitlines()
        assert [json.loads(line)["test"].split("::")[1] for line in lines] == wanted, done.stdout


WORKER = """
import json, os, sys, time
job, lines = json.loads(sys.argv[1]), open(sys.argv[2], "a")
def tell(x):
    lines.write(json.dumps(x) + "\\n"); lines.flush()
tell({"rows": 4})
for i in range(job["start"], 4):
    tell({"begin": i, "label": f"row {i}"})
    if i == 1:
        print("illegal access", file=sys.stderr); os._exit(9)
    if i == 2:
        time.sleep(60)
    tell({"row": {"op": "x", "case": "y", "shape": "z", "dtype": "bf16", "number": i, "fault": "off"}})
"""


def test_rows_behind_one_that_kills_or_hangs_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)

    def start(job: Job, lines: Path, errors: Path) -> subprocess.Popen[bytes]:
        with errors.open("ab") as sink:
            return subprocess.Popen(
                [sys.executable, str(script), job.text(), str(lines)], stdout=sink, stderr=sink
            )

    monkeypatch.setattr(ops_gpu, "start", start)
    monkeypatch.setattr(ops_gpu, "ROW_SECONDS", 1.5)
    done = ops_gpu.supervise(Job(), tmp_path, ops_gpu.time.monotonic() + 60, lambda text: None)
    assert [row["number"] for row in done.rows] == [0, 1, 2, 3] and done.planned == 4
    assert "status 9" in done.rows[1]["fault"] and "illegal access" in done.rows[1]["fault"]
    assert "no answer" in done.rows[2]["fault"]
    assert ops_gpu.table(done.rows, {}).row_count == 4
    monkeypatch.setattr(ops_gpu, "ROW_SECONDS", 30.0)
    short = ops_gpu.supervise(Job(start=2), tmp_path, ops_gpu.time.monotonic() + 1.5, lambda text: None)
    assert short.notes == ["out of time: 0 of 4 rows"]


def test_a_job_survives_its_trip() -> None:
    job = Job(ops=("rope",), start=7, warm=True, part=1, parts=3)
    assert Job.of(job.text()) == job


@needs_triton
def test_rows_of_the_benchmark() -> None:
    load_rows()
    found = cases(Job())
    assert found[0].row.where == "gpu" and found[0].sizes.model == "7b"
    written = {c.row.op for c in found}
    assert written <= set(dispatch.ops()) and "attention" in written
    assert len({c.label for c in found}) == len(found)


@pytest.mark.parametrize(
    "module",
    [
        "choice_cases", "choices", "cuda_compiled", "gpu_build", "gpu_check", "gpu_facts", "gpu_native", "gpu_pytest",
        "gpu_status", "gpu_tests", "gpu_worker", "occupancy", "ops_gpu", "tune",
    ],
)  # fmt: skip
def test_nothing_imports_what_such_a_machine_may_lack(module: str) -> None:
    tree = ast.parse((ROOT / "bench" / f"{module}.py").read_text())
    names = {n.name for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    there = {"bench", "glimpse_kernels", "torch", "typer", "rich", "pytest"}
    assert {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) <= there


def test_facts_without_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_facts, "run", lambda *command, **options: "")
    monkeypatch.setenv("GLIMPSE_COMMIT", "0123abcd")
    found = gpu_facts.collect()
    assert found["nvidia_smi"] == {} and found["nvcc"] is None and not found.get("problems")
    assert gpu_facts.origin(found) == f"0123abcd, sources {found['sources']}"
    assert gpu_facts.slug("NVIDIA H200 (141 GB)") == "nvidia-h200-141-gb"


@needs_triton
@pytest.mark.parametrize("op", ["rms_norm"])
def test_tuning_rehearsal(tmp_path: Path, op: str) -> None:
    file = tmp_path / "tuned.json"
    done = run("bench.tune", op, "--rehearse", "--output", str(file), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    entries = json.loads(file.read_text())
    assert entries and all(len(e["seconds"]) == 2 and not e["out"] for e in entries)
    for entry in entries:
        assert entry["best"] in done.stdout and entry["in_force"] in entry["seconds"]

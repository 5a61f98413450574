# SPDX-License-Identifier: Apache-2.0
"""Everything a GPU can tell about the kernels, in one run of under nine minutes, with nothing installed or downloaded.
The extension with the CUDA C++ kernels is built first, where nvcc and cmake are there (`bench.gpu_build`).

python3 -m bench.gpu_check                            build, tests, proofs, ceilings, benchmark, report
python3 -m bench.gpu_check --only attention,compact   some ops: for tuning
python3 -m bench.gpu_check --rehearse                 the whole flow on a CPU, interpreted and tiny

Each step has its own process and time limit; what fails is written into the report, and the next step goes on. Exit status:
0 all GPU tests passed, 1 not so, 2 there is no GPU.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer

from bench import choices, gpu_build, gpu_facts, gpu_native, gpu_status, gpu_targets, gpu_tests, ops_gpu
from bench.gpu_facts import GPU_BACKENDS, ROOT, slug
from bench.gpu_worker import SHAPES, Job
from glimpse_kernels import dispatch, measured

SECONDS = 520.0
BUILD_SHARE = 0.25
"""Of the whole, at most, for the extension: on the 16 cores of a GPU machine it takes less than a tenth."""
TESTS_SHARE = 0.58
"""Of the whole, at most; the benchmark gets what is left."""
NATIVE_SHARE = 0.46
"""Until when the C++ unit tests and compute-sanitizer may go on beside them: they must not keep a benchmark waiting."""
TESTS_ALONE = 0.95
"""The same where no benchmark follows."""
CEILING_SECONDS = 45.0
CHOICE_SECONDS = 70.0
CHOICE_SPARE = 20.0
"""For the start of the program that measures choices, and the call that is under way when its time is over."""
WRITING_SECONDS = 8.0
WARMERS = 4
"""Processes that compile the benchmark's kernels into Triton's cache while the tests run."""
REHEARSED = ("swiglu", "rms_norm", "patchify")
REHEARSED_CHOICES = ("patchify", "attention")
T = TypeVar("T")


@dataclass(frozen=True)
class Places:
    """Where things are written. In a rehearsal all are in a folder of their own."""

    proof: Path
    measured: Path
    results: Path
    page: Path
    out: Path | None
    scratch: Path


@dataclass
class Check:
    """One run: its options, its clock, and the report as it grows."""

    places: Places
    ops: tuple[str, ...]
    rehearse: bool
    seconds: float
    alone: bool = False  # the tests, without a benchmark behind them
    report: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    written: list[Path] = field(default_factory=list)

    def at(self, share: float) -> float:
        """The moment when this share of the time is over, for `time.monotonic`."""
        return self.began + share * self.seconds

    def say(self, text: str) -> None:
        line = f"[{time.monotonic() - self.began:5.0f} s] {text}"
        print(line, flush=True)
        with (self.places.scratch / "gpu-check.log").open("a") as log:
            log.write(line + "\n")

    def step(self, name: str, do: Callable[[], T]) -> T | None:
        """Do it; a failure becomes a line of the report."""
        began = time.monotonic()
        try:
            return do()
        except Exception as problem:
            self.note(f"{name}: {type(problem).__name__}: {problem}"[:500])
            return None
        finally:
            self.report.setdefault("took_s", {})[name] = round(time.monotonic() - began, 1)

    def note(self, text: str) -> None:
        self.report.setdefault("problems", []).append(text)
        self.say(f"PROBLEM {text}")

    def facts(self) -> None:
        self.report["facts"] = facts = gpu_facts.collect()
        if self.rehearse:
            facts["device"] = gpu_facts.REHEARSAL
        self.say(
            f"{facts['device']}, torch {facts.get('torch')}, CUDA {facts.get('cuda')}, "
            f"{facts.get('packages')}, {gpu_facts.origin(facts)}"
        )

    def build(self) -> bool:
        """The extension for this GPU and this Python. False if the sources do not compile, or what they compile to does not run; a
        tool that is missing is noted."""
        if self.rehearse or not gpu_build.wanted(self.ops):
            return True
        done = gpu_build.build(gpu_build.here(), self.at(BUILD_SHARE))
        self.report["build"] = done.record()
        self.say(done.line())
        if not done.made or done.idle:
            self.note(f"build: {done.why or done.idle}")
        return done.missing or (done.made and not done.idle)

    def native(self) -> bool:
        """The C++ unit tests on the device, also under compute-sanitizer; beside the Python tests, as nothing is timed then."""
        if self.rehearse or not gpu_build.wanted(self.ops):
            return True
        until = self.at(TESTS_ALONE if self.alone else NATIVE_SHARE)
        done = gpu_native.build_and_check(gpu_build.here(), until, self.say)
        self.report["native"] = done.record()
        if done.why:
            self.say(f"C++ unit tests: {done.why}")
        for one in done.runs:
            if one.fine is False:
                self.note(f"C++ unit tests, {one.how}: {one.words}: {one.said[:300]}")
        return done.fine

    def tests(self) -> gpu_tests.Run:
        folder = self.places.scratch / "tests"
        folder.mkdir()
        until = self.at(TESTS_ALONE if self.alone else TESTS_SHARE)
        began, processes = time.monotonic(), []
        for memory, count in gpu_tests.phases(self.rehearse, self.alone):
            processes.append(gpu_tests.launch(folder, self.ops, count, self.rehearse, memory))
            self.say(f"tests that take {memory} memory: {count} workers")
        golden = None
        if not self.rehearse and not self.ops:
            (folder / "golden").mkdir()
            golden = gpu_tests.launch(
                folder / "golden", (), gpu_tests.GOLDEN_WORKERS, False, tests=gpu_tests.GOLDEN
            )
        if not self.rehearse and not self.alone:
            self.step("warm", self.warm)
        statuses = [gpu_tests.finish(process, until) for process in processes]
        run = gpu_tests.count(folder, statuses, time.monotonic() - began)
        self.report["tests"] = run.record()
        total = {
            kind: sum(getattr(t, kind) for t in run.tallies.values())
            for kind in ("passed", "failed", "skipped", "missing")
        }
        self.say(f"tests: {total}, statuses {run.statuses}, {run.seconds:.0f} s")
        for failure in run.telling()[:30]:
            self.say(f"FAILED {failure['test']}: {(failure['why'].splitlines() or [''])[0][:200]}")
        if golden is not None:
            whole = gpu_tests.count(
                folder / "golden", [gpu_tests.finish(golden, until)], time.monotonic() - began
            )
            self.report["runtime"] = whole.record()
            self.say(f"recorded runs of the whole runtime: {self.report['runtime']['ops']}")
            for failure in whole.telling()[:3]:
                self.say(f"FAILED {failure['test']}: {(failure['why'].splitlines() or [''])[0][:200]}")
        if not run.tallies:
            tails = [log.read_text(errors="replace").splitlines()[-12:] for log in folder.glob("*.log")]
            self.note("no GPU test ran: " + " / ".join(line for tail in tails for line in tail)[-1500:])
        return run

    def warm(self) -> None:
        """Compile what the benchmark will launch, in parallel, while the tests run. No timing is disturbed."""
        folder = self.places.scratch / "warm"
        folder.mkdir()
        jobs = [
            Job(ops=self.ops, shapes=SHAPES[:2], warm=True, part=i, parts=WARMERS) for i in range(WARMERS)
        ]
        names = [folder / f"{i}" for i in range(WARMERS)]
        processes = [
            ops_gpu.start(job, n.with_suffix(".jsonl"), n.with_suffix(".log"))
            for job, n in zip(jobs, names, strict=True)
        ]
        try:
            while any(p.poll() is None for p in processes) and time.monotonic() < self.at(TESTS_SHARE):
                time.sleep(0.5)
        finally:
            for process in processes:
                ops_gpu.stop(process)
        ends = [p.returncode for p in processes]
        self.say(f"benchmark kernels compiled ahead, statuses {ends}")

    def proofs(self, run: gpu_tests.Run) -> None:
        facts = self.report["facts"]
        told = gpu_tests.prove(run, facts, gpu_facts.origin(facts), self.places.proof, self.rehearse)
        self.report["tests"]["proofs"] = told
        self.written.append(self.places.proof)
        for name, what in told.items():
            self.say(f"{name}: {what}")

    def ceilings(self) -> None:
        self.report["ceilings"] = found = ops_gpu.read_ceilings(self.rehearse, CEILING_SECONDS)
        for problem in found.get("problems", []):
            self.note(f"ceilings: {problem}")
        gemm = (found.get("gemm_flop_s") or {}).get("bf16") or 0.0
        self.say(
            f"copy {(found.get('copy_bytes_s') or 0) / 1e12:.2f} TB/s, bf16 product {gemm / 1e12:.0f} TFLOP/s"
        )

    def choices(self) -> None:
        """Which of several proven kernels serves on this GPU: measured by a program of its own."""
        ops = [
            op
            for op in (REHEARSED_CHOICES if self.rehearse else self.ops or choices.names())
            if op in choices.names()
        ]
        if not ops:
            return
        patience = ops_gpu.PATIENCE if self.rehearse else 1.0
        record, seconds = self.places.measured, CHOICE_SECONDS * patience
        command = [
            sys.executable,
            "-m",
            "bench.choices",
            *ops,
            "--seconds",
            f"{seconds:.0f}",
            "--output",
            str(record),
        ]
        done = subprocess.run(
            [*command, *(["--rehearse"] if self.rehearse else [])], cwd=ROOT, env=ops_gpu.environment(self.rehearse),
            capture_output=True, text=True, timeout=seconds + CHOICE_SPARE * patience, check=False,
        )  # fmt: skip
        self.report["choices"] = {"status": done.returncode, "said": done.stdout.splitlines()}
        wrong = [line for line in done.stdout.splitlines() if line.startswith(choices.WRONG)]
        if done.returncode:
            self.note(f"choices: status {done.returncode}: {' / '.join(wrong) or done.stderr[-300:]}")
        self.written.append(record)

    def bench(self) -> None:
        folder = self.places.scratch / "bench"
        folder.mkdir()
        job = Job(ops=self.ops, rehearse=self.rehearse)
        done = ops_gpu.supervise(job, folder, self.began + self.seconds - WRITING_SECONDS, self.say)
        self.report["rows"], self.report["planned_rows"] = done.rows, done.planned
        for note in done.notes:
            if note.startswith(ops_gpu.OUT_OF_TIME):
                self.say(f"benchmark: {note}")
            else:
                self.note(f"benchmark: {note}")

    def targets(self) -> None:
        self.report["targets"] = found = gpu_targets.check(
            self.report.get("rows") or [], self.report.get("ceilings") or {}
        )
        for target in found:
            verdict = {None: "-", True: "ok", False: "MISSED"}[target["met"]]
            self.say(
                f"target {target['name']}: asked {target['asked']}, measured {gpu_targets.figure(target)}: {verdict}"
            )

    def summary(self) -> None:
        """What the reader of the last lines needs."""
        tests = self.report.get("tests") or {}
        for name, what in (tests.get("proofs") or {}).items():
            if what != "proven":
                self.say(f"{name}: {what}")
        for row in self.report.get("rows") or []:
            for fault in ops_gpu.faults(row):
                self.say(
                    f"no figure: {row.get('op')}: {row.get('case') or row.get('label')} ({row.get('shape')}): {fault}"
                )
        for problem in self.report.get("problems") or []:
            self.say(f"problem: {problem[:300]}")
        if tests:
            proven = sum(what == "proven" for what in (tests.get("proofs") or {}).values())
            self.say(f"tests {'all passed' if tests['fine'] else 'NOT all passed'}; proven: {proven} ops")
        if self.report.get("runtime"):
            self.say(f"recorded runs {'all passed' if self.report['runtime']['fine'] else 'NOT all passed'}")

    def write(self, partial: bool) -> None:
        """The report, whatever is in it by now."""
        facts = self.report.get("facts") or {"device": "unknown", "date": "undated"}
        self.report["kind"] = "rehearsal" if self.rehearse else gpu_status.KIND
        self.report["seconds"] = round(time.monotonic() - self.began, 1)
        name = f"{slug(facts['device'])}-{facts['date']}"
        if partial:
            clock = str(facts.get("time", "")).partition("T")[2][:8].replace(":", "")
            name += "-" + "-".join((clock, *self.ops[:3]))
        self.places.results.mkdir(parents=True, exist_ok=True)
        file = self.places.results / f"{name}.json"
        file.write_text(json.dumps(self.report, indent=1) + "\n")
        self.written.append(file)

    def page(self) -> None:
        gpu_status.write(self.places.page, self.places.proof, self.places.results, self.places.measured)
        self.written.append(self.places.page)

    def collect(self) -> None:
        """Everything that was written, into the folder that is carried home."""
        out = self.places.out
        if out is None:
            return
        out.mkdir(parents=True, exist_ok=True)
        logs = [
            self.places.scratch / "gpu-check.log",
            *sorted((self.places.scratch / "tests").rglob("pytest-*.log")),
        ]
        for file in [*dict.fromkeys(self.written), *logs]:
            if file.exists() and file.parent.resolve() != out.resolve():
                shutil.copyfile(file, out / file.name)


def places(rehearse: bool, out: Path | None, scratch: Path) -> Places:
    if not rehearse:
        return Places(
            ROOT / "glimpse_kernels" / "proof.json",
            measured.RECORD,
            gpu_facts.RESULTS,
            gpu_status.PAGE,
            out,
            scratch,
        )
    made = scratch / "repository"
    (made / "docs").mkdir(parents=True)
    return Places(
        made / "proof.json",
        made / "measured.json",
        made / "results",
        made / "docs" / "gpu-status.md",
        out,
        scratch,
    )


def run(check: Check, skip_tests: bool, skip_bench: bool) -> bool:
    """All steps. True if every GPU test passed (or none was asked for)."""
    check.step("facts", check.facts)
    check.report.setdefault("facts", {"device": "unknown", "date": "undated"})
    partial = bool(check.ops) or skip_tests or skip_bench
    check.alone, fine = skip_bench, True
    try:
        fine = bool(check.step("build", check.build))
        if not skip_tests:
            native: list[bool] = []
            beside = threading.Thread(target=lambda: native.append(bool(check.step("native", check.native))))
            beside.start()
            found = check.step("tests", check.tests)
            beside.join()
            whole = check.report.get("runtime", {"fine": True})["fine"]
            fine = fine and all(native) and whole and found is not None and found.fine
            if found is not None:
                check.step("proofs", lambda: check.proofs(found))
        check.step(
            "first report", lambda: check.write(partial)
        )  # in case what follows is cut short from outside
        check.step("collect", check.collect)
        if not skip_bench:
            check.step("ceilings", check.ceilings)
            check.step("choices", check.choices)
            check.step("bench", check.bench)
            check.step("targets", check.targets)
    finally:
        check.step("report", lambda: check.write(partial))
        check.step("page", check.page)
        check.step("summary", check.summary)
        check.say(f"wrote {', '.join(str(p) for p in dict.fromkeys(check.written))}")
        check.step("collect", check.collect)
    return fine


def main(
    only: Annotated[str, typer.Option(help="Ops, with commas between; all if empty.")] = "",
    skip_tests: Annotated[bool, typer.Option(help="No tests, and no proofs.")] = False,
    skip_bench: Annotated[bool, typer.Option(help="No ceilings and no benchmark.")] = False,
    seconds: Annotated[float, typer.Option(help="Time for everything.")] = SECONDS,
    out: Annotated[
        Path | None, typer.Option(help="Also copy what is written to this folder; default: $OUT.")
    ] = None,
    rehearse: Annotated[
        bool, typer.Option(help="On the CPU, interpreted and tiny, into a temporary folder.")
    ] = False,
) -> None:
    """Tests, proofs, ceilings and benchmark on the GPU of this machine."""
    known = list(dict.fromkeys(row.op for row in dispatch.support_table() if row.backend in GPU_BACKENDS))
    ops = tuple(op for op in only.split(",") if op)
    for op in ops:
        if op not in known:
            raise typer.BadParameter(f"expected some of {', '.join(known)}; found {op}", param_hint="--only")
    if not rehearse and not torch.cuda.is_available():
        print(
            "gpu_check: no CUDA device in sight of this Python's torch; --rehearse runs on a CPU",
            file=sys.stderr,
        )
        raise typer.Exit(2)
    out = out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else None)
    with tempfile.TemporaryDirectory(prefix="glimpse-gpu-check-") as folder:
        where = places(rehearse, out, Path(folder))
        check = Check(where, ops or (REHEARSED if rehearse else ()), rehearse, seconds)
        fine = run(check, skip_tests, skip_bench)
    raise typer.Exit(0 if fine else 1)


if __name__ == "__main__":
    typer.run(main)

# SPDX-License-Identifier: Apache-2.0
"""Whole requests on a GPU: this runtime, stock transformers and a transcription of the original, at the shapes of Qwen2.5-VL-7B with
random weights that are made on the device. Nothing is installed or downloaded; under nine minutes.

python3 -m bench.gpu_e2e                 checks, then all rows, the most telling first (make gpu-e2e)
python3 -m bench.gpu_e2e --quick         checks and the rows behind the first targets
python3 -m bench.gpu_e2e --rehearse      the whole flow on a CPU, with the small model of this repository

Run it after `make gpu-check`, which proves kernels and measures which of them is the fastest. Each row is written to the report as
soon as it is there; one that fails leaves its reason. Exit status: 0 all checks passed, 1 not so, 2 there is no GPU.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench import gpu_e2e_report, gpu_facts, gpu_status
from bench.gpu_e2e_worker import LOST, Job
from bench.gpu_facts import ROOT, slug
from bench.ops_gpu import environment, stop

SECONDS = 520.0
START_SECONDS = 120.0
"""For imports, the first kernels, the ceilings."""
PATIENCE = 2.5
"""How many times what a row may take, and `SLACK` seconds, until it counts as hung: kernels compile in the first rows."""
SLACK = 45.0
LONGEST = 130.0
POLL_SECONDS = 0.1
RESTARTS = 6


@dataclass
class Run:
    """One run: the report as it grows, and where it is written."""

    job: Job
    file: Path
    report: dict[str, Any]
    began: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:5.0f} s] {text}", flush=True)

    def note(self, text: str) -> None:
        self.report.setdefault("problems", []).append(text)
        self.say(f"PROBLEM {text}")

    def write(self) -> None:
        self.report["seconds"] = round(time.monotonic() - self.began, 1)
        self.report["targets"] = gpu_e2e_report.check(
            self.report["rows"],
            self.report.get("ceilings") or {},
            self.job.scale.tokens[1],
            self.job.scale.batches[-1],
        )
        self.file.parent.mkdir(parents=True, exist_ok=True)
        half = self.file.with_suffix(".part")
        half.write_text(json.dumps(self.report, indent=1) + "\n")
        half.replace(self.file)

    def take(self, fact: dict[str, Any]) -> None:
        """A line of the worker's."""
        if "rows" in fact:
            self.report |= {"planned": fact["rows"], "backend": fact["backend"], "serving": fact["serving"]}
            if fact["note"] and fact["note"] not in self.report.get("problems", ()):
                self.note(fact["note"])
        elif "ceilings" in fact:
            self.report["ceilings"] = found = fact["ceilings"]
            gemm = (found.get("gemm_flop_s") or {}).get("bf16") or 0.0
            self.say(
                f"copy {(found.get('copy_bytes_s') or 0) / 1e12:.2f} TB/s, bf16 product {gemm / 1e12:.0f} TFLOP/s"
            )
        elif "row" in fact:
            self.report["rows"].append(fact["row"])
            self.say(gpu_e2e_report.line(fact["row"], self.report.get("ceilings") or {}))
        self.write()

    def supervise(self, folder: Path, deadline: float) -> None:
        """The worker, and another one behind a row that ended it, to the end of the rows or of the time (`time.monotonic`)."""
        for attempt in range(RESTARTS):
            lines, errors = folder / f"rows-{attempt}.jsonl", folder / f"worker-{attempt}.log"
            with errors.open("wb") as sink:
                process = subprocess.Popen(
                    [sys.executable, "-m", "bench.gpu_e2e_worker", self.job.text(), str(lines)],
                    cwd=ROOT, env=environment(False) | ({"OMP_NUM_THREADS": "1"} if self.job.rehearse else {}), stdout=sink, stderr=sink,
                )  # fmt: skip
            current, name, why = self._follow(process, lines, deadline)
            stop(process)
            if not why and process.returncode == 0:
                return
            if why == "out of time":
                self.report["out_of_time"] = name
                self.say(f"out of time{': ' + name if name else ''}")
                return
            lost = process.returncode == LOST
            why = why or (
                "the device was lost" if lost else f"the process ended with status {process.returncode}"
            )
            tail = " / ".join(errors.read_text(errors="replace").splitlines()[-4:])[-700:]
            self.note(f"{name or 'start'}: {why}{'; ' + tail if tail and not lost else ''}")
            if name:  # ended in the middle of it
                self.report["rows"].append(self._broken(current, why))
            self.write()
            if current < 0:
                return
            self.job = replace(self.job, start=current + 1)
        self.note(f"given up after {RESTARTS} starts")

    def _follow(self, process: subprocess.Popen[bytes], lines: Path, deadline: float) -> tuple[int, str, str]:
        """(row it was at, its name if it was not done, why it has to be stopped: empty if it ended by itself)."""
        current, name, seen, heard, limit = -1, "", 0, time.monotonic(), START_SECONDS
        while True:
            running = process.poll() is None
            facts = _read(lines)
            for fact in facts[seen:]:
                heard, limit = time.monotonic(), START_SECONDS
                if "begin" in fact:
                    current, name = fact["begin"], fact["name"]
                    limit = max(SLACK, min(LONGEST, PATIENCE * fact["seconds"] + SLACK))
                elif "row" in fact:
                    name = ""
                self.take(fact)
            seen = len(facts)
            if not running:
                return current, name, ""
            if time.monotonic() > deadline:
                return current, name, "out of time"
            if time.monotonic() - heard > limit:
                return current, name, f"no answer in {limit:.0f} s"
            time.sleep(POLL_SECONDS)

    def _broken(self, number: int, why: str) -> dict[str, Any]:
        from bench.gpu_e2e_measure import described
        from bench.gpu_e2e_plan import rows

        return described(rows(self.job.scale, self.job.quick)[number]) | {
            "number": number,
            "fault": why,
            "took_s": None,
        }


def _read(lines: Path) -> list[dict[str, Any]]:
    """Whole lines: the last one of a process that was ended may be cut."""
    text = lines.read_text() if lines.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def checks_passed(report: dict[str, Any]) -> bool:
    checks = [row for row in report["rows"] if row["kind"] == "check"]
    return bool(checks or report.get("only")) and all(gpu_e2e_report.done(row) for row in checks)


def main(
    seconds: Annotated[float, typer.Option(help="Time for everything.")] = SECONDS,
    quick: Annotated[bool, typer.Option(help="The checks and the first rows, fewer repeats.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="The report; default: bench/results/<gpu>-e2e-<date>.json, a copy in $OUT."),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            help='Kernels, as GLIMPSE_BACKEND has them; "auto": the proven ones, all if one is not.'
        ),
    ] = "auto",
    only: Annotated[str, typer.Option(help="Rows whose name contains this: to look again.")] = "",
    rehearse: Annotated[
        bool, typer.Option(help="On the CPU, with the small model, into a temporary folder.")
    ] = False,
) -> None:
    """Whole requests on the GPU of this machine."""
    if not rehearse and not torch.cuda.is_available():
        print(
            "gpu_e2e: no CUDA device in sight of this Python's torch; --rehearse runs on a CPU",
            file=sys.stderr,
        )
        raise typer.Exit(2)
    facts = gpu_facts.collect()
    if rehearse:
        facts["device"] = gpu_facts.REHEARSAL
    with tempfile.TemporaryDirectory(prefix="glimpse-gpu-e2e-") as folder:
        name = f"{slug(facts['device'])}-e2e-{facts['date']}{'-quick' if quick else ''}{f'-{slug(only)}' if only else ''}.json"
        file = output or (Path(folder) if rehearse else gpu_facts.RESULTS) / name
        job = Job(time.time() + seconds - 2.0, quick=quick, rehearse=rehearse, backend=backend, only=only)
        report = {
            "kind": "rehearsal" if rehearse else gpu_e2e_report.KIND,
            "facts": facts,
            "quick": quick,
            "only": only,
            "rows": [],
        }
        run = Run(job, file, report)
        run.say(
            f"{facts['device']}, torch {facts.get('torch')}, {facts.get('packages')}, {gpu_facts.origin(facts)}"
        )
        try:
            run.supervise(Path(folder), run.began + seconds)
        finally:
            run.write()
            _end(run, output is None and not rehearse)
    raise typer.Exit(0 if checks_passed(report) else 1)


def _end(run: Run, own_place: bool) -> None:
    """Targets for the reader of the last lines; the page and what is carried home."""
    for target in run.report["targets"]:
        verdict = {None: "-", True: "ok", False: "MISSED"}[None if run.job.rehearse else target["met"]]
        run.say(
            f"target {target['name']}: asked {target['asked']}, measured {gpu_e2e_report.figure(target)}: {verdict}"
        )
    for problem in run.report.get("problems", ()):
        run.say(f"problem: {problem[:300]}")
    passed = checks_passed(run.report)
    run.say(
        f"checks {'all passed' if passed else 'NOT all passed'}; {len(run.report['rows'])} of {run.report.get('planned')} rows"
    )
    written = [run.file]
    if own_place:
        gpu_status.write()
        written.append(gpu_status.PAGE)
    out = os.environ.get("OUT")
    for file in written if out else []:
        Path(str(out)).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, Path(str(out)) / file.name)
    run.say(f"wrote {', '.join(map(str, written))}")


if __name__ == "__main__":
    typer.run(main)

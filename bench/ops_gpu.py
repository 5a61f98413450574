# SPDX-License-Identifier: Apache-2.0
"""Every GPU kernel, in Triton and in CUDA C++, against plain torch on a GPU, at the sizes of whole models: checked first, then timed.

python -m bench.ops_gpu                                all ops, 7b and 3b, pictures of 32, 64 and 128 tokens a side
python -m bench.ops_gpu attention --shape 7b --side 64
python -m bench.ops_gpu --list

Measured by a process of its own (`bench.gpu_worker`); this one watches it, and goes on behind a row that faults or hangs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench import gpu_ceilings
from bench.gpu_facts import ROOT
from bench.gpu_worker import LOST, SHAPES, Job, cases, load_rows
from bench.op_registry import REGISTRY

ROW_SECONDS = 75.0
"""A row that takes longer hangs: building, compiling, checking and timing one takes a few seconds."""
START_SECONDS = 60.0
PATIENCE = 6.0
"""Times as much in a rehearsal, whose machine may be small and busy."""
POLL_SECONDS = 0.2
STOP_SECONDS = 15.0
OUT_OF_TIME = "out of time"


@dataclass
class Measured:
    """rows: records of `bench.gpu_worker.measure`. planned: how many there were to be. notes: what went wrong around them."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    planned: int = 0
    notes: list[str] = field(default_factory=list)


def environment(rehearse: bool) -> dict[str, str]:
    """For child processes: the interpreter and the emulation exactly in rehearsals, the sources of this checkout."""
    env = dict(os.environ, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", PYTHONUNBUFFERED="1")
    env.pop("TRITON_INTERPRET", None)
    env.pop("GLIMPSE_CUDA_EMULATED", None)
    env.pop("GLIMPSE_BACKEND", None)
    env.pop("PYTEST_XDIST_WORKER", None)  # where a test started this: `bench.gpu_pytest` asks it
    if rehearse:
        env["TRITON_INTERPRET"] = env["GLIMPSE_CUDA_EMULATED"] = "1"
    env["PYTHONPATH"] = os.pathsep.join(p for p in (str(ROOT), env.get("PYTHONPATH", "")) if p)
    return env


def start(job: Job, lines: Path, errors: Path) -> subprocess.Popen[bytes]:
    with errors.open("ab") as sink:
        return subprocess.Popen(
            [sys.executable, "-m", "bench.gpu_worker", job.text(), str(lines)],
            cwd=ROOT, env=environment(job.rehearse), stdout=sink, stderr=sink,
        )  # fmt: skip


def stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        pass  # the driver holds on to it: nothing here can help that, and the report matters more


def supervise(job: Job, folder: Path, deadline: float, say: Callable[[str], None] = print) -> Measured:
    """Run a job to its end or to the deadline (`time.monotonic`), whatever its rows do."""
    done, restarts = Measured(), 0
    while True:
        lines, errors = folder / f"rows-{job.start}.jsonl", folder / f"rows-{job.start}.log"
        process = start(job, lines, errors)
        current, label, seen, heard = -1, "", 0, time.monotonic()
        patience = PATIENCE if job.rehearse else 1.0
        limit, why = START_SECONDS * patience, ""
        while True:
            running = process.poll() is None
            facts = _read(lines)
            for fact in facts[seen:]:
                heard, limit = time.monotonic(), ROW_SECONDS * patience
                if "rows" in fact:
                    done.planned = fact["rows"]
                elif "begin" in fact:
                    current, label = fact["begin"], fact["label"]
                elif "row" in fact:
                    done.rows.append(fact["row"])
                    say(_line(fact["row"]))
                    label = ""
            seen = len(facts)
            if not running:
                break
            if time.monotonic() > deadline:
                why = OUT_OF_TIME
                break
            if time.monotonic() - heard > limit:
                why = f"no answer in {limit:.0f} s"
                break
            time.sleep(POLL_SECONDS)
        stop(process)
        if not why and process.returncode == 0:
            return done
        if why == OUT_OF_TIME:
            done.notes.append(f"{OUT_OF_TIME}: {len(done.rows)} of {done.planned} rows")
            return done
        why = why or f"the process ended with status {process.returncode}"
        if process.returncode == LOST:
            why = "the device was lost to the process; it was started again"
        tail = _tail(errors)
        done.notes.append(f"{label or f'behind row {current}'}: {why}{': ' + tail if tail else ''}")
        say(done.notes[-1])
        if label:  # killed in the middle of a row
            done.rows.append({"label": label, "number": current, "fault": f"{why} {tail}".strip()})
        restarts += 1
        if current < job.start or restarts > 12:
            done.notes.append("gave up")
            return done
        job = replace(job, start=current + 1)


def _read(lines: Path) -> list[dict[str, Any]]:
    """Whole lines only: the last one may still be on its way."""
    if not lines.exists():
        return []
    text = lines.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _tail(errors: Path) -> str:
    kept = [line for line in errors.read_text(errors="replace").splitlines() if line.strip()]
    return kept[-1][:300] if kept else ""


def _line(row: Mapping[str, Any]) -> str:
    name = f"{row.get('op')}: {row.get('case')} ({row.get('shape')}, {row.get('dtype')})"
    if "warm" in row:
        return f"compiled {row['warm']}"
    if row.get("fault"):
        return f"NO FIGURE {row.get('label') or name}: {row['fault']}"
    how = row["ours"]["how"]
    return (
        f"{name}: {each(row)} us ({how}), {row['torch_by']} {1e6 * row['torch_s']:.1f} us, "
        f"x {row['ratio']:.2f}, {row['rate'] / 1e12:.3f} T{row['unit']}/s, eager {1e6 * row['eager_s']:.0f} us"
    )


def each(row: Mapping[str, Any]) -> str:
    """Every backend with its microseconds, the fastest first."""
    found = row.get("backends") or {row.get("backend", "triton"): row["ours"]}
    timed = sorted((f["s"], name) for name, f in found.items() if "s" in f)
    wrong = [f"{name} WRONG" for name, f in found.items() if f.get("fault")]
    return ", ".join([*(f"{name} {micro(s)}" for s, name in timed), *wrong])


def faults(row: Mapping[str, Any]) -> list[str]:
    """What keeps this row, or one of its backends, from having a figure."""
    if row.get("fault"):
        return [str(row["fault"])]
    backends: Mapping[str, Mapping[str, Any]] = row.get("backends") or {}
    return [f"{name}: {found['fault']}" for name, found in backends.items() if found.get("fault")]


def table(rows: Sequence[Mapping[str, Any]], ceilings: Mapping[str, Any]) -> Table:
    """For the terminal."""
    found = Table(title="median times; ratio: the fastest plain torch / ours")
    for name in (
        "op",
        "case",
        "shape",
        "us",
        "by backend",
        "p20-p80",
        "eager us",
        "torch us",
        "by",
        "ratio",
        "rate",
        "of ceiling",
    ):
        found.add_column(
            name,
            no_wrap=True,
            justify="left" if name in ("op", "case", "shape", "by backend", "by") else "right",
        )
    for row in rows:
        found.add_row(*cells(row, ceilings), style="red" if faults(row) else None)
    return found


def cells(row: Mapping[str, Any], ceilings: Mapping[str, Any]) -> list[str]:
    """One line of any table of rows."""
    if row.get("fault"):
        return [
            str(row.get("op", "")),
            str(row.get("case") or row.get("label")),
            str(row.get("shape", "")),
            "none",
            *[""] * 8,
        ]
    most = gpu_ceilings.of(dict(ceilings), row["unit"], row["dtype"])
    unit = "TB/s" if row["unit"] == "byte" else "TFLOP/s"
    ours, several = row["ours"], len(row.get("backends") or ()) > 1
    return [
        row["op"], row["case"], row["shape"],
        micro(row["ours_s"]) + ("" if ours["how"] == "graph" else f" ({ours['how']})"),
        each(row) if several else "", f"{micro(ours['p20'])}-{micro(ours['p80'])}",
        micro(row["eager_s"]), micro(row["torch_s"]), row["torch_by"],
        f"{row['ratio']:.2f}", f"{row['rate'] / 1e12:.3g} {unit}", f"{100 * row['rate'] / most:.0f} %" if most else "",
    ]  # fmt: skip


def micro(seconds: float) -> str:
    value = 1e6 * seconds
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def main(
    ops: Annotated[list[str] | None, typer.Argument(help="Ops to measure; all if none is named.")] = None,
    shape: Annotated[str | None, typer.Option(help="7b or 3b; both if not given.")] = None,
    side: Annotated[int | None, typer.Option(help="Image tokens along an edge: 32, 64 or 128.")] = None,
    seconds: Annotated[float, typer.Option(help="Stop after so long.")] = 400.0,
    output: Annotated[Path | None, typer.Option(help="Write the figures, too: FILE.json.")] = None,
    listing: Annotated[bool, typer.Option("--list", help="Only name the rows there are.")] = False,
    rehearse: Annotated[bool, typer.Option(help="On the CPU, interpreted, tiny: does it run?")] = False,
) -> None:
    """No number is printed for an op whose result is off; the exit status is then 1."""
    load_rows()
    for op in ops or []:
        if op not in REGISTRY.ops():
            raise typer.BadParameter(
                f"expected one of {', '.join(REGISTRY.ops())}; found {op}", param_hint="OP"
            )
    shapes = tuple(s for s in SHAPES if shape in (None, s[0]) and side in (None, s[1]))
    if not shapes:
        raise typer.BadParameter(
            f"expected one of {SHAPES}; found {shape}, {side}", param_hint="--shape, --side"
        )
    job = Job(ops=tuple(ops or ()), shapes=shapes, rehearse=rehearse)
    console = Console() if sys.stdout.isatty() else Console(width=230)
    if listing:
        for case in cases(job):
            console.print(case.label, highlight=False)
        return
    if not rehearse and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device; --rehearse runs on the CPU")
    with tempfile.TemporaryDirectory(prefix="glimpse-") as folder:
        done = supervise(job, Path(folder), time.monotonic() + seconds)
    ceilings = read_ceilings(rehearse)
    console.print(table(done.rows, ceilings))
    for note in done.notes:
        console.print(note, markup=False, highlight=False)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(
            json.dumps({"ceilings": ceilings, "rows": done.rows, "notes": done.notes}, indent=1) + "\n"
        )
    if any(not note.startswith(OUT_OF_TIME) for note in done.notes) or any(faults(row) for row in done.rows):
        raise typer.Exit(1)


def read_ceilings(rehearse: bool, seconds: float = 60.0) -> dict[str, Any]:
    """From a process of its own; empty but for the reason if that fails."""
    command = [sys.executable, "-m", "bench.gpu_ceilings"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds * (PATIENCE if rehearse else 1.0), cwd=ROOT,
            env=environment(rehearse),
        )  # fmt: skip
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as problem:
        return {"problems": [f"{type(problem).__name__}: {problem}"[:300]]}


if __name__ == "__main__":
    typer.run(main)

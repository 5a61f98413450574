# SPDX-License-Identifier: Apache-2.0
"""The kernel tests on a GPU, and which ops they prove."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu_facts import ROOT
from bench.ops_gpu import environment, stop
from glimpse_kernels import dispatch, proof

TESTS = "tests/kernels"
GOLDEN = "tests/runtime/test_golden.py"
"""The whole runtime on the GPU against recorded runs: proves no kernel by itself, but that they fit together."""
TEST_SECONDS = 120
MOST_WORKERS = 10
LARGE_WORKERS = 2
GOLDEN_WORKERS = 2
WHYS, ALIKE = 150, 3  # failures whose words are kept, in all and of one test function


@dataclass
class Tally:
    """Tests of one op with one backend. dtypes: those in which at least one test passed."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    missing: int = 0
    dtypes: set[str] = field(default_factory=set)

    def add(self, other: Tally) -> None:
        self.passed, self.failed = self.passed + other.passed, self.failed + other.failed
        self.skipped, self.missing = self.skipped + other.skipped, self.missing + other.missing
        self.dtypes |= other.dtypes

    def record(self) -> dict[str, Any]:
        counts = {
            "passed": self.passed,
            "failed": self.failed,
            "skipped": self.skipped,
            "not_run": self.missing,
        }
        return counts | {"dtypes": sorted(self.dtypes)}


@dataclass
class Run:
    """One run of the tests. statuses: of pytest, None where it was cut short. broken: files that could not be collected."""

    statuses: list[int | None]
    seconds: float
    tallies: dict[tuple[str, str], Tally] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    skips: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    slowest: list[dict[str, Any]] = field(default_factory=list)

    @property
    def fine(self) -> bool:
        """All of them ran and passed."""
        some = any(t.passed for t in self.tallies.values())
        return some and not self.broken and not any(t.failed or t.missing for t in self.tallies.values())

    def telling(self) -> list[dict[str, str]]:
        """A few failures of each test function, the first of every function before the second of any."""
        seen: Counter[str] = Counter()
        ranks: list[list[dict[str, str]]] = [[] for _ in range(ALIKE)]
        for failure in self.failures:
            function = failure["test"].partition("[")[0]
            if seen[function] < ALIKE:
                ranks[seen[function]].append(failure)
            seen[function] += 1
        return [failure for rank in ranks for failure in rank][:WHYS]

    def record(self) -> dict[str, Any]:
        by_op = {f"{op}, {backend}": t.record() for (op, backend), t in sorted(self.tallies.items())}
        return {
            "statuses": self.statuses, "seconds": round(self.seconds, 1), "fine": self.fine, "ops": by_op,
            "failures": self.telling(), "skips": dict(self.skips), "broken": self.broken, "slowest": self.slowest,
        }  # fmt: skip


def family(ops: Sequence[str]) -> list[str]:
    """These and the other ops of their folders, which are tested with them."""
    folders = {row.folder for row in dispatch.support_table() if row.op in ops}
    more = [row.op for row in dispatch.support_table() if row.folder in folders]
    return list(dict.fromkeys([*ops, *more]))


def command(
    folder: Path, ops: Sequence[str], workers: int, rehearse: bool, memory: str = "any", tests: str = TESTS
) -> list[str]:
    """pytest with the plugin, in parallel where pytest-xdist is there, with a limit a test where pytest-timeout is."""
    files = [tests]
    if rehearse:  # to collect them all would take longer than the rest
        files = [f"{TESTS}/test_{op}.py" for op in ops]
    found = [
        sys.executable, "-m", "pytest", *files, "-p", "bench.gpu_pytest", "--gpu-log", str(folder), "--gpu-ops", ",".join(family(ops)),
        "--gpu-memory", memory, "-q", "--no-header", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--tb=short",
    ]  # fmt: skip
    if rehearse:
        found += ["--gpu-rehearse", "2"]
    if importlib.util.find_spec("xdist") and workers > 0:
        found += ["-n", str(workers), "--dist", "worksteal", "--max-worker-restart", "40"]
    if importlib.util.find_spec("pytest_timeout"):
        found += ["--timeout", str(TEST_SECONDS), "--timeout-method", "thread"]
    return found


def workers(alone: bool = False) -> int:
    """alone: nothing is compiled for a benchmark meanwhile."""
    cores = os.cpu_count() or 2
    return (
        max(1, min(MOST_WORKERS + 3, cores * 13 // 16))
        if alone
        else max(1, min(MOST_WORKERS, cores * 5 // 8))
    )


def phases(rehearse: bool, alone: bool = False) -> list[tuple[str, int]]:
    """Which tests, by the memory they take, and in how many processes; they run side by side. The large ones take up to some
    50 GiB each and are skipped where that is not free."""
    return [("any", 1)] if rehearse else [("small", workers(alone)), ("large", LARGE_WORKERS)]


def launch(
    folder: Path, ops: Sequence[str], count: int, rehearse: bool, memory: str = "any", tests: str = TESTS
) -> subprocess.Popen[bytes]:
    """Start the tests; `finish` waits for them."""
    env = environment(rehearse) | {"OMP_NUM_THREADS": "1"}
    name = "golden" if tests == GOLDEN else memory
    with (folder / f"pytest-{name}.log").open("wb") as log:
        return subprocess.Popen(
            command(folder, ops, count, rehearse, memory, tests), cwd=ROOT, env=env, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip


def finish(process: subprocess.Popen[bytes], deadline: float) -> int | None:
    """Wait until the deadline (`time.monotonic`), then end pytest with its workers. Its status, None if it was ended."""
    try:
        process.wait(max(1.0, deadline - time.monotonic()))
        return process.returncode
    except subprocess.TimeoutExpired:
        try:
            os.killpg(process.pid, 9)  # its own process group: pytest and its workers
        except ProcessLookupError:
            pass
        stop(process)
        return None


def count(folder: Path, statuses: Sequence[int | None], seconds: float) -> Run:
    """From the lines that the plugin wrote."""
    run = Run(list(statuses), seconds)
    collected = {fact["test"]: fact for fact in _read(folder, "collected")}
    outcomes: dict[str, dict[str, Any]] = {}
    for fact in _read(folder, "outcomes"):
        if fact["when"] == "collect":
            run.broken.append(fact["test"])
            run.failures.append({"test": fact["test"], "why": fact["why"]})
            continue
        before = outcomes.get(fact["test"])
        if before is None or before["outcome"] != "failed":  # a failure stays one, whatever teardown says
            outcomes[fact["test"]] = fact
    for test, facts in collected.items():
        tally = run.tallies.setdefault((facts["op"], facts["backend"]), Tally())
        found = outcomes.get(test)
        if found is None:
            tally.missing += 1
        elif found["outcome"] == "passed":
            tally.passed += 1
            if facts["dtype"]:
                tally.dtypes.add(facts["dtype"])
        elif found["outcome"] == "skipped":
            tally.skipped += 1
            run.skips[f"{facts['op']}: {found['why']}"] += 1
        else:
            tally.failed += 1
            run.failures.append({"test": test, "why": found["why"]})
    timed = sorted(outcomes.values(), key=lambda fact: -fact["seconds"])[:8]
    run.slowest = [{"test": fact["test"], "seconds": fact["seconds"]} for fact in timed]
    return run


def together(run: Run) -> dict[tuple[str, str], Tally]:
    """(op, backend) → the tests that prove it: those of all ops of its folder, as tests of one call the others (`linear`'s
    `linear_group` and `gated_linear`, `vip`'s `vip_conditions`)."""
    places = {(row.op, row.backend): (row.folder, row.backend) for row in dispatch.support_table()}
    sums: dict[tuple[str, str], Tally] = {}
    for key, tally in run.tallies.items():
        sums.setdefault(places.get(key, key), Tally()).add(tally)
    found = {key: sums[place] for key, place in places.items() if place in sums}
    return found | {key: sums[key] for key in run.tallies if key not in places}


def verdicts(run: Run, rehearse: bool = False) -> dict[tuple[str, str], str]:
    """(op, backend) → why it is not proven; empty where it is: every test of its folder ran and passed, in every dtype."""
    found, table = {}, dispatch.support_table()
    for key, tally in together(run).items():
        row = next((r for r in table if (r.op, r.backend) == key), None)
        wanted = (
            set()
            if row is None or row.dtypes is None
            else {str(d).removeprefix("torch.") for d in row.dtypes}
        )
        if rehearse:
            wanted.discard("bfloat16")
        why = ""
        if row is None:
            why = "not in the support table"
        elif any(_about(file, row) or not any(_about(file, r) for r in table) for file in run.broken):
            why = "a test file could not be collected"
        elif tally.failed:
            why = f"{tally.failed} failed"
        elif tally.missing:
            why = f"{tally.missing} did not run"
        elif tally.skipped:
            why = f"{tally.skipped} skipped"
        elif not tally.passed:
            why = "no test passed"
        elif wanted - tally.dtypes:
            why = f"not tested in {', '.join(sorted(wanted - tally.dtypes))}"
        found[key] = why
    return found


def _about(file: str, row: dispatch.Support) -> bool:
    stem = Path(file).stem.removeprefix("test_")
    return any(stem == name or stem.startswith(f"{name}_") for name in (row.op, row.folder))


def prove(
    run: Run, facts: Mapping[str, Any], code: str, path: Path, rehearse: bool = False
) -> dict[str, str]:
    """Write the record of proofs anew: ops that passed enter, ops with a failure leave, the others stay as they are.

    Returns "op, backend" → what became of it.
    """
    rows = json.loads(path.read_text()) if path.exists() else []
    proofs = {(row["op"], row["backend"]): proof.Proof(**row) for row in rows}
    told, tallies = {}, together(run)
    for key, why in verdicts(run, rehearse).items():
        name = ", ".join(key)
        if not why:
            proofs[key] = proof.Proof(*key, facts["device"], facts["date"], code, tallies[key].passed)
            told[name] = "proven"
        elif tallies[key].failed and key in proofs:
            del proofs[key]
            told[name] = f"no longer proven: {why}"
        else:
            told[name] = f"not proven: {why}"
    proof.write(proofs, path)
    return told


def _read(folder: Path, name: str) -> list[dict[str, Any]]:
    """Whole lines of all runs: the last one of a run that was ended may be cut."""
    texts = [file.read_text() for file in sorted(folder.glob(f"{name}*.jsonl"))]
    return [json.loads(line) for text in texts for line in text[: text.rfind("\n") + 1].splitlines()]

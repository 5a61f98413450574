# SPDX-License-Identifier: Apache-2.0
"""The C++ unit tests of the CUDA kernels on a GPU: as they are, then under NVIDIA's compute-sanitizer.

python3 -m bench.gpu_native

memcheck finds accesses outside of allocations and misaligned ones, racecheck unordered accesses to shared memory, synccheck barriers
that not all threads reach. (Memory that nothing wrote shows without a tool: the tests fill it with NaN.) A tool that does not work on a
machine is noted and counts neither way.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench import gpu_build
from bench.cuda_compiled import find_tool
from bench.gpu_facts import ROOT

SANITIZER = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck", "synccheck")
PLAIN = "plain"
PLAIN_SECONDS = 60.0
TOOL_SECONDS = 90.0
FOUND = 86
"""Exit status that the sanitizer is told to end with if it found something."""
REFUSED = r"Device not supported|not supported on this|Internal Sanitizer Error|No attachable process|Failed to initialize"


@dataclass
class Checked:
    """One run of the tests. fine: None where the tool does not work or there was no time."""

    how: str
    fine: bool | None
    words: str
    seconds: float = 0.0
    said: str = ""


@dataclass
class Native:
    """All runs. why: the reason why there are none, or no more. broken: the tests do not compile."""

    runs: list[Checked] = field(default_factory=list)
    why: str = ""
    broken: bool = False

    @property
    def fine(self) -> bool:
        return not self.broken and not any(run.fine is False for run in self.runs)

    def record(self) -> dict[str, Any]:
        return {"fine": self.fine, "why": self.why, "runs": [asdict(run) for run in self.runs]}


def run(command: Sequence[str], seconds: float) -> tuple[int | None, str, float]:
    """Status (None: out of time), all it said, and how long it took."""
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=max(1.0, seconds))
        return process.returncode, said, time.monotonic() - began
    except subprocess.TimeoutExpired:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        said, _ = process.communicate()
        return None, said, time.monotonic() - began


def plain(program: Path, seconds: float) -> Checked:
    status, said, took = run([str(program)], seconds)
    last = (said.strip().splitlines() or [""])[-1]
    counts = last if re.fullmatch(r"\d+ passed, \d+ failed", last) else f"status {status}"
    words = "out of time" if status is None else counts
    return Checked(PLAIN, None if status is None else status == 0, words, round(took, 1), said[-1500:])


def judge(status: int | None, said: str) -> tuple[bool | None, str]:
    """What a run under a tool says. The tests themselves passed without it."""
    if status is None:
        return None, "out of time"
    refused = re.search(REFUSED, said)
    if refused:
        return None, f"does not work here: {refused[0]}"
    counts = re.findall(r"(?:ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards?)", said)
    if not counts:
        last = next((line for line in reversed(said.splitlines()) if line.strip("= \t")), "no words")
        return None, f"does not work here: status {status}: {last.strip('= ')[:200]}"
    number = max(int(n) for pair in counts for n in pair if n)
    if number:
        return False, f"{number} found"
    return (True, "nothing found") if status == 0 else (False, f"nothing found, but status {status}")


def under(tool: str, sanitizer: Path, program: Path, seconds: float) -> Checked:
    command = [
        str(sanitizer), "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20", str(program),
    ]  # fmt: skip
    status, said, took = run(command, seconds)
    fine, words = judge(status, said)
    first = said.find("=========", said.find("=========") + 9) if fine is False else 0
    kept = said[max(0, first) :][:2500] if fine is False else said[-600:]
    return Checked(tool, fine, words, round(took, 1), kept)


def check(
    program: Path, deadline: float, tell: Callable[[str], None] = print, tools: Sequence[str] = TOOLS
) -> Native:
    """Run what can be run until the deadline (`time.monotonic`)."""
    result = Native()

    def left(most: float) -> float:
        return min(most, deadline - time.monotonic())

    def add(done: Checked) -> None:
        result.runs.append(done)
        tell(f"C++ unit tests, {done.how}: {done.words} ({done.seconds:.0f} s)")

    add(plain(program, left(PLAIN_SECONDS)))
    if not result.runs[0].fine:
        return result
    sanitizer = find_tool(SANITIZER)
    if sanitizer is None:
        result.why = f"no {SANITIZER} on this machine"
        return result
    for tool in tools:
        if left(TOOL_SECONDS) < 3.0:
            result.why = f"no time for {tool}"
            break
        add(under(tool, sanitizer, program, left(TOOL_SECONDS)))
    return result


def build_and_check(
    arch: str, deadline: float, tell: Callable[[str], None] = print, tools: Sequence[str] = TOOLS
) -> Native:
    """The same for the tests that lie in csrc, built for this architecture."""
    made = gpu_build.build_tests(arch, deadline)
    if not made.made:
        return Native(why=f"not built: {made.why}", broken=not made.missing)
    return check(Path(made.file), deadline, tell, tools)


def main(
    program: Annotated[Path | None, typer.Argument(help="Built already; the tests in csrc if not given.", exists=True)] = None,
    tool: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(TOOLS)}; all if not given.")] = None,
    seconds: Annotated[float, typer.Option(help="Time for everything.")] = 400.0,
) -> None:  # fmt: skip
    """Exit status 1 if a test failed or a tool found something."""
    for name in tool or ():
        if name not in TOOLS:
            raise typer.BadParameter(
                f"expected some of {', '.join(TOOLS)}; found {name}", param_hint="--tool"
            )
    deadline, tools = time.monotonic() + seconds, tool or TOOLS
    if program is None and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device in sight of this Python's torch")
    done = (
        check(program, deadline, tools=tools)
        if program
        else build_and_check(gpu_build.here(), deadline, tools=tools)
    )
    for one in done.runs:
        if one.fine is False:
            print(one.said)
    if done.why:
        print(done.why)
    raise typer.Exit(0 if done.fine and done.runs else 1)


if __name__ == "__main__":
    typer.run(main)

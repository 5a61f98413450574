# SPDX-License-Identifier: Apache-2.0
"""One comparison from start to end."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from glimpse_lab.compare import contenders as who
from glimpse_lab.compare.answers import Answers
from glimpse_lab.compare.asked import pictures as pictures_of
from glimpse_lab.compare.memory import Memory
from glimpse_lab.compare.page import BEGIN, END, generated, part_of, write_into
from glimpse_lab.compare.plot import check_matplotlib, draw
from glimpse_lab.compare.store import Store
from glimpse_lab.compare.summary import summarise
from glimpse_lab.compare.timing import Times
from glimpse_lab.world import SIZES
from glimpse_runtime import GlimpseModel
from glimpse_runtime import cli_console as console
from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.processor import Processor
from glimpse_runtime.threads import usable_cpus

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
TIMED = ((448, 448), (896, 896))
"""Pictures on which time and, the last of them, memory are measured. Smaller ones would show what calls cost, not what tokens do."""


@dataclass(frozen=True)
class Wanted:
    """What a comparison is of."""

    plans: list[str]
    budgets: list[float]
    pictures: int
    sizes: tuple[tuple[int, int], ...]
    rounds: int
    base: Path
    glimpse: Path
    threads: int
    dtype: str
    seed: int
    timed: tuple[tuple[int, int], ...] = TIMED

    @classmethod
    def parse(
        cls,
        *,
        plans: str,
        budgets: str,
        sizes: str,
        base: Path | None,
        glimpse: Path | None,
        threads: int | None,
        dtype: str,
        timed: tuple[tuple[int, int], ...] = TIMED,
        **numbers: int,
    ) -> Wanted:
        """From what the command line says.

        Raises:
            GlimpseError: a value that cannot be used.
        """
        if dtype not in ("float32", "bfloat16"):
            raise GlimpseError(f"--dtype: expected float32 or bfloat16, found {dtype!r}")
        if (base is None) != (glimpse is None):
            raise GlimpseError("--base, --glimpse: expected both or none, they belong together; found one")
        if base is None and not TINY.is_dir():
            raise GlimpseError(f"--base: expected a model, there is none in {TINY}; found none")
        return cls(
            plans=who.known() if plans == "all" else _several("--plans", plans),
            budgets=sorted({_budget(said) for said in _several("--budgets", budgets)}),
            sizes=SIZES if sizes == "all" else tuple(_size(said) for said in _several("--sizes", sizes)),
            base=TINY / "base" if base is None else base,
            glimpse=TINY / "glimpse" if glimpse is None else glimpse,
            threads=usable_cpus() if threads is None else threads,
            dtype=dtype,
            timed=timed,
            **numbers,
        )

    @property
    def command(self) -> str:
        """What gives the same numbers again."""
        said = ["glimpse", "compare", "--pictures", str(self.pictures), "--rounds", str(self.rounds)]
        if self.plans != who.known():
            said += ["--plans", ",".join(self.plans)]
        said += ["--budgets", ",".join(f"{100 * b:g}" for b in self.budgets)]
        if self.sizes != SIZES:
            said += ["--sizes", ",".join(f"{h}x{w}" for h, w in self.sizes)]
        said += ["--dtype", self.dtype, *(["--seed", str(self.seed)] if self.seed else [])]
        if self.base != TINY / "base":
            said += ["--base", str(self.base), "--glimpse", str(self.glimpse)]
        return shlex.join(said)

    @property
    def settings(self) -> dict[str, Any]:
        """What every record depends on."""
        return {"base": str(self.base), "glimpse": str(self.glimpse), "dtype": self.dtype, "seed": self.seed}

    @property
    def told(self) -> dict[str, Any]:
        """What the page tells about the run."""
        return {
            "command": self.command,
            "sizes": [f"{h}x{w}" for h, w in self.sizes],
            "dtype": self.dtype,
            "rounds": self.rounds,
            "torch": str(torch.__version__),
            "cpu": torch.backends.cpu.get_cpu_capability(),
        }


def _several(option: str, text: str) -> list[str]:
    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise GlimpseError(f"{option}: expected some, with commas between them; found {text!r}")
    return found


def _budget(text: str) -> float:
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not 0.0 < share <= 1.0:
        raise GlimpseError(f"--budgets: expected percent, above 0 and up to 100; found {text!r}")
    return round(share, 9)


def _size(text: str) -> tuple[int, int]:
    known = {f"{height}x{width}": (height, width) for height, width in SIZES}
    if text not in known:
        raise GlimpseError(f"--sizes: expected some of {', '.join(known)}; found {text!r}")
    return known[text]


def load(modules: list[str]) -> None:
    """Import what registers plans.

    Raises:
        GlimpseError: a module cannot be imported.
    """
    for name in modules:
        try:
            import_module(name)
        except Exception as error:  # whatever somebody's module does on its import
            raise GlimpseError(
                f"--import: expected a module that can be imported, found {name!r}: {type(error).__name__}: {error}"
            ) from error


def run(wanted: Wanted, *, output: Path, markdown: Path | None, resume: bool) -> dict[str, Any]:
    """Compare, and write the summary, the page and the plots.

    Args:
        output: folder; `records.jsonl` in it is what a resumed run goes on with.
        markdown: page with markers, which gets the tables too.

    Raises:
        GlimpseError: something that was asked for cannot be had; nothing was run then.
    """
    check_matplotlib()
    if markdown is not None:
        write_into(
            markdown, _between(markdown)
        )  # a page that cannot be written is better known before than after
    model = GlimpseModel.from_pretrained(
        wanted.base, glimpse=wanted.glimpse, dtype=getattr(torch, wanted.dtype)
    )
    processor = Processor.from_pretrained(wanted.base)
    layers = model.base.decoder.config.num_layers
    assert model.plan is not None
    taking_part, missing = who.contenders(wanted.plans, wanted.budgets, model.plan, layers)
    store = Store(output / "records.jsonl", wanted.settings, resume=resume)
    asked = list(pictures_of(wanted.sizes, wanted.pictures, wanted.seed))
    answers = Answers(store, asked, taking_part)
    timed = [Times(store, size, taking_part, wanted.rounds) for size in wanted.timed if wanted.rounds]
    memory = Memory(store, wanted.timed[-1], taking_part)
    _work(model, processor, wanted, answers, memory, timed)
    rounds = {f"{h}x{w}": times.records() for (h, w), times in zip(wanted.timed, timed, strict=False)}
    numbers = {(picture.size, picture.number) for picture in asked}
    summary = summarise(store, taking_part, missing, numbers, rounds, wanted.told)
    write(summary, output / "compare.json", output / "compare.md", output)
    if markdown is not None:
        publish(summary, markdown)
    console.out().print(generated(summary, "methods.svg"), markup=False)
    return summary


def _work(
    model: Any, processor: Any, wanted: Wanted, answers: Answers, memory: Memory, timed: list[Times]
) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console.err()) as progress:
        jobs: list[tuple[str, int, Any]] = [
            (
                "answers",
                sum(len(own) for _, own in answers.left()),
                lambda step: answers.run(model, processor, wanted.threads, step),
            ),
            ("memory", len(memory.left()), lambda step: memory.run(model, processor, step)),
        ]
        for times, (height, width) in zip(timed, wanted.timed, strict=False):
            jobs.append(
                (
                    f"time, {height}x{width}",
                    times.left(),
                    lambda step, times=times: times.run(model, processor, step),
                )
            )
        for name, total, job in jobs:
            task = progress.add_task(name, total=total)
            job(lambda task=task: progress.advance(task))


def _between(page: Path) -> str:
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    return part_of(text) if BEGIN in text and END in text else ""


def write(summary: dict[str, Any], numbers: Path, page: Path | None, images: Path) -> None:
    """The summary as JSON, a page of its own, and the plots."""
    numbers.parent.mkdir(parents=True, exist_ok=True)
    numbers.write_text(_as_lines(summary), encoding="utf-8")
    if page is not None:
        page.write_text(generated(summary, "methods.svg") + "\n", encoding="utf-8")
    draw(summary, images / "methods.svg", images / "methods.png")


def _as_lines(summary: dict[str, Any]) -> str:
    """JSON with a line a point, so that a change of one is a change of its line."""
    parts = []
    for name, value in summary.items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(json.dumps(one) for one in value) + "\n]"
        parts.append(f"{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def publish(summary: dict[str, Any], page: Path) -> None:
    """The tables into a page, the numbers beside it, the plots into `images/` beside it."""
    write(summary, page.with_suffix(".json"), None, page.parent / "images")
    write_into(page, generated(summary))

# SPDX-License-Identifier: Apache-2.0
"""``make demo``: questions about the sample pictures, answered with and without pruning.

    python -m glimpse_lab.demo [--out FOLDER]

For each sample it prints the question, both answers, the visual tokens kept and the time to the first token of both,
and writes the picture with its kept tokens lit.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.markup import escape

from glimpse_runtime.ask import Answer, Asker, shipped_model
from glimpse_runtime.cli_console import milliseconds, share
from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.images import to_rgb
from glimpse_runtime.overlay import overlay, side_by_side


@dataclass(frozen=True)
class Sample:
    """A picture, a question, and the answer that is right (None where nobody wrote it down)."""

    picture: Path
    question: str
    answer: str | None


def read_samples(folder: Path) -> list[Sample]:
    """The samples of a pictures folder, from its ``questions.json``: ``[{"picture", "question", "answer"}, ...]``.

    Raises:
        GlimpseError: the list is missing or malformed.
    """
    path = folder / "questions.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        samples = [
            Sample(folder / entry["picture"], str(entry["question"]), entry.get("answer"))
            for entry in entries
        ]
    except FileNotFoundError:
        raise GlimpseError(f"samples: expected {str(path)!r}, found no such file") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GlimpseError(f"samples: {str(path)!r} does not hold a list of samples ({error!r})") from None
    if not samples:
        raise GlimpseError(f"samples: {str(path)!r} is empty")
    return samples


def answer_both(asker: Asker, sample: Sample, repeats: int = 3) -> tuple[Answer, Answer]:
    """The unpruned and the pruned answer.

    The times to the first token are medians over `repeats` calls in turn, after one that warms up memory and threads:
    one call of a model this small says more about the machine's other work than about the model.
    """
    inputs = asker.inputs([sample.picture], sample.question)
    first: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(1 + repeats):
        for pruned, seconds in first.items():
            seconds.append(asker.ask(inputs, pruned=pruned, max_new_tokens=1).seconds["ttft"])
    answers = []
    for pruned, seconds in first.items():
        answer = asker.ask(inputs, pruned=pruned)
        answer.seconds["ttft"] = median(seconds[1:])
        answers.append(answer)
    return answers[0], answers[1]


def _verdict(answer: Answer, right: str | None) -> str:
    if right is None:
        return ""
    return " [green]right[/green]" if answer.text == right else f" [red]wrong, expected {escape(right)}[/red]"


def _report(console: Console, sample: Sample, plain: Answer, pruned: Answer, written: Path) -> None:
    console.print(f"[bold]{escape(sample.picture.name)}[/bold]  {escape(sample.question)}")
    for name, answer in (("unpruned", plain), ("pruned", pruned)):
        first = milliseconds(answer.seconds.get("ttft"))
        console.print(
            f"  {name:<14}{escape(answer.text)}{_verdict(answer, sample.answer)}  (first token: {first})"
        )
    console.print(f"  {'tokens kept':<14}{share(pruned.kept, pruned.total)}")
    console.print(f"  {'picture':<14}{escape(str(written))}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; returns an exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="where the lit pictures go")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or auto")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    console = Console(highlight=False, soft_wrap=True)
    try:
        base, modules = shipped_model()
        samples = read_samples(base.parent / "pictures")
        with console.status("loading models/tiny"):
            asker = Asker.load(base, modules, dtype=options.dtype)
        options.out.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        plains, pruneds = [], []
        for number, sample in enumerate(samples, 1):
            plain, pruned = answer_both(asker, sample)
            lit = overlay(sample.picture, pruned.pruning[0].keep)
            original = to_rgb(sample.picture).resize(lit.size, 0)
            written = options.out / f"{number:02d}-{sample.picture.stem}.png"
            side_by_side(original, lit).save(written)
            _report(console, sample, plain, pruned, written)
            plains.append(plain)
            pruneds.append(pruned)
    except (GlimpseError, OSError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2
    _summary(console, samples, plains, pruneds, time.perf_counter() - began)
    return 0


def _summary(
    console: Console, samples: list[Sample], plains: list[Answer], pruneds: list[Answer], seconds: float
) -> None:
    def right(answers: list[Answer]) -> int:
        return sum(answer.text == sample.answer for sample, answer in zip(samples, answers, strict=True))

    def first(answers: list[Answer]) -> float:
        return sum(answer.seconds.get("ttft", 0.0) for answer in answers) / len(answers)

    kept, total = sum(answer.kept for answer in pruneds), sum(answer.total for answer in pruneds)
    console.print(
        f"{len(samples)} questions in {seconds:.1f} s: right {right(plains)} unpruned, {right(pruneds)} pruned; "
        f"visual tokens kept {share(kept, total)}; mean time to first token "
        f"{milliseconds(first(plains))} unpruned, {milliseconds(first(pruneds))} pruned"
    )


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""The demo's sample pictures: held-out scenes with a question each, ``python -m glimpse_lab.samples``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from glimpse_lab.export import replace_folder
from glimpse_lab.world import HELD_OUT_SEED, ask, make_scene, render

SAMPLE_SEED = HELD_OUT_SEED + 2_000_000_000
SAMPLES = (
    (280, 280, "number"),
    (336, 224, "word"),
    (392, 392, "things"),
    (448, 448, "number"),
    (224, 448, "colours"),
    (336, 336, "biggest"),
)
"""Height, width and question type of each sample."""


def write_samples(folder: Path) -> list[dict[str, str]]:
    """Draws the samples and writes ``questions.json``. For each type the first seed whose scene has such a question, and at
    least five things to look at, is taken; no model has a say in the choice."""
    entries: list[dict[str, str]] = []

    def write(part: Path) -> None:
        for i, (height, width, task) in enumerate(SAMPLES):
            for seed in range(SAMPLE_SEED + 1000 * i, SAMPLE_SEED + 1000 * (i + 1)):
                scene = make_scene(seed, height, width)
                found = [q for q in ask(scene) if q.task == task]
                if found and len(scene.things) + len(scene.plates) >= 5:
                    break
            name = f"{i + 1}_{task}_{width}x{height}.png"
            render(scene).save(part / name, optimize=True)
            entries.append({"picture": name, "question": found[0].question, "answer": found[0].answer})
        (part / "questions.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")

    replace_folder(folder, write)
    return entries


def main(to: Annotated[Path, typer.Option(help="Folder to write.")] = Path("models/tiny/pictures")) -> None:
    """Write the sample pictures and their questions."""
    for entry in write_samples(to):
        typer.echo(f"{entry['picture']}: {entry['question']} {entry['answer']}")


if __name__ == "__main__":
    typer.run(main)

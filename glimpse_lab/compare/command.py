# SPDX-License-Identifier: Apache-2.0
"""``glimpse compare``: its options, and the order in which a comparison is made. Imports nothing heavy: ``glimpse --help`` reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import typer

EXAMPLES = """
[bold]Examples[/bold]

glimpse compare --quick --output runs/compare

glimpse compare --plans fastv,divprune,divprune+glimpse --budgets 11,33 --pictures 2 --output runs/compare

glimpse compare --pictures 4 --output runs/compare --resume --markdown docs/methods.md
"""

BUDGETS = "5,11,22,33,50"


def compare(
    plans: str = typer.Option(
        "all",
        metavar="A,B,...",
        help="Registered plans, also as NAME:option=value; NAME+glimpse for one behind the other; random.",
    ),
    budgets: Optional[str] = typer.Option(  # noqa: UP045
        None,
        metavar="P,Q,...",
        help=f"Percent of the visual tokens that stay in the cache (default: {BUDGETS}).",
    ),
    pictures: Optional[int] = typer.Option(  # noqa: UP045
        None, min=1, help="Pictures of each size, with all their questions (default: 4)."
    ),
    sizes: str = typer.Option(
        "all", metavar="HxW,...", help="Sizes of the pictures, height x width in pixels."
    ),
    base: Optional[Path] = typer.Option(None, help="Base model (default: models/tiny of the repository)."),  # noqa: UP045
    glimpse: Optional[Path] = typer.Option(None, help="Its GlimpsePrune modules."),  # noqa: UP045
    threads: Optional[int] = typer.Option(  # noqa: UP045
        None, min=1, help="For the answers; times are taken with one (default: all cores)."
    ),
    dtype: str = typer.Option("float32", help="float32 or bfloat16."),
    rounds: Optional[int] = typer.Option(  # noqa: UP045
        None, min=0, help="In which all take turns to be timed (default: 5; 0: no times)."
    ),
    output: Path = typer.Option(
        Path("runs/compare"), metavar="DIR", help="For records, summary, page and plots."
    ),
    seed: int = typer.Option(0, min=0, help="Other held-out pictures."),
    markdown: Optional[Path] = typer.Option(  # noqa: UP045
        None,
        metavar="PAGE",
        help="Also write tables into this page, numbers beside it, plots into images/ beside it.",
    ),
    modules: Optional[list[str]] = typer.Option(  # noqa: UP045
        None, "--import", metavar="MODULE", help="Import this first: it registers plans. Repeat for several."
    ),
    resume: bool = typer.Option(False, "--resume", help="Go on with a run that was stopped."),
    quick: bool = typer.Option(
        False,
        "--quick",
        help="A first look: one picture of two sizes, two budgets, one round on a small one.",
    ),
) -> None:
    """Compare pruning methods on the small model's drawn world, at the same budgets.

    Right answers and agreement with the unpruned model against kept tokens, time to the first token and memory.

    A budget is the share of the visual tokens' keys and values in the cache, mean over the decoder's layers.
    """
    from glimpse_lab.compare.run import TIMED, Wanted, load, run

    load(modules or [])
    run(
        Wanted.parse(
            plans=plans,
            budgets=budgets or ("11,33" if quick else BUDGETS),
            pictures=pictures or (1 if quick else 4),
            sizes="224x224,336x336" if quick and sizes == "all" else sizes,
            rounds=(1 if quick else 5) if rounds is None else rounds,
            base=base,
            glimpse=glimpse,
            threads=threads,
            dtype=dtype,
            seed=seed,
            timed=TIMED[:1] if quick else TIMED,
        ),
        output=output,
        markdown=markdown,
        resume=resume,
    )

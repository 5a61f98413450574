# SPDX-License-Identifier: Apache-2.0
"""``glimpse parity``: recorded runs of the original against this runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Optional

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from glimpse_runtime import cli_console as console

EXAMPLES = """
[bold]Examples[/bold]

glimpse parity tests/golden/glimpse

glimpse parity tests/golden/glimpse --case v1_square --case plain/two_images
"""

_COLUMNS = ("glimpse", "vip", "kv", "logits", "steps")


def parity(
    folder: Path = typer.Argument(..., metavar="DIR", help="Golden folder with a manifest.json."),
    case: Optional[list[str]] = typer.Option(None, "--case", help="Only this case; repeat for several."),  # noqa: UP045
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object instead of a table."),
) -> None:
    """Replay recorded runs and show how far each quantity is off.

    Columns are largest absolute errors: logits of the glimpse token, scores of the predictor, pruned keys and values,
    logits after the prompt, logits of 16 decoding steps. Exits with 1 when something is off.
    """
    from glimpse_runtime.parity import case_names, load_manifest, run_case

    names = case or case_names(load_manifest(folder))
    results = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console.err(), transient=True, disable=as_json) as progress:
        task = progress.add_task("replaying", total=len(names))
        for name in names:
            progress.update(task, description=name)
            results.append(run_case(folder, name))
            progress.advance(task)
    failed = [result for result in results if not result.ok]
    if as_json:
        data = [
            {
                "case": r.name,
                "dtype": r.dtype,
                "ok": r.ok,
                "errors": r.errors,
                "limits": r.limits,
                "equal": r.equal,
                "kept": r.kept,
                "total": r.total,
            }
            for r in results
        ]
        print(json.dumps({"ok": not failed, "cases": data}))
    else:
        table = Table(box=None, padding=(0, 1, 0, 0))
        for title in ("case", "kept", "mask", *_COLUMNS, "greedy", ""):
            table.add_column(title, no_wrap=True)
        for r in results:
            mask = (
                "-"
                if "mask" not in r.errors
                else "="
                if not r.errors["mask"]
                else f"{r.errors['mask']:.0f} off"
            )
            errors = [f"{r.errors[name]:.0e}" if name in r.errors else "-" for name in _COLUMNS]
            greedy = "-" if "greedy" not in r.equal else "=" if r.equal["greedy"] else "differ"
            verdict = "[green]ok[/green]" if r.ok else "[red]off[/red]"
            kept = f"{r.kept}/{r.total}" if r.total else "-"
            table.add_row(r.name, kept, mask, *errors, greedy, verdict)
        console.out().print(table)
        for r in failed:
            console.err().print(f"{r.name}: {'; '.join(r.failures)}", style="red", markup=False)
        console.out().print(f"{len(results) - len(failed)} of {len(results)} cases agree with the recording")
    if failed:
        raise typer.Exit(console.MISMATCH)

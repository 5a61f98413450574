# SPDX-License-Identifier: Apache-2.0
"""Command line of the training: ``python -m glimpse_lab.train base|modules|all``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

app = typer.Typer(no_args_is_help=True, add_completion=False)

Folder = Annotated[
    Path, typer.Option(help="Where checkpoints and logs go; an existing run there is resumed.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto (cuda if there is one).")]
Compile = Annotated[
    bool, typer.Option("--compile/--no-compile", help="Compile the layer functions (needs a C++ compiler).")
]


def _device(name: str) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


@app.callback()
def main() -> None:
    """Training of the small model."""


@app.command()
def base(
    folder: Folder = Path("build/train"), device: Device = "auto", compile: Compile = False, seed: int = 1
) -> None:
    """Train the base model."""
    from glimpse_lab.train.base import train_base
    from glimpse_lab.train.config import BaseRun, ModelShape

    train_base(ModelShape(), replace(BaseRun(), seed=seed), folder, _device(device), compiled=compile)


@app.command()
def modules(
    folder: Folder = Path("build/train"), device: Device = "auto", compile: Compile = False, seed: int = 2
) -> None:
    """Train GlimpsePrune's modules on the base that lies in the folder."""
    from glimpse_lab.train import checkpoint
    from glimpse_lab.train.config import ModelShape, ModulesRun
    from glimpse_lab.train.modules import train_modules

    state = checkpoint.load(folder / "base.pt")
    if state is None:
        typer.echo(f"{folder / 'base.pt'}: no base checkpoint; run 'base' first", err=True)
        raise typer.Exit(1)
    run = replace(ModulesRun(), seed=seed)
    train_modules(ModelShape(), run, state["model"], folder, _device(device), compiled=compile)


@app.command()
def export(
    folder: Folder = Path("build/train"),
    to: Annotated[Path, typer.Option(help="Target.")] = Path("build/tiny"),
) -> None:
    """Write the trained base and modules as Hugging Face and GlimpsePrune folders."""
    from glimpse_lab.export import export_base, export_glimpse
    from glimpse_lab.tokens import build_tokenizer
    from glimpse_lab.train import checkpoint
    from glimpse_lab.train.config import ModelShape
    from glimpse_lab.train.glimpse import GlimpseModules

    shape, tokenizer = ModelShape(), build_tokenizer()
    base_state, modules_state = checkpoint.load(folder / "base.pt"), checkpoint.load(folder / "modules.pt")
    if base_state is None:
        typer.echo(f"{folder / 'base.pt'}: no base checkpoint; run 'base' first", err=True)
        raise typer.Exit(1)
    export_base(shape, tokenizer, base_state["model"], to / "base")
    glimpse = GlimpseModules(shape, 0)
    if modules_state is not None:
        glimpse.load_state_dict(modules_state["modules"])
    export_glimpse(shape, tokenizer, glimpse.new_modules(), to / "glimpse")
    typer.echo(
        f"wrote {to / 'base'} and {to / 'glimpse'}" + ("" if modules_state else " (modules untrained)")
    )


@app.command(name="all")
def everything(
    folder: Folder = Path("build/train"),
    to: Annotated[Path, typer.Option(help="Where the finished model goes.")] = Path("build/tiny"),
    device: Device = "auto",
    compile: Compile = False,
) -> None:
    """Base, then modules, then export."""
    base(folder, device, compile)
    modules(folder, device, compile)
    export(folder, to)


if __name__ == "__main__":
    app()

# SPDX-License-Identifier: Apache-2.0
"""Command line of the training: ``python -m glimpse_lab.train base|modules|all``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

app = typer.Typer(no_args_is_help=True, add_completion=False)

Folder = Annotated[Path, typer.Option(help="Where checkpoints and logs go; an existing run there is resumed.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto (cuda if there is one).")]
Compile = Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the layer functions (needs a C++ compiler).")]


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


if __name__ == "__main__":
    app()

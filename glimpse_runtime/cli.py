# SPDX-License-Identifier: Apache-2.0
"""The ``glimpse`` command. Each subcommand lives in a file of its own; this one names them and turns errors into
exit codes: 0 fine, 1 a result differs, 2 bad usage or bad input (one line on stderr, no traceback)."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from typing import Any

import typer

from glimpse_runtime import cli_console as console
from glimpse_runtime.errors import GlimpseError

app = typer.Typer(
    name="glimpse",
    help="Ask vision-language models about pictures, and let them drop the visual tokens a question does not need.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _version(shown: bool) -> None:
    if shown:
        try:
            typer.echo(f"glimpse {version('glimpse-engine')}")
        except PackageNotFoundError:
            typer.echo("glimpse (not installed)")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Show remarks of the libraries underneath."),
    shown: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version."
    ),
) -> None:
    logging.basicConfig(format="%(message)s")
    if not verbose:
        # Ours still say what is lost (they go to stderr once); Hugging Face's are about things we do not use.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit()


def _register() -> None:
    from glimpse_runtime import cli_info, cli_parity, cli_run

    app.command("run", epilog=cli_run.EXAMPLES)(cli_run.run)
    app.command("info", epilog=cli_info.EXAMPLES)(cli_info.info)
    app.command("parity", epilog=cli_parity.EXAMPLES)(cli_parity.parity)


_register()

COMMANDS = "glimpse.commands"
"""Entry points of this group are subcommands that other packages bring: functions with typer's options."""


def add(name: str, function: Callable[..., Any]) -> None:
    """A subcommand of this name. Examples for its help are `EXAMPLES` of the function's module.

    Raises:
        GlimpseError: another function has the name.
    """
    for known in app.registered_commands:
        if known.name == name:
            if known.callback is function:
                return
            raise GlimpseError(f"command {name!r}: expected a name that is free, found one that is taken")
    app.command(name, epilog=getattr(sys.modules[function.__module__], "EXAMPLES", None))(function)


def add_from(entries: Iterable[EntryPoint]) -> None:
    """The subcommands that installed packages bring. One that cannot be had is told of and left out."""
    for entry in entries:
        try:
            add(entry.name, entry.load())
        except Exception as error:  # whatever another package does on its import
            text = " ".join(f"{type(error).__name__}: {error}".split())
            console.err().print(
                f"glimpse: the command {entry.name!r} ({entry.value}) is left out: {text}",
                style="yellow",
                markup=False,
            )


@cache
def _add_installed() -> None:
    add_from(entry_points(group=COMMANDS))


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    _add_installed()
    command = typer.main.get_command(app)
    try:
        code = command.main(
            args=None if arguments is None else list(arguments), prog_name="glimpse", standalone_mode=False
        )
        return int(code or 0)
    except KeyboardInterrupt:
        return console.INTERRUPTED
    except Exception as error:
        if _is_of_the_user(error):
            console.fail(str(error))
            return console.BAD_INPUT
        # Usage errors come from the click that this typer uses, which may be a copy of its own.
        if hasattr(error, "format_message"):
            console.fail(error.format_message())
            return console.BAD_INPUT
        if type(error).__name__ == "Abort":
            return console.INTERRUPTED
        raise


def _is_of_the_user(error: Exception) -> bool:
    """Whether the message of an error is all that its reader needs."""
    if isinstance(error, (GlimpseError, OSError)):
        return True
    if isinstance(error, ValueError) and str(error).startswith("GLIMPSE_"):
        return True  # an environment variable with a value that does not exist
    kernels = sys.modules.get("glimpse_kernels")  # not imported for the sake of --help: it brings torch
    return kernels is not None and isinstance(error, kernels.UnsupportedError)


def main() -> None:
    """Entry point of the ``glimpse`` script."""
    sys.exit(run())


if __name__ == "__main__":
    main()

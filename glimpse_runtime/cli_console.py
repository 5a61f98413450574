# SPDX-License-Identifier: Apache-2.0
"""What all commands share: where they print, how they fail, how they show that time passes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

OK, MISMATCH, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
"""Exit codes: fine; a result differs from what was expected; a bad option, file or picture; Ctrl-C."""


def out() -> Console:
    """Results, for people and pipes."""
    return Console(highlight=False, soft_wrap=True)


def err() -> Console:
    """Progress, remarks and errors."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def fail(message: str) -> None:
    """One line on stderr, whatever the message holds."""
    line = " ".join(message.split())
    err().print(f"glimpse: error: {line}", style="red", markup=False)


@contextmanager
def busy(what: str, *, quiet: bool = False) -> Iterator[None]:
    """A spinner on terminals; elsewhere one line at the end if it took longer than two seconds."""
    console = err()
    began = time.perf_counter()
    if console.is_terminal and not quiet:
        with console.status(what):
            yield
    else:
        yield
    took = time.perf_counter() - began
    if took > 2 and not quiet:
        console.print(f"{what}: {took:.1f} s", style="dim", markup=False)


def milliseconds(seconds: float | None) -> str:
    """A duration for tables."""
    return "-" if seconds is None else f"{seconds * 1000:.0f} ms"


def share(kept: int, total: int) -> str:
    """Kept of total, with the percentage."""
    return f"{kept} of {total} ({100 * kept / total:.0f} %)" if total else "none"

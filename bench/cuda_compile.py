# SPDX-License-Identifier: Apache-2.0
"""Every CUDA C++ kernel of the built extension, as compiled: registers, local and shared memory, widths of loads and stores.

python -m bench.cuda_compile                                     the extension that Python finds
python -m bench.cuda_compile build/gpu/_C.so --kernel compact    another file, some kernels
python -m bench.cuda_compile --sass compact_kernel --arch 90a    how often each opcode stands in a kernel
python -m bench.cuda_compile --markdown docs/cuda-kernels.md

Needs cuobjdump (of the CUDA toolkit, or the triton package) and no GPU: nothing runs.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bench.cuda_compiled import Kernel, Report, read
from bench.occupancy import markdown_table

HEADS = (
    "kernel", "sm", "threads", "registers", "stack", "shared KiB", "arguments", "constants", "resident",
    "loads", "stores", "with",
)  # fmt: skip


def extension() -> Path | None:
    """The file of `glimpse_kernels._C`, without importing it."""
    spec = importlib.util.find_spec("glimpse_kernels._C")
    return Path(spec.origin) if spec is not None and spec.origin else None


def cuda_build() -> str:
    """What the extension says of its CUDA kernels: "nvcc 13.0: sm_80 sm_90a sm_100", or why it has none."""
    from glimpse_kernels import _ext

    module = _ext.compiled()
    if module is None:
        return f"the extension is not built: {_ext.compiled_error()}"
    return str(getattr(module, "cuda_build", "the extension knows no CUDA kernels"))


def _moved(kernel: Kernel, kind: str) -> str:
    return " ".join(f"{number}x{size}" for size, number in kernel.widths(kind).items())


def _cells(kernel: Kernel) -> list[str]:
    loads, stores = kernel.local
    local = f", {loads} loads, {stores} stores" if loads or stores else ""
    return [
        kernel.name, kernel.arch, str(kernel.threads or ""), str(kernel.registers), f"{kernel.stack}{local}",
        f"{kernel.shared / 1024:.1f}", str(kernel.parameters), str(kernel.constants), str(kernel.resident or ""),
        _moved(kernel, "load"), _moved(kernel, "store"), " ".join(f.replace(" ", "-") for f in kernel.features),
    ]  # fmt: skip


def _quoted(kernel: Kernel) -> list[str]:
    name, *more = _cells(kernel)
    return [f"`{name}`", *more]


def terminal(kernels: Sequence[Kernel], title: str) -> Table:
    table = Table(title=title, caption="loads, stores: instructions x bytes a thread, global memory")
    for head in HEADS:
        table.add_column(head, overflow="fold", justify="right" if head in HEADS[2:9] else "left")
    for kernel in kernels:
        table.add_row(*_cells(kernel), style="red" if kernel.faults() else None)
    return table


def markdown(report: Report) -> str:
    """The table for the docs, equal for equal kernels."""
    archs = ", ".join(f"sm_{arch}" for arch in report.architectures)
    lines = [
        "# Compiled CUDA C++ kernels",
        "",
        "Written by `python -m bench.cuda_compile --markdown docs/cuda-kernels.md`; a test compares it.",
        f"nvcc {report.nvcc} for {archs}; read from the machine code in the built extension: nothing here was measured or run.",
        "",
        "- **threads**: the most a block may have, where the source says so (`__launch_bounds__`).",
        "- **stack**: bytes of local memory a thread has, spilled registers among them, and the instructions that touch it. Anything but 0",
        "  fails a test.",
        "- **shared KiB**: static shared memory of a block; what a launch adds is not in it. **arguments**, **constants**: bytes.",
        "- **resident**: blocks of the largest size that a multiprocessor holds at once, by registers, static shared memory and warps.",
        "- **loads**, **stores**: of global memory, instructions in the code x bytes each moves a thread: `4x16` are four of 16 bytes.",
        "- **with**: tensor cores (mma), bulk copies (tma), asynchronous copies, cluster barriers (cluster), waiting for the grid before",
        "  (dependent) and letting the next one begin (release), atomics on global and on shared memory, warp votes and shuffles.",
        "",
    ]
    by_home: dict[str, list[Kernel]] = {}
    for kernel in report.kernels:
        by_home.setdefault(kernel.home, []).append(kernel)
    for place, group in by_home.items():
        lines += [f"## {place}", "", *markdown_table(HEADS, 2, 9, [_quoted(kernel) for kernel in group]), ""]
    return "\n".join(lines)


def _wanted(kernel: Kernel, name: str, archs: Sequence[str]) -> bool:
    return (name in kernel.name or name in kernel.home) and (not archs or kernel.arch in archs)


def main(
    file: Annotated[Path | None, typer.Argument(help="A built file; the extension if none is named.", exists=True, dir_okay=False)] = None,
    kernel: Annotated[str, typer.Option(help="Only kernels with this in their name or their file's.")] = "",
    arch: Annotated[list[str] | None, typer.Option(help="80, 90a, 100; all that are in the file if not given.")] = None,
    sass: Annotated[str, typer.Option(help="Count the opcodes of kernels with this in their name.")] = "",
    as_json: Annotated[Path | None, typer.Option("--json", help="Write everything known of each kernel.")] = None,
    as_markdown: Annotated[Path | None, typer.Option("--markdown", help="Write the table for the docs.")] = None,
) -> None:  # fmt: skip
    """Exit status 1 if a kernel uses local memory or exceeds a limit, 2 if there are no CUDA kernels to look at."""
    console = Console() if sys.stdout.isatty() else Console(width=220)
    place = file or extension()
    report = read(place) if place is not None else None
    if place is None or report is None or not report.kernels:
        why = f"no machine code in {file}" if file else cuda_build()
        print(f"cuda_compile: no CUDA kernels: {why}", file=sys.stderr)
        raise typer.Exit(2)
    report = Report(report.nvcc, [k for k in report.kernels if _wanted(k, kernel, arch or [])])
    kernels = report.kernels
    if sass:
        for found in kernels:
            if sass in found.name:
                counts = ", ".join(f"{opcode} {n}" for opcode, n in sorted(found.code.items()))
                console.print(f"{found.name} (sm_{found.arch}): {counts}", highlight=False, markup=False)
        return
    console.print(terminal(kernels, f"nvcc {report.nvcc}: {place.name}"))
    faults = [fault for found in kernels for fault in found.faults()]
    for fault in faults:
        console.print(fault, style="red", highlight=False, markup=False)
    if as_json:
        told: dict[str, Any] = {
            "nvcc": report.nvcc,
            "architectures": report.architectures,
            "kernels": [k.record() for k in kernels],
            "faults": faults,
        }
        as_json.write_text(json.dumps(told, indent=1) + "\n")
    if as_markdown:
        as_markdown.write_text(markdown(report))
    if faults:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

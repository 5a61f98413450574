# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiled for named GPUs, on a machine without one: registers, spills, shared memory, instructions.

python -m bench.triton_compile                              all ops for sm_80, sm_90, sm_100
python -m bench.triton_compile attention --arch 90 --ptx /tmp/ptx
python -m bench.triton_compile --markdown docs/triton-kernels.md

The rows of the kernel benchmark are called as they are, on tensors without memory, so that each kernel is compiled with the
constants, alignments and configuration that it gets in a model. Nothing runs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pkgutil
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from rich.console import Console

import bench
from bench.op_registry import DTYPES, REGISTRY, Case, Sizes, sizes
from glimpse_kernels import _triton, dispatch

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    raise SystemExit(
        "bench.triton_compile: expected TRITON_INTERPRET to be unset: an interpreted kernel has no code"
    )

from bench.compiled import Compiled, collect, markdown, terminal
from bench.fake_driver import Launched, compiling

CHIPS = {80: _triton.Chip(80, 108), 90: _triton.Chip(90, 132), 100: _triton.Chip(100, 148)}
"""A100, H200 and B200; other capabilities get the multiprocessors of the nearest below."""

SHAPE_NAMES = ("3b", "7b")
SIDES = {"3b": 32, "7b": 64}
"""Image tokens along an edge: 896 and 1792 pixels."""

ALL_DTYPES = {**DTYPES, "fp16": torch.float16}
PLAN: dict[int, dict[str, tuple[str, ...]]] = {
    80: {"bf16": ("7b",)},
    90: {"bf16": ("3b", "7b"), "fp32": ("7b",)},
    100: {"bf16": ("7b",)},
}
"""What is compiled by default: dtypes and shapes by capability, most for the one that comes first with us. Models run in bf16;
the tests on a GPU run fp32, too, and fp16, which differs from bf16 in no more than the conversions."""


def load_rows() -> None:
    """Register the rows of every `bench.op_cases*`."""
    for info in pkgutil.iter_modules(bench.__path__):
        if info.name.startswith("op_cases"):
            importlib.import_module(f"bench.{info.name}")


def written(op: str) -> bool:
    """Whether the op has a Triton kernel."""
    row = next(r for r in dispatch.support_table() if r.op == op and r.backend == "triton")
    return importlib.util.find_spec(f"glimpse_kernels.{row.folder}.triton") is not None


def triton_ops() -> list[str]:
    """Ops whose row of the support table names Triton."""
    return [row.op for row in dispatch.support_table() if row.backend == "triton"]


def _serve(op: str, device: Any, dtype: Any, *, grad: bool = False, size: Sequence[int] = ()) -> Any:
    """Stands in for `dispatch.select`, which knows no meta tensors."""
    row = next(r for r in dispatch.support_table() if r.op == op and r.backend == "triton")
    if row.dtypes is not None and dtype not in row.dtypes:
        raise dispatch.UnsupportedError(f"{op}: has no {dtype} kernel")
    return getattr(importlib.import_module(f"glimpse_kernels.{row.folder}.triton"), op)


@contextmanager
def target(capability: int, launches: list[Launched]) -> Iterator[None]:
    """Inside the block, ops on meta tensors run their Triton wrappers as on a GPU of this capability."""
    chip = CHIPS[max((c for c in CHIPS if c <= capability), default=80)]
    chip = _triton.Chip(capability, chip.multiprocessors)
    with (
        torch.inference_mode(),
        torch.device("meta"),
        mock.patch.object(dispatch, "select", _serve),
        _triton.force_chip(chip),
        compiling(capability, launches.append),
    ):
        yield


def compile_case(case: Case, capability: int) -> list[Launched]:
    """All launches of one call of the row, each with its compiled kernel."""
    launches: list[Launched] = []
    with target(capability, launches):
        case.build().ours()
    return launches


def cases(
    ops: Sequence[str], arch: int, shapes: Sequence[str] | None = None, dtypes: Sequence[str] | None = None
) -> Iterator[Case]:
    """Rows to compile for an architecture; where shapes or dtypes are not given, those of `PLAN`."""
    large: list[Sizes] = [sizes(name, SIDES.get(name, 32)) for name in shapes or SHAPE_NAMES]
    plan = PLAN.get(arch, PLAN[80])
    pictures = True
    for name in dtypes or plan:
        chosen = large if shapes else [s for s in large if s.model in plan.get(name, SHAPE_NAMES)]
        for case in REGISTRY.cases(ops, chosen, [ALL_DTYPES[name]], where="gpu"):
            if pictures or not case.row.per_picture:
                yield case
        pictures = False


def dtype_name(case: Case) -> str:
    return "" if case.row.per_picture else next(n for n, d in ALL_DTYPES.items() if d is case.dtype)


def compile_all(
    ops: Sequence[str],
    archs: Sequence[int],
    shapes: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    console: Console | None = None,
) -> tuple[list[Compiled], list[str]]:
    """Compiled kernels, equal ones once, and what failed in words."""
    found: dict[tuple[int, str, str], Compiled] = {}
    faults: list[str] = []
    for arch in archs:
        for case in cases(ops, arch, shapes, dtypes):
            if not written(case.row.op):
                continue
            where = (
                f"{case.row.op}: {case.row.what} ({case.sizes.name}, {dtype_name(case) or 'fp32'}, sm_{arch})"
            )
            if console:
                console.print(where, style="dim", highlight=False)
            try:
                launches = compile_case(case, arch)
            except Exception as problem:  # one row that does not compile must not hide the others
                at = traceback.extract_tb(problem.__traceback__)
                near = next(
                    (f for f in reversed(at) if "glimpse_kernels" in f.filename or "bench" in f.filename),
                    at[-1],
                )
                text = str(problem).strip().splitlines() or [""]
                faults.append(
                    f"{where}: {type(problem).__name__}: {text[0]} ... {text[-1]} ({near.filename}:{near.lineno})"
                )
                if console:
                    console.print_exception()
                continue
            for launch in launches:
                collect(
                    found, launch, arch, case.row.op, dtype_name(case), f"{case.row.what}, {case.sizes.name}"
                )
    return list(found.values()), faults


def main(
    ops: Annotated[
        list[str] | None,
        typer.Argument(help="Ops to compile; all that have Triton kernels if none is named."),
    ] = None,
    arch: Annotated[
        list[int] | None, typer.Option(help="Compute capability: 80, 90, 100; may be given several times.")
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(SHAPE_NAMES)}; what is planned if not given.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="bf16, fp16 or fp32; what is planned if not given.")
    ] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Write everything known of each kernel.")
    ] = None,
    as_markdown: Annotated[
        Path | None, typer.Option("--markdown", help="Write the table for the docs.")
    ] = None,
    ptx: Annotated[Path | None, typer.Option(help="Folder to write the PTX of every kernel to.")] = None,
    verbose: Annotated[
        bool, typer.Option(help="Name each row as it is compiled, and trace its fault.")
    ] = False,
) -> None:
    """Exit status 1 if a row does not compile, or a kernel does not fit its GPU."""
    load_rows()
    for op in ops or []:
        if op not in triton_ops():
            raise typer.BadParameter(
                f"expected one of {', '.join(triton_ops())}; found {op}", param_hint="OP"
            )
    for name in dtype or []:
        if name not in ALL_DTYPES:
            raise typer.BadParameter(
                f"expected one of {', '.join(ALL_DTYPES)}; found {name}", param_hint="--dtype"
            )
    console = Console() if sys.stdout.isatty() else Console(width=200)
    wanted = list(dict.fromkeys(ops or triton_ops()))
    kernels, faults = compile_all(
        wanted, arch or list(CHIPS), shape, dtype, Console(stderr=True) if verbose else None
    )
    console.print(terminal(kernels))
    for op in wanted:
        if not written(op):
            console.print(f"[yellow]{op}: no Triton kernel yet[/]")
        elif not any(op in k.ops for k in kernels):
            console.print(f"[yellow]{op}: no row launches a kernel[/]")
    faults += [fault for kernel in kernels for fault in kernel.faults()]
    for fault in faults:
        console.print(fault, style="red", highlight=False, markup=False)
    if ptx:
        ptx.mkdir(parents=True, exist_ok=True)
        for kernel in kernels:
            (ptx / f"{kernel.file_name()}.ptx").write_text(kernel.ptx)
    if as_json:
        as_json.write_text(
            json.dumps({"kernels": [k.record() for k in kernels], "faults": faults}, indent=1) + "\n"
        )
    if as_markdown:
        as_markdown.write_text(markdown(kernels))
    if faults:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

# SPDX-License-Identifier: Apache-2.0
"""``glimpse info``: what this machine has, and which backend serves each op on it."""

from __future__ import annotations

import json
import logging
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape
from rich.table import Table

from glimpse_runtime import cli_console as console

EXAMPLES = """
[bold]Examples[/bold]

glimpse info

GLIMPSE_BACKEND=naive glimpse info

glimpse info --json
"""

_NO_KERNEL = "no kernel for this op"


def info(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object instead of tables."),
) -> None:
    """Show this machine, and which backend serves each op and why others were passed over."""
    machine = _machine()
    found = {device: _ops(device) for device in (("cpu", "cuda") if machine["gpu"] != "none" else ("cpu",))}
    if as_json:
        print(json.dumps({"machine": machine, "ops": found["cpu"], "gpu_ops": found.get("cuda", [])}))
        return
    out = console.out()
    about = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in machine.items():
        about.add_row(name, escape(str(value)))
    out.print(about)
    out.print()
    for device, title in (("cpu", "Ops on the CPU"), ("cuda", "Ops on the GPU")):
        if device in found:
            out.print(_table(title, found[device]))
            out.print()
    bare = sorted(
        {
            name
            for ops in found.values()
            for row in ops
            for name, reason in row["passed_over"].items()
            if reason == _NO_KERNEL
        }
    )
    if bare:
        out.print(
            f"Where a backend is not named it has no kernel in this version ({', '.join(bare)}).",
            style="dim",
        )


def _table(title: str, ops: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("op", "dtypes", "served by", "passed over"):
        table.add_column(name, overflow="fold")
    for op, dtypes, served, passed in _grouped(ops):
        table.add_row(op, dtypes, escape(served), escape(passed))
    return table


def _grouped(ops: list[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """One line for the dtypes of an op that are served alike; backends without a kernel are left to the footnote."""
    lines: dict[tuple[str, str, str], list[str]] = {}
    for row in ops:
        served = f"{row['backend']}: {row['how']}" if row["backend"] else "nothing"
        passed = "; ".join(f"{name}: {why}" for name, why in row["passed_over"].items() if why != _NO_KERNEL)
        lines.setdefault((row["op"], served, passed), []).append(row["dtype"])
    return [(op, ", ".join(dtypes), served, passed) for (op, served, passed), dtypes in lines.items()]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _machine() -> dict[str, Any]:
    import torch

    from glimpse_kernels import _cuda, _ext
    from glimpse_kernels.dispatch import forced_backend
    from glimpse_runtime import threads

    module = _ext.compiled()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    threads.respect_limits()  # as loading a model does
    return {
        "glimpse": _version("glimpse-engine"),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "triton": _version("triton"),
        "processor": _processor_name(),
        "cpus": threads.usable_cpus(),
        "threads": torch.get_num_threads(),
        "threads by": threads.explain(),
        "thread pool": module.thread_pool() if module else "torch's",
        "compiled kernels": f"instruction set {module.isa()}"
        if module
        else f"not available ({_ext.compiled_error()})",
        "compiled CUDA kernels": module.cuda_build if module else "not available",
        "backend": forced_backend(),
        "gpu": ", ".join(gpus) if gpus else "none",
        **({"CUDA C++ on it": _cuda.missing() or "runs"} if gpus else {}),
    }


def _ops(device: str) -> list[dict[str, Any]]:
    import torch

    from glimpse_kernels import UnsupportedError
    from glimpse_kernels.dispatch import choose, explain, support_table

    rows = []
    logging.getLogger("glimpse_kernels").setLevel(logging.ERROR)  # the table says what the log would
    for op in dict.fromkeys(row.op for row in support_table()):
        served = {
            dtype
            for row in support_table()
            if row.op == op
            for dtype in (row.dtypes or (torch.float32, torch.bfloat16))
        }
        for dtype in sorted(served, key=str):
            if dtype is torch.float16:  # definitions only; models run in the other two
                continue
            verdicts = explain(op, device, dtype)
            try:
                backend = choose(op, device, dtype)
            except UnsupportedError:
                backend = ""
            how = {name: reason for name, _, reason in verdicts}
            passed = {
                name: reason if not usable else "slower here"
                for name, usable, reason in verdicts
                if name != backend
            }
            name = str(dtype).removeprefix("torch.")
            rows.append(
                {
                    "op": op,
                    "dtype": name,
                    "backend": backend,
                    "how": how.get(backend, ""),
                    "passed_over": passed,
                }
            )
    return rows

# SPDX-License-Identifier: Apache-2.0
"""Stock transformers against this runtime on the CPU: the same weights, the same pictures, side by side in one run.

python -m bench.e2e_cpu --shape mid --pixels 896
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import glimpse_runtime as glimpse
from bench.shapes import SHAPES, build, question, write_modules

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CONTENDERS = ("transformers", "unpruned", "pruned")
PHASES = ("vision", "before", "select", "after")


class FirstToken:
    """Streamer that notes when the first generated token arrives."""

    def __init__(self) -> None:
        self.at: float | None = None
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen and self.at is None:
            self.at = time.perf_counter()
        self._prompt_seen = True

    def end(self) -> None:
        pass


def run_once(
    contender: str, hf: Any, engine: glimpse.GlimpseModel, inputs: dict, new: int, ratio: float
) -> dict:
    """One request; seconds of each phase, of the first token, and of each further token."""
    options: dict[str, Any] = {
        "max_new_tokens": new,
        "min_new_tokens": new,
        "do_sample": False,
        "pad_token_id": 0,
    }
    if contender == "transformers":
        first = FirstToken()
        began = time.perf_counter()
        with torch.inference_mode():
            hf.generate(**inputs, **options, streamer=first)
        ended = time.perf_counter()
        assert first.at is not None
        return {"ttft": first.at - began, "decode": (ended - first.at) / (new - 1)}
    # The threshold lets everything through, so that the cap alone decides: exactly floor(ratio * N) tokens stay.
    pruning = {"plan": None} if contender == "unpruned" else {"threshold": 0.0, "max_remain_ratio": ratio}
    out = engine.generate(**inputs, **options, **pruning, return_dict_in_generate=True)
    t = out.timings
    phases = {phase: getattr(t, phase) for phase in PHASES}
    kept = {} if out.pruning is None else {"kept": out.pruning.kept}
    return {"ttft": t.ttft, "decode": t.decode / (new - 1), **phases, **kept}


def main(
    shape: Annotated[str, typer.Option(help=f"Model shape: {', '.join(SHAPES)}.")] = "mid",
    pixels: Annotated[
        int, typer.Option(help="Side of the square picture; 896 gives 1024 image tokens.")
    ] = 896,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    ratio: Annotated[float, typer.Option(help="Share of image tokens that stay.")] = 0.074,
    new_tokens: Annotated[int, typer.Option(help="Forced new tokens a request.")] = 32,
    repeats: Annotated[
        int, typer.Option(help="Timed requests a contender, interleaved, a new picture each.")
    ] = 3,
    threads: Annotated[int | None, typer.Option(help="Torch threads; default: torch's own choice.")] = None,
    shared: Annotated[
        bool, typer.Option(help="Share transformers' weights instead of laying q/k/v together.")
    ] = False,
    memory: Annotated[
        bool, typer.Option(help="Peak memory too, each contender in a process of its own.")
    ] = True,
    output: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Time to first token, its phases, decoding and peak memory: transformers (sdpa), this runtime unpruned, pruned."""
    if shape not in SHAPES or dtype not in DTYPES:
        raise typer.BadParameter(f"shape: one of {', '.join(SHAPES)}; dtype: one of {', '.join(DTYPES)}")
    if threads:
        torch.set_num_threads(threads)
    load = os.getloadavg()[0]  # another busy process makes every figure worthless
    console = Console(stderr=only is not None, width=None if sys.stdout.isatty() else 130)
    with tempfile.TemporaryDirectory() as folder:
        modules = write_modules(shape, Path(folder) / "modules")
        hf = build(shape, DTYPES[dtype])
        if only == "transformers" or shared:
            engine = glimpse.GlimpseModel.from_hf(hf, modules)
        else:
            hf.save_pretrained(Path(folder) / "base")
            if only:
                del hf
                hf = None
            engine = glimpse.GlimpseModel.from_pretrained(Path(folder) / "base", modules, dtype=DTYPES[dtype])
    if only:  # child process: one request, then its peak
        gc.collect()
        loaded = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
        run_once(only, hf, engine, question(shape, pixels), new_tokens, ratio)
        print(json.dumps({"peak_gib": _resident("VmHWM"), "loaded_gib": loaded}))
        return
    runs: dict[str, list[dict]] = {c: [] for c in CONTENDERS}
    for repeat in track(range(-1, repeats), description=f"{shape} {pixels}px {dtype}", console=console):
        inputs = question(shape, pixels, seed=repeat + 1)
        for contender in CONTENDERS:
            measured = run_once(contender, hf, engine, inputs, new_tokens, ratio)
            if repeat >= 0:  # the first round warms up
                runs[contender].append(measured)
    medians = {c: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for c, rs in runs.items()}
    if memory:
        del hf, engine
        for contender in CONTENDERS:
            arguments = ["--shape", shape, "--pixels", str(pixels), "--dtype", dtype, "--only", contender]
            done = subprocess.run(
                [sys.executable, "-m", "bench.e2e_cpu", *arguments],
                capture_output=True,
                text=True,
                check=True,
            )
            medians[contender] |= json.loads(done.stdout.strip().splitlines()[-1])
    console.print(_table(shape, pixels, dtype, medians))
    if output:
        facts = {"machine": _processor(), "threads": torch.get_num_threads(), "load_before": load}
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        setting = {"shape": shape, "pixels": pixels, "dtype": dtype, "ratio": ratio, "new_tokens": new_tokens}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(
            json.dumps({**facts, **versions, **setting, "median": medians, "runs": runs}, indent=2)
        )


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def _resident(field: str) -> float:
    """GiB of a memory field of /proc/self/status."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 2**20


def _table(shape: str, pixels: int, dtype: str, medians: dict[str, dict]) -> Table:
    table = Table(title=f"{shape}, {pixels} px, {dtype}, {torch.get_num_threads()} threads (medians)")
    columns = [
        "contender",
        "TTFT s",
        "x",
        "vision",
        "layers <= K",
        "VIP+select+compact",
        "rest",
        "ms/token",
        "x",
        "peak GiB",
    ]
    for name in columns:
        table.add_column(name, justify="left" if name == "contender" else "right")
    stock = medians["transformers"]
    for contender, m in medians.items():
        phases = [f"{m[p]:.2f}" if p in m else "" for p in PHASES]
        if contender == "unpruned":  # one phase behind the vision tower
            phases = [phases[0], "", "", f"{m['before'] + m['after']:.2f}"]
        kept = f" ({m['kept']:.0f} kept)" if "kept" in m else ""
        table.add_row(
            contender + kept,
            f"{m['ttft']:.2f}",
            f"{stock['ttft'] / m['ttft']:.2f}",
            *phases,
            f"{1e3 * m['decode']:.1f}",
            f"{stock['decode'] / m['decode']:.2f}",
            f"{m['peak_gib']:.2f}" if "peak_gib" in m else "",
        )
    return table


if __name__ == "__main__":
    typer.run(main)

# SPDX-License-Identifier: Apache-2.0
"""Stock transformers against this runtime on the CPU: the same weights, the same pictures, side by side in one run, with
what the machine itself can do between the requests.

python -m bench.e2e_cpu                        mid, 896 px, bf16: tables
python -m bench.e2e_cpu --shape 3b --output bench/results/cpu-3b-896-bf16.json --markdown
python -m bench.e2e_cpu --render bench/results/cpu-3b-896-bf16.json --markdown
"""

from __future__ import annotations

import gc
import json
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import Progress

from bench.ceilings import Ceilings, Look
from bench.e2e_memory import peak
from bench.e2e_report import grids, markdown, median_of, terminal
from bench.e2e_run import (
    DTYPES,
    PHASES,
    SHAPE_NAMES,
    TINY,
    TRANSFORMERS,
    Contender,
    Setting,
    checkpoint,
    contenders,
    load_engine,
    request,
    transformers_amounts,
)
from bench.timing import load_average, machine
from glimpse_kernels import _ext

WIDTH = 130  # of a console that is none
BIG = ("3b",)  # shapes of which two copies are too many


def main(
    shape: Annotated[
        str, typer.Option(help=f"Model shape: {', '.join(SHAPE_NAMES)} (the trained one).")
    ] = "mid",
    pixels: Annotated[
        int,
        typer.Option(help="Side of the square picture; 896 gives 1024 image tokens. tiny: a sample picture."),
    ] = 896,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    ratio: Annotated[
        float, typer.Option(help="Share of image tokens that stay. tiny: what its own predictor keeps.")
    ] = 0.074,
    new_tokens: Annotated[int, typer.Option(min=4, help="Forced new tokens a request.")] = 32,
    repeats: Annotated[
        int | None,
        typer.Option(min=1, help="Timed requests a contender, a new picture each; default 3, tiny 15, 3b 1."),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Torch threads; default: torch's own choice.")] = None,
    shared: Annotated[
        bool | None,
        typer.Option(
            "--shared/--own",
            help="Use transformers' weights where they are, or load them again; default: 3b shares.",
        ),
    ] = None,
    int8: Annotated[bool, typer.Option(help="8-bit weights, too.")] = True,
    memory: Annotated[
        bool,
        typer.Option(help="Resident memory too, each contender in a process of its own, after the clock."),
    ] = True,
    quick: Annotated[
        bool, typer.Option(help="One short request a contender, no memory: checks that everything runs.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Write all figures and samples as JSON.")] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables in Markdown.")] = False,
    render: Annotated[
        Path | None, typer.Option(exists=True, help="Measure nothing: print the tables of this JSON file.")
    ] = None,
) -> None:
    """Time to first token, its phases and decoding: transformers (sdpa), this runtime unpruned and pruned, bf16 or fp32 and
    int8; each phase's share of what the machine can do, measured between the requests; resident memory; the aims.

    Contenders alternate. Ctrl-C ends the run early: whole rounds that were measured are reported.
    """
    if shape not in SHAPE_NAMES or dtype not in DTYPES:
        raise typer.BadParameter(f"shape: one of {', '.join(SHAPE_NAMES)}; dtype: one of {', '.join(DTYPES)}")
    if render is not None:
        _show(json.loads(render.read_text()), as_markdown)
        return
    transformers.utils.logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
    rounds = repeats or {TINY: 15, "3b": 1}.get(shape, 3)
    if quick:
        rounds, new_tokens, memory = repeats or 1, 4, False
    setting = Setting(shape, pixels, dtype, ratio, new_tokens)
    chosen = tuple(c for c in contenders() if int8 or c.engine != "int8")
    share = shape in BIG if shared is None else shared
    load_before = load_average()
    with tempfile.TemporaryDirectory() as folder:
        hf, base, modules = checkpoint(setting, Path(folder), save=memory or not share)
        engines = {
            kind: load_engine(kind, setting, hf if share or base is None else base, modules)
            for kind in dict.fromkeys(c.engine for c in chosen if c.engine)
        }
        models = {"": hf, **engines}
        runs, looks, interrupted = _rounds(chosen, models, setting, rounds, quick)
        del hf, engines, models
        gc.collect()
        if not runs[TRANSFORMERS]:
            raise typer.Exit(130)  # stopped before anything was measured
        used: dict[str, dict[str, float]] = {}
        if memory and base is not None and not interrupted:
            used, interrupted = _memory(chosen, setting, base, modules)
    example = setting.inputs(0)
    sizes = {
        "prompt_tokens": example["input_ids"].shape[1],
        "image_tokens": int(example["image_grid_thw"][0].prod()) // 4,
    }
    record = {
        "command": _command(sys.argv[1:]),
        "machine": machine(),
        "transformers": transformers.__version__,
        "isa": module.isa() if (module := _ext.compiled()) else None,
        "threads": torch.get_num_threads(),
        "load_average": [load_before, load_average()],
        "setting": setting.record() | sizes | {"shared": share},
        "rounds": len(runs[TRANSFORMERS]),
        "interrupted": interrupted,
        "ceilings": {
            "read": [look.read for look in looks],
            "gemm": [look.gemm[setting.torch_dtype] for look in looks],
            "forms": {form: max(look.forms[form] for look in looks) for form in looks[0].forms},
        },
        "median": {name: median_of(found) for name, found in runs.items()},
        "runs": runs,
        "memory": used,
    }
    _show(record, as_markdown)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record, indent=2) + "\n")
    if interrupted:
        raise typer.Exit(130)


def _rounds(
    chosen: tuple[Contender, ...], models: dict[str, Any], setting: Setting, rounds: int, quick: bool
) -> tuple[dict[str, list[dict[str, Any]]], list[Ceilings], bool]:
    """Requests of whole rounds by contender, the looks at the machine around them, and whether Ctrl-C came first.

    Round 0 warms up. Who goes first rotates, but transformers' amounts are those of "unpruned" in the same round.
    """
    runs: dict[str, list[dict[str, Any]]] = {c.name: [] for c in chosen}
    look = Look([setting.torch_dtype], quick=quick)
    looks = [look()]
    # The weights of `tiny` stay in the cache, from which a look would drive them.
    reading = None if setting.shape == TINY else look.reading
    title = f"{setting.shape} {setting.dtype}"
    try:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(title, total=(rounds + 1) * len(chosen))
            for number in range(rounds + 1):
                inputs = setting.inputs(number)
                done: dict[str, dict[str, Any]] = {}
                around: dict[str, Ceilings] = {}
                first = number % len(chosen)
                for contender in chosen[first:] + chosen[:first]:
                    progress.update(task, description=f"{title}: {contender.name}")
                    model = models[contender.engine]
                    done[contender.name] = request(contender, model, inputs, setting, reading)
                    looks.append(look())
                    around[contender.name] = looks[-2].better(looks[-1])
                    progress.advance(task)
                done[TRANSFORMERS] |= transformers_amounts(done["unpruned"])
                for name, found in done.items():
                    if number:
                        runs[name].append(found | _shares(found, around[name], setting.torch_dtype))
    except KeyboardInterrupt:
        return runs, looks, True
    return runs, looks, False


def _shares(found: dict[str, Any], most: Ceilings, dtype: torch.dtype) -> dict[str, float]:
    """`share_<phase>` of the product ceiling, of the whole way to the first token, and of reading in a decode step.

    Reading is measured between the steps of the very request, where there were looks: the rate moves within seconds.
    """
    gemm, read = most.gemm[dtype], most.read
    phases = {
        f"share_{phase}": found[f"flop_{phase}"] / (found[phase] * gemm)
        for phase in PHASES
        if f"flop_{phase}" in found
    }
    while_decoding = [found["bytes"] * steps / time / rate for steps, time, rate in found["stretches"]]
    return {
        **phases,
        "share_ttft": found["flop"] / (found["ttft"] * gemm),
        "share_decode": statistics.median(while_decoding or [found["bytes"] / (found["decode"] * read)]),
        "gemm": gemm,
        "read": read,
    }


def _memory(
    chosen: tuple[Contender, ...], setting: Setting, base: Path, modules: Path
) -> tuple[dict[str, dict[str, float]], bool]:
    used: dict[str, dict[str, float]] = {}
    try:
        for contender in chosen:
            used[contender.name] = peak(contender, setting, base, modules, torch.get_num_threads())
    except KeyboardInterrupt:
        return used, True
    return used, False


def _command(arguments: list[str]) -> str:
    """What was measured, without where it was written."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and not argument.startswith(("--output=", "--markdown")) and argument != "--output":
            kept.append(argument)
        skip = argument == "--output"
    return " ".join(["python -m bench.e2e_cpu", shlex.join(kept)]).strip()


def _show(record: dict[str, Any], as_markdown: bool) -> None:
    if as_markdown:
        print(markdown(record))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    for grid in grids(record):
        console.print(terminal(grid))
    if record["interrupted"]:
        console.print(f"interrupted: {record['rounds']} whole round(s)")


if __name__ == "__main__":
    typer.run(main)

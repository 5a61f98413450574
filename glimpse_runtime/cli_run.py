# SPDX-License-Identifier: Apache-2.0
"""``glimpse run``: pictures and a question → an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import typer
from rich.table import Table

from glimpse_runtime import cli_console as console
from glimpse_runtime.errors import GlimpseError

if TYPE_CHECKING:
    from glimpse_runtime.ask import Answer, Asker

EXAMPLES = """
[bold]Examples[/bold]

glimpse run --image scene.png "What colour is the circle?"

glimpse run --image a.png --image b.png "Which picture shows a star?" --compare

glimpse run --image scene.png "Read the word." --save-overlay kept.png --max-remain-ratio 0.1

glimpse run --image scene.png "Read the word." --plan divprune --compare

glimpse run --base Qwen2.5-VL-3B-Instruct --glimpse GlimpsePrune_Qwen2.5-VL-3B-Instruct -i photo.jpg "..." --stream
"""

_PRUNING = "Pruning"
_SAMPLING = "Sampling"


def run(
    question: str = typer.Argument(..., help="What to ask."),
    image: Optional[list[str]] = typer.Option(None, "--image", "-i", help="A picture; repeat for several."),  # noqa: UP045
    base: Optional[str] = typer.Option(  # noqa: UP045
        None, "--base", "-b", help="Checkpoint folder or hub id (default: models/tiny of the repository)."
    ),
    glimpse: Optional[str] = typer.Option(  # noqa: UP045
        None, "--glimpse", "-g", help="GlimpsePrune modules for that base; without them nothing is pruned."
    ),
    plan: Optional[str] = typer.Option(  # noqa: UP045
        None,
        "--plan",
        "-p",
        metavar="NAME|FILE",
        help="Prune by this method (fastv, visionzip, ...) or by a plan in a .yaml or .toml file, in place of the modules' own.",
    ),
    compare: bool = typer.Option(False, "--compare", help="Answer unpruned too, and show both side by side."),
    unpruned: bool = typer.Option(False, "--unpruned", help="Do not prune."),
    save_overlay: Optional[Path] = typer.Option(  # noqa: UP045
        None,
        "--save-overlay",
        metavar="FILE",
        help="Write the picture with its kept tokens lit (FILE-2 for a second).",
    ),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object instead of text."),
    stream: bool = typer.Option(False, "--stream", help="Print tokens as they come."),
    max_new_tokens: int = typer.Option(64, min=1, help="Longest answer, in tokens."),
    threshold: Optional[float] = typer.Option(  # noqa: UP045
        None, help="Keep a token if its probability exceeds this, 0 to 1.", rich_help_panel=_PRUNING
    ),
    max_remain_ratio: Optional[float] = typer.Option(  # noqa: UP045
        None, help="Keep at most this share of the visual tokens, in (0, 1].", rich_help_panel=_PRUNING
    ),
    min_remain_num: Optional[int] = typer.Option(  # noqa: UP045
        None, help="Keep at least this many visual tokens.", rich_help_panel=_PRUNING
    ),
    temperature: Optional[float] = typer.Option(  # noqa: UP045
        None, help="Sample with this temperature instead of taking the best token.", rich_help_panel=_SAMPLING
    ),
    top_k: Optional[int] = typer.Option(None, help="Sample among the k best.", rich_help_panel=_SAMPLING),  # noqa: UP045
    top_p: Optional[float] = typer.Option(  # noqa: UP045
        None, help="Sample among the best that hold this probability together.", rich_help_panel=_SAMPLING
    ),
    seed: int = typer.Option(0, help="Seed of the sampling.", rich_help_panel=_SAMPLING),
    dtype: str = typer.Option("auto", help="auto (the checkpoint's own), float32 or bfloat16."),
    quantize: Optional[str] = typer.Option(  # noqa: UP045
        None, help="int8 keeps the decoder's weights in 8 bits: faster answers, half the memory."
    ),
    device: str = typer.Option("cpu", help="Where to run."),
) -> None:
    """Answer a question about pictures.

    The answer goes to standard output, what it cost to standard error.
    """
    if unpruned and (compare or save_overlay):
        raise GlimpseError(
            "--unpruned: cannot be combined with --compare or --save-overlay, which show the pruning"
        )
    if stream and (as_json or compare):
        raise GlimpseError("--stream: cannot be combined with --json or --compare")
    asked = {"threshold": threshold, "max_remain_ratio": max_remain_ratio, "min_remain_num": min_remain_num}
    limits: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if unpruned and (limits or plan):
        other = "plan" if plan else next(iter(limits)).replace("_", "-")
        raise GlimpseError(f"--unpruned: cannot be combined with --{other}")
    sampling = _sampling(temperature, top_k, top_p)
    images = image or []
    if save_overlay and not images:
        raise GlimpseError("--save-overlay: expected at least one --image, found none")
    if plan is not None:
        _check_plan(plan)
    asker, pruned = _load(base, glimpse, dtype, quantize, device, unpruned=unpruned, quiet=as_json)
    if plan is not None:
        from glimpse_runtime.plans import ENDINGS, from_file

        limits["plan"] = from_file(plan, asker.model.modules) if plan.endswith(ENDINGS) else plan
        pruned = True
    if not pruned and (compare or save_overlay or limits):
        raise GlimpseError("--glimpse: expected a folder of modules to prune with (or a --plan), found none")
    inputs = asker.inputs(images, question)
    common: dict[str, Any] = {"max_new_tokens": max_new_tokens, **sampling}
    if sampling:
        _seed(seed)
    plain = None
    if compare:
        with console.busy("answering without and with pruning", quiet=as_json):
            for mode in (False, True):  # first calls pay for memory and thread pools
                asker.ask(inputs, pruned=mode, max_new_tokens=1, **(limits if mode else {}))
            plain = asker.ask(inputs, pruned=False, **common)
            answer = asker.ask(inputs, pruned=True, **common, **limits)
    elif stream:
        from transformers import TextStreamer

        streamer = TextStreamer(asker.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        answer = asker.ask(inputs, pruned=pruned, **common, **limits, streamer=streamer)
    else:
        with console.busy("answering", quiet=as_json):
            answer = asker.ask(inputs, pruned=pruned, **common, **limits)
    written = _overlays(save_overlay, images, answer) if save_overlay else []
    if as_json:
        print(json.dumps(_as_json(question, images, answer, plain, written), ensure_ascii=False))
        return
    if plain is not None:
        console.out().print(_table(question, plain, answer))
    elif not stream:
        print(answer.text)
    _remarks(answer, written, compared=plain is not None)


def _check_plan(plan: str) -> None:
    """Before a checkpoint is loaded: raises GlimpseError where there is no such method or file."""
    from glimpse_runtime.plans import ENDINGS
    from glimpse_runtime.plans.registry import entry

    if not plan.endswith(ENDINGS):
        entry(plan)
    elif not Path(plan).is_file():
        raise GlimpseError(f"--plan: expected a file to read, found {plan!r}")


def _load(
    base: str | None,
    glimpse: str | None,
    dtype: str,
    quantize: str | None,
    device: str,
    *,
    unpruned: bool,
    quiet: bool,
) -> tuple[Asker, bool]:
    from glimpse_runtime.ask import Asker, shipped_model

    if base is None:
        shipped, modules = shipped_model()
        base, glimpse = str(shipped), glimpse or str(modules)
    with console.busy(f"loading {base}", quiet=quiet):
        wanted = None if unpruned else glimpse
        asker = Asker.load(base, wanted, dtype=dtype, quantize=quantize, device=device)
    return asker, asker.has_modules


def _sampling(temperature: float | None, top_k: int | None, top_p: float | None) -> dict[str, Any]:
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    given = {name: value for name, value in given.items() if value is not None}
    if temperature is not None and temperature <= 0:
        raise GlimpseError(
            f"--temperature: expected a number > 0, found {temperature} (leave it out for greedy)"
        )
    if top_k is not None and top_k < 1:
        raise GlimpseError(f"--top-k: expected a number >= 1, found {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise GlimpseError(f"--top-p: expected a number in (0, 1], found {top_p}")
    return {"do_sample": True, **given} if given else {"do_sample": False}


def _seed(seed: int) -> None:
    import torch

    torch.manual_seed(seed)


def _overlays(first: Path, images: list[str], answer: Answer) -> list[str]:
    """Writes one picture for each image; the second and later ones get a number."""
    from glimpse_runtime.overlay import overlay

    written = []
    for number, (image, report) in enumerate(zip(images, answer.pruning, strict=True), 1):
        path = first if number == 1 else first.with_name(f"{first.stem}-{number}{first.suffix}")
        try:
            overlay(image, report.keep).save(path)
        except ValueError as error:  # Pillow: unknown file extension
            raise GlimpseError(f"--save-overlay: {error}") from None
        written.append(str(path))
    return written


def _as_json(
    question: str, images: list[str], answer: Answer, plain: Answer | None, overlays: list[str]
) -> dict[str, Any]:
    data: dict[str, Any] = {
        "question": question,
        "images": images,
        "answer": answer.text,
        "visual_tokens": {"kept": answer.kept, "total": answer.total},
        "pruning": [
            {
                "grid": list(map(int, report.grid)),
                "kept": int(report.kept),
                "keep": report.keep.int().tolist(),
            }
            for report in answer.pruning
        ],
        "seconds": answer.seconds,
    }
    if plain is not None:
        data["unpruned"] = {"answer": plain.text, "seconds": plain.seconds}
    if overlays:
        data["overlays"] = overlays
    return data


def _table(question: str, plain: Answer, answer: Answer) -> Table:
    from rich.markup import escape

    table = Table(title=escape(question), title_justify="left")
    table.add_column("")
    table.add_column("unpruned", overflow="fold")
    table.add_column("pruned", overflow="fold")
    table.add_row("answer", escape(plain.text), escape(answer.text))
    table.add_row("visual tokens", str(plain.kept), console.share(answer.kept, answer.total))
    table.add_row(
        "first token after",
        console.milliseconds(plain.seconds.get("ttft")),
        console.milliseconds(answer.seconds.get("ttft")),
    )
    return table


def _remarks(answer: Answer, written: list[str], *, compared: bool) -> None:
    err = console.err()
    if not compared:
        err.print(
            f"visual tokens kept: {console.share(answer.kept, answer.total)} · "
            f"first token after {console.milliseconds(answer.seconds.get('ttft'))} · "
            f"{len(answer.ids)} tokens in {answer.seconds.get('ttft', 0) + answer.seconds.get('decode', 0):.2f} s",
            style="dim",
        )
    for path in written:
        err.print(f"wrote {path}", style="dim", markup=False)

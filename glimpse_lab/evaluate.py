# SPDX-License-Identifier: Apache-2.0
"""Held-out evaluation of a base with glimpse modules, run through ``glimpse_runtime``: ``python -m glimpse_lab.evaluate``.

Every question is asked alone, with its picture, through the chat template, and answered greedily; an answer counts if it equals the
right one letter for letter. Four runs: everything kept; the modules' own choice; as many tokens of the same picture chosen at
random; no visual token at all. The last two are controls: if they answered as well, the picture would have been read
before the glimpse layer and pruning would prove nothing.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

from glimpse_lab.world import HELD_OUT_SEED, SIZES, TASKS, Question, ask, box_cells, make_scene, render

MODES = ("unpruned", "glimpse", "random", "none")
EVALUATION_SEED = HELD_OUT_SEED + 1_000_000_000
"""First seed of the evaluation; training never sees held-out seeds, and looks at none of these on its way."""

LARGE = 224
"""Sides from which a picture counts as "224 px and above": both at least this long."""


def prompt_of(processor: Any, question: Question) -> str:
    """A question about one picture, through the chat template."""
    content = [{"type": "image"}, {"type": "text", "text": question.question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def evaluate(
    model: Any,
    processor: Any,
    *,
    pictures: int,
    sizes: tuple[tuple[int, int], ...] = SIZES,
    modes: tuple[str, ...] = MODES,
    first_seed: int = EVALUATION_SEED,
) -> list[dict[str, Any]]:
    """Answers every question about ``pictures`` held-out scenes of each size.

    model, processor: of ``glimpse_runtime``. Returns one record a question: task, size, right answer, the answer of each mode,
    kept share and number of tokens, share of the answer's cells among the kept.
    """
    records = []
    noise = random.Random(first_seed)
    jobs = [(h, w, first_seed + 100_000 * i + k) for i, (h, w) in enumerate(sizes) for k in range(pictures)]
    for height, width, seed in tqdm(jobs, desc="evaluate", mininterval=2):
        scene = make_scene(seed, height, width)
        picture = render(scene)
        questions = ask(scene)
        prompts = [prompt_of(processor, q) for q in questions]
        inputs = processor(
            text=prompts, images=[[picture] for _ in questions], padding=True, return_tensors="pt"
        )
        inputs = {k: v.to(model.device) for k, v in inputs.items()}
        length = inputs["input_ids"].shape[1]
        rows, columns = scene.grid
        own = [
            {"task": q.task, "size": f"{height}x{width}", "tokens": rows * columns, "seed": seed, "question": q.question,
             "answer": q.answer} for q in questions
        ]  # fmt: skip
        keeps: list[torch.Tensor] = []
        for mode in modes:
            options: dict[str, Any] = {}
            if mode == "unpruned":
                options = {"plan": None}
            elif mode in ("random", "none"):
                masks = []
                for keep in keeps:
                    mask = torch.zeros(keep.numel(), dtype=torch.bool)
                    if mode == "random":
                        mask[noise.sample(range(keep.numel()), int(keep.sum()))] = True
                    masks.append(mask)
                options = {"ref_masks": masks, "min_remain_num": 0}
            out = model.generate(
                **inputs, max_new_tokens=32, do_sample=False, return_dict_in_generate=True, **options
            )
            for i, sequence in enumerate(out.sequences):
                own[i][mode] = processor.tokenizer.decode(sequence[length:], skip_special_tokens=True)
            if mode == "glimpse":
                keeps = [p.keep.flatten().cpu() for p in out.pruning]
                for i, (question, entry) in enumerate(zip(questions, out.pruning, strict=True)):
                    cells = {c for box in question.boxes for c in box_cells(box, height, width)}
                    own[i]["kept"] = entry.kept / entry.total
                    own[i]["covered"] = sum(bool(entry.keep[r, c]) for r, c in cells) / len(cells)
                    own[i]["needed"] = len(cells) / entry.total
        records += own
    return records


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: accuracy in percent of each mode and kept share, over all, per task and per size."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for r in records:
        height, width = map(int, r["size"].split("x"))
        groups["all"].append(r)
        if min(height, width) >= LARGE:
            groups["224 px and above"].append(r)
    for task in TASKS:
        groups[f"task: {task}"] = [r for r in records if r["task"] == task]
    for r in records:
        groups[f"size: {r['size']} ({r['tokens']} tokens)"].append(r)
    modes = [m for m in MODES if m in records[0]]
    lines = [
        "| | questions | " + " | ".join(modes) + " | kept | needed |",
        "| --- " * (len(modes) + 4) + "|",
    ]
    for name, group in groups.items():
        if not group:
            continue
        cells = [f"{100 * sum(r[m] == r['answer'] for r in group) / len(group):.1f}" for m in modes]
        shares = [
            f"{100 * sum(r[k] for r in group) / len(group):.1f}" if k in group[0] else ""
            for k in ("kept", "needed")
        ]
        lines.append(f"| {name} | {len(group)} | " + " | ".join(cells + shares) + " |")
    return "\n".join(lines)


def main(
    base: Annotated[Path, typer.Option(help="Folder of the base model.")] = Path("models/tiny/base"),
    glimpse: Annotated[Path, typer.Option(help="Folder of the glimpse modules.")] = Path(
        "models/tiny/glimpse"
    ),
    pictures: Annotated[int, typer.Option(min=1, help="Held-out pictures of each of the 13 sizes.")] = 24,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    quantize: Annotated[
        str | None, typer.Option(help="int8: the decoder's weights in 8 bits. Default: as they are.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write every question and answer here as JSON lines.")
    ] = None,
) -> None:
    """Held-out accuracy of the small model: unpruned, pruned, and the two controls."""
    from glimpse_runtime import GlimpseModel
    from glimpse_runtime.processor import Processor

    model = GlimpseModel.from_pretrained(
        base, glimpse=glimpse, dtype=getattr(torch, dtype), quantize=quantize
    )
    records = evaluate(model, Processor.from_pretrained(base), pictures=pictures)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("".join(json.dumps(r) + "\n" for r in records))
    typer.echo(table(records))


if __name__ == "__main__":
    typer.run(main)

# SPDX-License-Identifier: Apache-2.0
"""One question about some pictures, from files to an answer and what it cost. What the command line and demo share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import torch

from glimpse_runtime.errors import CheckpointError, GlimpseError
from glimpse_runtime.model import GlimpseModel
from glimpse_runtime.processor import Processor
from glimpse_runtime.report import GlimpseGenerateOutput

DTYPES: dict[str, Any] = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16}


def shipped_model() -> tuple[Path, Path]:
    """Base and modules folders of the small model that lies in the repository.

    Raises:
        CheckpointError: this installation is not a checkout of the repository.
    """
    roots = list(dict.fromkeys((Path.cwd(), Path(__file__).resolve().parents[1])))
    for root in roots:
        base, modules = root / "models" / "tiny" / "base", root / "models" / "tiny" / "glimpse"
        if (base / "config.json").is_file() and (modules / "config.json").is_file():
            return base, modules
    raise CheckpointError(
        "base: expected a checkpoint (--base DIR); the small model of the repository is not here: "
        "looked for models/tiny/base in " + " and ".join(str(root) for root in roots)
    )


@dataclass
class Answer:
    """An answer and its price.

    Attributes:
        text: the answer, special tokens removed.
        ids: the new tokens.
        kept, total: visual tokens that stayed, of all there were; equal when nothing was pruned.
        seconds: time of each phase; "ttft" is the time to the first token.
        pruning: one `PicturePruning` for each picture, empty when nothing was pruned.
    """

    text: str
    ids: list[int]
    kept: int
    total: int
    seconds: dict[str, float] = field(default_factory=dict)
    pruning: list[Any] = field(default_factory=list)


class Asker:
    """A model and its processor, loaded once, asked many times."""

    def __init__(self, model: GlimpseModel, processor: Processor, *, has_modules: bool) -> None:
        self.model = model
        self.processor = processor
        self.has_modules = has_modules

    @classmethod
    def load(
        cls,
        base: str | Path,
        modules: str | Path | None,
        *,
        dtype: str = "auto",
        device: str = "cpu",
        quantize: str | None = None,
    ) -> Asker:
        """Loads the processor first: it is quick, and names most mistakes about folders."""
        if dtype not in DTYPES:
            raise GlimpseError(f"dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}")
        processor = Processor.from_pretrained(base, device=device)
        model = GlimpseModel.from_pretrained(
            base, glimpse=modules, dtype=DTYPES[dtype], device=device, quantize=quantize
        )
        return cls(model, processor, has_modules=modules is not None)

    def inputs(self, images: Sequence[Any], question: str) -> Any:
        """Model inputs for pictures followed by a question, in the checkpoint's chat form."""
        content = [{"type": "image", "image": image} for image in images]
        message = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
        return self.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=True)

    def ask(self, inputs: Any, *, pruned: bool = True, max_new_tokens: int = 64, **options: Any) -> Answer:
        """Generates one answer.

        Args:
            inputs: from `inputs`.
            pruned: False runs the plain model.
            options: passed to `GlimpseModel.generate`; `plan` is for the pruned run alone.
        """
        if pruned and not self.has_modules and "plan" not in options:
            raise GlimpseError(
                "glimpse: pruning needs GlimpsePrune modules (--glimpse DIR) or a plan, none were loaded"
            )
        if not pruned:
            options["plan"] = None
        out = self.model.generate(
            **inputs, max_new_tokens=max_new_tokens, return_dict_in_generate=True, **options
        )
        assert isinstance(out, GlimpseGenerateOutput)
        new = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        merged = self.processor.image.merge_size**2
        grids = inputs.get("image_grid_thw")
        total = 0 if grids is None else int(grids.prod(-1).sum()) // merged
        images = list(out.pruning) if out.pruning is not None else []
        return Answer(
            text=self.processor.decode(new, skip_special_tokens=True).strip(),
            ids=new,
            kept=sum(int(image.kept) for image in images) if images else total,
            total=total,
            seconds=_seconds(out.timings),
            pruning=images,
        )


def _seconds(timings: Any) -> dict[str, float]:
    if timings is None:
        return {}
    if isinstance(timings, Mapping):
        data: dict[str, Any] = dict(timings)
    else:
        data = asdict(timings) if is_dataclass(timings) and not isinstance(timings, type) else vars(timings)
    return {name: float(value) for name, value in data.items() if isinstance(value, (int, float))}

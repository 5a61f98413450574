# SPDX-License-Identifier: Apache-2.0
"""The contenders of `bench.e2e_cpu`: how they are loaded, and one request with everything that is read off it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

import glimpse_runtime as glimpse
from bench import work
from bench.shapes import SHAPES, build, question, write_modules
from glimpse_kernels import Recording
from glimpse_runtime.processor import Processor

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TINY = "tiny"
SHAPE_NAMES = (*SHAPES, TINY)
TRANSFORMERS = "transformers"
PHASES = ("vision", "before", "select", "after")
LOOKS = 4  # at the machine while a request decodes
TINY_FOLDER = Path(__file__).parents[1] / "models" / "tiny"
TINY_PICTURE = "6_biggest_336x336.png"
TINY_QUESTION = "What is the biggest thing?"


@dataclass(frozen=True)
class Contender:
    """How a request is served; engine: "" is transformers, "plain" and "int8" are this runtime's weights."""

    name: str
    engine: str
    pruned: bool


@dataclass(frozen=True)
class Setting:
    """What is asked of every contender; ratio: share of the image tokens that stay (`tiny`: what its own plan keeps)."""

    shape: str
    pixels: int
    dtype: str
    ratio: float
    new_tokens: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def inputs(self, seed: int) -> dict[str, Any]:
        """Processor outputs: a noise picture of its own for every seed; for `tiny`, a sample and its question."""
        if self.shape != TINY:
            return question(self.shape, self.pixels, seed=seed)
        parts = [
            {"type": "image", "image": str(TINY_FOLDER / "pictures" / TINY_PICTURE)},
            {"type": "text", "text": TINY_QUESTION},
        ]
        processor = Processor.from_pretrained(TINY_FOLDER / "base")
        message = {"role": "user", "content": parts}
        return dict(processor.apply_chat_template([message], add_generation_prompt=True, tokenize=True))

    def record(self) -> dict[str, Any]:
        return asdict(self)


def contenders() -> tuple[Contender, ...]:
    """Transformers, and this runtime with and without pruning, with the weights as they are and with 8-bit ones."""
    return (
        Contender(TRANSFORMERS, "", False),
        *(
            Contender(("int8 " if kind == "int8" else "") + name, kind, name == "pruned")
            for kind in ("plain", "int8")
            for name in ("unpruned", "pruned")
        ),
    )


def checkpoint(setting: Setting, folder: Path, *, save: bool) -> tuple[Any, Path | None, Path]:
    """(model of transformers, its folder, folder of the GlimpsePrune modules); the first is saved only if asked."""
    if setting.shape == TINY:
        base = TINY_FOLDER / "base"
        return load_transformers(setting, base), base, TINY_FOLDER / "glimpse"
    modules = write_modules(setting.shape, folder / "modules")
    hf = build(setting.shape, setting.torch_dtype)
    if save:
        hf.save_pretrained(folder / "base")
    return hf, folder / "base" if save else None, modules


def load_transformers(setting: Setting, base: Path) -> Any:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(
        base, dtype=setting.torch_dtype, attn_implementation="sdpa"
    ).eval()


def load_engine(kind: str, setting: Setting, source: Any, modules: Path) -> glimpse.GlimpseModel:
    """source: a folder, or a model of transformers whose weights are shared."""
    options: dict[str, Any] = {"quantize": "int8"} if kind == "int8" else {}
    if isinstance(source, Path):
        return glimpse.GlimpseModel.from_pretrained(source, modules, dtype=setting.torch_dtype, **options)
    return glimpse.GlimpseModel.from_hf(source, modules, **options)


def request(
    contender: Contender,
    model: Any,
    inputs: dict[str, Any],
    setting: Setting,
    reading: Callable[[], float] | None = None,
) -> dict[str, Any]:
    """One request; seconds of the first token, of its phases and of a further token, and the work of each.

    model: of transformers or a `GlimpseModel`. Keys `flop_<phase>`: see `bench.work`. `bytes`: of a decode step.
    `outside`: share of a decode step spent outside the replay of its recording. `stretches`: see `Pace`, which looks at the
    machine `LOOKS` times a request, if `reading` is given; the clock stands meanwhile.
    """
    new = setting.new_tokens
    options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    if setting.shape == TINY:  # it would end its answer: give it an end that it never says
        options["eos_token_id"] = (
            model.config.image_token_id if not contender.engine else model.base.config.image_token_id
        )
    pace = Pace(reading, max(1, new // LOOKS))
    if not contender.engine:
        began = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(**inputs, **options, streamer=pace)
        ended, made = time.perf_counter(), out.shape[1] - inputs["input_ids"].shape[1]
        assert pace.first is not None
        found: dict[str, Any] = {"ttft": pace.first - began, "decode": ended - pace.first}
    else:
        if not contender.pruned:
            options["plan"] = None
        elif setting.shape != TINY:
            # The threshold lets everything through, so that the cap alone decides: exactly floor(ratio * N) tokens stay.
            options |= {"threshold": 0.0, "max_remain_ratio": setting.ratio}
        if reading is not None:
            options["streamer"] = pace
        with _replays() as replays:
            out = model.generate(**inputs, **options, return_dict_in_generate=True)
        t, made = out.timings, out.timings.new_tokens
        found = {"ttft": t.ttft, "decode": t.decode, **{phase: getattr(t, phase) for phase in PHASES}}
        found |= _amounts(model, inputs, out.pruning, setting)
        found |= _outside(replays, pace)
    if made != new:
        raise RuntimeError(f"{contender.name}: expected {new} new tokens, found {made}")
    found["decode"] = (found["decode"] - pace.stood) / (new - 1)
    return found | {"stretches": pace.stretches()}


def transformers_amounts(plain: dict[str, Any]) -> dict[str, Any]:
    """What a request of transformers has to do: what this runtime does unpruned, phases together."""
    return {"flop": plain["flop"], "bytes": plain["bytes"]}


def _amounts(
    model: glimpse.GlimpseModel, inputs: dict[str, Any], pruning: Any, setting: Setting
) -> dict[str, Any]:
    base = model.base
    text, decoder = base.config.text, base.decoder
    ids = inputs["input_ids"][0]
    rows, image = len(ids), ids == base.config.image_token_id
    frames, height, width = inputs["image_grid_thw"][0].tolist()
    done = {"vision": work.vision(base.config.vision, (frames, height, width))}
    kept_rows, more = rows, dict[str, Any]()
    if pruning is None:
        done["after"] = work.to_first_token(text, rows)
    else:
        assert model.plan is not None
        stage = model.plan.stages[0]
        scorer: Any = stage.score
        stays = ~image
        stays[image] = torch.cat([picture.keep.flatten() for picture in pruning])
        kept, pictured = stays.nonzero()[:, 0].tolist(), int(image.sum())
        kept_rows, more = len(kept), {"kept": pruning.kept}
        probed = rows + scorer.probe.length
        done["before"] = work.to_scores(text, probed, stage.at.index, pictured, scorer.weights)
        done["select"] = work.prediction(scorer.weights, pictured)
        done["after"] = work.after_pruning(text, stage.at.index, kept)
    step = work.decode_bytes(decoder, kept_rows + setting.new_tokens / 2)
    flops = {f"flop_{phase}": amount.total for phase, amount in done.items()}
    return {
        **more,
        **flops,
        "flop": sum(flops.values()),
        "bytes": step,
        "kv_rows": kept_rows + setting.new_tokens,
    }


class Pace:
    """Streamer that notes when the first generated token arrives, and looks at the machine while the others do.

    reading: gives the rate at which memory is read now, bytes a second; called every `every` tokens, the clock standing.

    Attributes:
        first: when the first token came.
        looks: (tokens so far, start, end, rate) of every call of `reading`.
    """

    def __init__(
        self, reading: Callable[[], float] | None, every: int, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self.first: float | None = None
        self.looks: list[tuple[int, float, float, float]] = []
        self._reading, self._every, self._now = reading, every, now
        self._tokens = -1  # the prompt comes first

    def put(self, value: torch.Tensor) -> None:
        self._tokens += 1
        if self._tokens == 1:
            self.first = self._now()
        elif self._tokens > 1 and self._reading is not None and self._tokens % self._every == 0:
            began = self._now()
            rate = self._reading()
            self.looks.append((self._tokens, began, self._now(), rate))

    def end(self) -> None:
        pass

    @property
    def stood(self) -> float:
        """Seconds spent looking."""
        return sum(end - start for _, start, end, _ in self.looks)

    def stretches(self) -> list[tuple[int, float, float]]:
        """Between two looks: (steps, seconds, mean of the two rates)."""
        return [
            (after[0] - before[0], after[1] - before[2], (before[3] + after[3]) / 2)
            for before, after in zip(self.looks, self.looks[1:], strict=False)
        ]


def _outside(replays: list[tuple[float, float]], pace: Pace) -> dict[str, float]:
    """`outside`: share of the steps, from one replay's start to the next one's, that is no replay; steps with a look left
    out, and nothing if none is left."""
    steps = inside = 0.0
    for (start, end), (following, _) in zip(replays, replays[1:], strict=False):
        if not any(start < look[1] < following for look in pace.looks):
            steps, inside = steps + following - start, inside + end - start
    return {"outside": 1 - inside / steps} if steps else {}


@contextmanager
def _replays() -> Iterator[list[tuple[float, float]]]:
    """(start, end) of every replay of a recording inside the block. Looking costs under a microsecond a step."""
    seen: list[tuple[float, float]] = []
    replay, now = Recording.replay, time.perf_counter

    def timed(self: Recording) -> None:
        began = now()
        replay(self)
        seen.append((began, now()))

    Recording.replay = timed  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        Recording.replay = replay  # type: ignore[method-assign]

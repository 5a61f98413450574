# SPDX-License-Identifier: Apache-2.0
"""Who serves requests in `bench.gpu_e2e`: this runtime, stock transformers, and the transcription of the original."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch

from bench.gpu_e2e_seams import Beat, Marks, runtime_seams
from bench.gpu_e2e_world import LEAST_PIXELS, MOST_PIXELS, Prompt, World
from bench.original_parts import VisionAttention
from bench.original_path import OriginalPath

OURS, STOCK, ORIGINAL = "runtime", "transformers", "original"


@dataclass(frozen=True)
class Keep:
    """Which visual tokens stay. ratio: share of them; None: nothing is pruned. by: "cap": the threshold lets all through and the
    cap cuts; "threshold": no cap, a threshold that this share passes."""

    ratio: float | None = None
    by: str = "cap"
    threshold: float = 0.0

    def options(self) -> dict[str, Any]:
        if self.by == "cap":
            return {"threshold": 0.0, "max_remain_ratio": self.ratio}
        return {"threshold": self.threshold, "max_remain_ratio": None}


@dataclass
class Made:
    """What a request gave. tokens: `[B, new]`. beat: when they came. kept: visual tokens of each row that stayed, or None. masks:
    which, of the first row. notes: seams that were not found."""

    tokens: torch.Tensor
    beat: Beat = field(default_factory=Beat)
    kept: list[int] | None = None
    mask: torch.Tensor | None = None
    notes: list[str] = field(default_factory=list)


class Contender(Protocol):
    name: str

    def patches(self, picture: np.ndarray) -> torch.Tensor:
        """From a picture in the host's memory to `pixel_values`."""
        ...

    def serve(
        self, prompt: Prompt, pixels: torch.Tensor, keep: Keep, new: int, marks: Marks | None = None
    ) -> Made:
        """A whole request, until the host has all of its `new` tokens. Marks are set behind the vision tower and later."""
        ...


class Runtime:
    """This runtime. model: made anew for each row, so that no row inherits a pool or graphs."""

    def __init__(self, world: World, **engine: Any) -> None:
        self.name, self.world = OURS, world
        self.model = world.ours(**engine)

    def patches(self, picture: np.ndarray) -> torch.Tensor:
        bounds = {"min_pixels": LEAST_PIXELS, "max_pixels": MOST_PIXELS}
        pixels, _ = self.world.processor.process_images(picture, **bounds, device=self.world.device)
        return pixels

    def serve(
        self, prompt: Prompt, pixels: torch.Tensor, keep: Keep, new: int, marks: Marks | None = None
    ) -> Made:
        options: dict[str, Any] = {"plan": None} if keep.ratio is None else keep.options()
        options |= {
            "max_new_tokens": new,
            "do_sample": False,
            "eos_token_id": self.world.end,
            "pad_token_id": 0,
        }
        beat = Beat()
        if marks is None:
            out: Any = self.model.generate(
                **prompt.inputs, pixel_values=pixels, **options, streamer=beat, return_dict_in_generate=True
            )
            missing: list[str] = []
        else:
            with runtime_seams(marks) as missing:
                out = self.model.generate(
                    **prompt.inputs, pixel_values=pixels, **options, return_dict_in_generate=True
                )
                marks("after")
        made = Made(
            out.sequences[:, prompt.ids.shape[1] :].cpu(),
            beat,
            notes=[f"no seam: {name}" for name in missing],
        )
        if out.pruning is not None:
            rows = [[p for p in out.pruning if p.row == row] for row in range(len(prompt.ids))]
            made.kept = [sum(p.kept for p in row) for row in rows]
            made.mask = torch.cat([p.keep.flatten() for p in rows[0]]).cpu()
        return made

    def threshold(self, prompt: Prompt, pixels: torch.Tensor, ratio: float) -> float:
        """A threshold that the share `ratio` of the visual tokens passes."""
        scores = self.model.prefill(
            **prompt.inputs, pixel_values=pixels, select=False, max_new_tokens=1
        ).scores
        assert scores is not None
        cut = scores.float().sort(descending=True).values[int(ratio * len(scores))]
        return float(cut.double().sigmoid())


class Stock:
    """transformers, unpruned, sdpa. static: with a static cache, whose decoding transformers compiles by itself on a GPU."""

    def __init__(self, world: World, static: bool = False) -> None:
        self.name, self.world, self._static = STOCK, world, static

    @cached_property
    def _images(self) -> Any:
        options = {"min_pixels": LEAST_PIXELS, "max_pixels": MOST_PIXELS}
        try:
            from transformers import Qwen2VLImageProcessor

            return Qwen2VLImageProcessor(**options)
        except ImportError:  # without torchvision
            from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

            return Qwen2VLImageProcessorPil(**options)

    def patches(self, picture: np.ndarray) -> torch.Tensor:
        return self._images(images=[picture], return_tensors="pt")["pixel_values"]

    def serve(
        self, prompt: Prompt, pixels: torch.Tensor, keep: Keep, new: int, marks: Marks | None = None
    ) -> Made:
        if keep.ratio is not None:
            raise ValueError("transformers prunes nothing")
        world, beat = self.world, Beat()
        inputs = {name: t.to(world.device) for name, t in prompt.inputs.items()}
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == world.image_token).int()
        options: dict[str, Any] = {
            "max_new_tokens": new,
            "do_sample": False,
            "eos_token_id": world.end,
            "pad_token_id": 0,
        }
        if self._static:
            options["cache_implementation"] = "static"
        hook = None
        if marks is not None:
            hook = world.hf.model.visual.register_forward_hook(lambda *_: marks("vision"))
        try:
            with torch.inference_mode():
                out = world.hf.generate(
                    **inputs, pixel_values=pixels.to(world.device), **options, streamer=beat
                )
        finally:
            if hook is not None:
                hook.remove()
        if marks is not None:
            marks("after")
        return Made(out[:, prompt.ids.shape[1] :].cpu(), beat)


class Original:
    """The transcription of the original's path."""

    def __init__(self, world: World, vision: VisionAttention = "flash") -> None:
        self.name, self.world = ORIGINAL, world
        self.path = OriginalPath(world.hf, world.modules, vision)
        self._stock = Stock(world)

    def patches(self, picture: np.ndarray) -> torch.Tensor:
        return self._stock.patches(picture)  # the original uses transformers' own

    def serve(
        self, prompt: Prompt, pixels: torch.Tensor, keep: Keep, new: int, marks: Marks | None = None
    ) -> Made:
        if keep.ratio is None:
            raise ValueError("the original's path without pruning is transformers")
        ids = prompt.ids.to(self.world.device)
        mark = (lambda phase: None) if marks is None else marks
        done = self.path.prefill(ids, pixels, prompt.grids, **keep.options(), mark=mark)
        first = done.logits.argmax(-1).tolist()
        if marks is not None:
            marks("after")
        beat = Beat()
        beat.times.append(time.perf_counter())
        tokens = torch.tensor(first)[:, None]
        kept, mask = done.keep.sum(1).tolist(), done.keep[0].cpu()
        if new > 1:
            tokens = self.path.decode(done, new, self.world.end).cpu()
            pace = (time.perf_counter() - beat.times[0]) / (tokens.shape[1] - 1)
            beat.times += [beat.times[0] + pace * (n + 1) for n in range(tokens.shape[1] - 1)]
        return Made(tokens, beat, kept, mask)

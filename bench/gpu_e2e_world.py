# SPDX-License-Identifier: Apache-2.0
"""What `bench.gpu_e2e` measures on: models with random weights made on the device, pictures, prompts."""

from __future__ import annotations

import gc
import inspect
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.shapes import SHAPES, write_modules
from glimpse_runtime import GlimpseModel
from glimpse_runtime.loading import BaseModel, share_base
from glimpse_runtime.modules import GlimpseModules
from glimpse_runtime.plan import PrunePlan
from glimpse_runtime.plans import glimpse as glimpse_plan
from glimpse_runtime.processor import Processor

TINY = Path(__file__).parents[1] / "models" / "tiny"
MERGED = 28
"""Pixels along an edge of one visual token."""
ODD = 12
"""Pixels that a picture is larger than what it is resized to."""
TEXT = 61
BEFORE = 15
"""Text tokens of a prompt, and how many of them stand before the picture."""
LEAST_PIXELS, MOST_PIXELS = 4 * MERGED**2, 1 << 25


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    shape: of `bench.shapes`, or "tiny": the model of this repository. tokens: visual tokens of the pictures: small, middle,
    large. batches: from one to many. new, new_slow: tokens that are generated to time decoding, by those that are slow fewer.
    """

    shape: str
    dtype: torch.dtype
    tokens: tuple[int, int, int]
    batches: tuple[int, ...]
    new: int
    new_slow: int
    repeats: int


FULL = Scale("7b", torch.bfloat16, (1024, 4096, 16384), (1, 8, 16, 32, 64), 96, 24, 7)
SMALL = Scale("tiny", torch.float32, (36, 64, 144), (1, 2, 3), 12, 4, 1)
"""For checks and rehearsals."""


@dataclass(frozen=True)
class Prompt:
    """Token ids `[B, L]` on the host, one picture each; grids `[B, 3]`; mask `[B, L]`, if rows are padded."""

    ids: torch.Tensor
    grids: torch.Tensor
    mask: torch.Tensor | None = None

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        mask = torch.ones_like(self.ids) if self.mask is None else self.mask
        return {"input_ids": self.ids, "attention_mask": mask, "image_grid_thw": self.grids}


class World:
    """Models and inputs of one scale on a device; what takes memory is made when it is first asked for."""

    def __init__(self, scale: Scale, device: torch.device, folder: Path) -> None:
        self.scale, self.device, self._folder = scale, device, folder

    @cached_property
    def hf(self) -> Any:
        """A model of transformers with sdpa attention. "7b": random weights, uniform in ±0.02, norms 1."""
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        if self.scale.shape == "tiny":
            model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                TINY / "base", dtype=self.scale.dtype, attn_implementation="sdpa"
            )
            model = model.to(self.device).eval()
            model.generation_config.eos_token_id = self.end
            return model
        config = Qwen2_5_VLConfig(**SHAPES[self.scale.shape][0])
        config._attn_implementation = "sdpa"
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.scale.dtype)
        try:
            with _no_init(), torch.device(self.device):
                model = Qwen2_5_VLForConditionalGeneration(config).eval()
        finally:
            torch.set_default_dtype(before)
        generator = torch.Generator(self.device).manual_seed(0)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if weight.ndim == 1 and "bias" not in key:
                    weight.fill_(1.0)
                else:
                    weight.uniform_(-0.02, 0.02, generator=generator)
        model.tie_weights()
        model.generation_config.eos_token_id = self.end
        model.generation_config.pad_token_id = 0
        return model

    @cached_property
    def modules(self) -> Path:
        """Folder of GlimpsePrune modules."""
        return (
            TINY / "glimpse"
            if self.scale.shape == "tiny"
            else write_modules(self.scale.shape, self._folder / "modules")
        )

    @cached_property
    def base(self) -> BaseModel:
        """This runtime's view of the same weights."""
        return share_base(self.hf)

    @cached_property
    def plan(self) -> PrunePlan:
        modules = GlimpseModules.from_pretrained(
            self.modules, self.base.config, dtype=self.scale.dtype, device=self.device
        )
        return glimpse_plan(modules)

    def ours(self, **engine: Any) -> GlimpseModel:
        """A model of this runtime that has served nobody: without a pool, without graphs. engine: options of its `Engine`."""
        if engine:
            from glimpse_runtime.engine import Engine

            return GlimpseModel(self.base, self.plan, engine=Engine(self.base.decoder, **engine))
        return GlimpseModel(self.base, self.plan)

    def settle(self) -> None:
        """Make everything that stays, so that a row's memory is its own."""
        _ = self.hf, self.base, self.plan
        self.tidy()

    @cached_property
    def processor(self) -> Processor:
        """Of the repository's model: the pictures' way is that of the published ones. On the device, where it can be."""
        known = inspect.signature(Processor.from_pretrained).parameters
        place: dict[str, Any] = {"device": self.device} if "device" in known else {}
        return Processor.from_pretrained(TINY / "base", **place)

    @property
    def image_token(self) -> int:
        return 435 if self.scale.shape == "tiny" else int(SHAPES[self.scale.shape][0]["image_token_id"])

    @property
    def end(self) -> int:
        """A token that ends an answer, and is never the likeliest one here (in a random model, as good as never)."""
        return self.image_token

    @property
    def words(self) -> int:
        """Token ids below are text."""
        return 400 if self.scale.shape == "tiny" else 4096

    def prompt(self, tokens: int, batch: int = 1, seed: int = 0) -> Prompt:
        """Rows of `TEXT` random text tokens around one square picture of `tokens` visual tokens."""
        side = round(tokens**0.5)
        generator = torch.Generator().manual_seed(seed)
        text = torch.randint(0, self.words, (batch, TEXT), generator=generator)
        image = torch.full((batch, side * side), self.image_token)
        ids = torch.cat((text[:, :BEFORE], image, text[:, BEFORE:]), dim=1)
        return Prompt(ids, torch.tensor([[1, 2 * side, 2 * side]] * batch))

    def picture(self, tokens: int, seed: int = 0) -> np.ndarray:
        """`[H, W, 3]` uint8 noise, a little larger than the size at which it gives `tokens` visual tokens."""
        side = round(tokens**0.5) * MERGED + ODD
        return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)

    def patches(self, tokens: int, batch: int, seed: int = 0) -> torch.Tensor:
        """`[P, 1176]` random patches on the device, as of a batch of pictures."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(
            batch * 4 * tokens, 1176, device=self.device, generator=generator, dtype=self.scale.dtype
        )

    def memory(self) -> int:
        """Bytes that tensors hold on the device."""
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0

    def tidy(self) -> None:
        """Give back what nobody holds, and forget the peak."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """The most bytes that tensors held since `tidy`."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0


def _no_init() -> Any:
    """Weights are set afterwards: transformers need not draw them first."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:
        return nullcontext()
    return no_init_weights()

# SPDX-License-Identifier: Apache-2.0
"""Models and inputs the runtime tests share. Everything comes from `tests/golden/glimpse`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

import glimpse_runtime as glimpse

GOLDEN = Path(__file__).parents[1] / "golden" / "glimpse"
IMAGE, START, END, PAD = 606, 603, 604, 600


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def manifest() -> dict[str, Any]:
    return json.loads((GOLDEN / "manifest.json").read_text())


@pytest.fixture(scope="session")
def hf_model() -> Qwen2_5_VLForConditionalGeneration:
    return load_hf()


def load_hf(dtype: torch.dtype = torch.float32) -> Qwen2_5_VLForConditionalGeneration:
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        GOLDEN / "base", dtype=dtype, attn_implementation="sdpa"
    )
    return model.eval()


@pytest.fixture(scope="session")
def model() -> glimpse.GlimpseModel:
    return glimpse.GlimpseModel.from_pretrained(GOLDEN / "base", GOLDEN / "gp_v1", dtype=torch.float32)


@pytest.fixture(scope="session")
def golden_inputs() -> Callable[[str], dict[str, torch.Tensor]]:
    def load(name: str) -> dict[str, torch.Tensor]:
        arrays = np.load(GOLDEN / f"inputs_{name}.npz")
        names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
        return {n: torch.from_numpy(arrays[n]) for n in names}

    return load


Segment = int | tuple[int, int]


def make_batch(
    rows: list[list[Segment]], *, side: str = "left", seed: int = 0
) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """A padded batch and the same rows alone.

    A row is a list of segments: a number of text tokens, or a picture as (height, width) of its merged grid.
    """
    generator = torch.Generator().manual_seed(seed)
    ids, grids, pixels = [], [], []
    for row in rows:
        tokens: list[int] = []
        own: list[tuple[int, int, int]] = []
        for segment in row:
            if isinstance(segment, tuple):
                height, width = segment
                tokens += [START, *[IMAGE] * (height * width), END]
                own.append((1, 2 * height, 2 * width))
            else:
                tokens += torch.randint(0, 600, (segment,), generator=generator).tolist()
        patches = sum(h * w for _, h, w in own)
        ids.append(tokens)
        grids.append(torch.tensor(own, dtype=torch.int64).reshape(-1, 3))
        pixels.append(torch.randn(patches, 1176, generator=generator))
    longest = max(map(len, ids))
    padded, mask = torch.full((len(rows), longest), PAD), torch.zeros(len(rows), longest, dtype=torch.int64)
    for r, tokens in enumerate(ids):
        at = slice(longest - len(tokens), None) if side == "left" else slice(0, len(tokens))
        padded[r, at] = torch.tensor(tokens)
        mask[r, at] = 1

    def pack(tokens, mask, grid, pixel):
        inputs = {"input_ids": tokens, "attention_mask": mask}
        return inputs | ({"pixel_values": pixel, "image_grid_thw": grid} if len(grid) else {})

    batch = pack(padded, mask, torch.cat(grids), torch.cat(pixels))
    alone = [
        pack(torch.tensor([t]), torch.ones(1, len(t), dtype=torch.int64), g, p)
        for t, g, p in zip(ids, grids, pixels, strict=True)
    ]
    return batch, alone


def for_hf(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same inputs with the token types transformers needs for its positions."""
    return inputs | {"mm_token_type_ids": (inputs["input_ids"] == IMAGE).int()}

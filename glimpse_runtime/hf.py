# SPDX-License-Identifier: Apache-2.0
"""Drop-in for an already loaded Hugging Face model: same object, same `generate` call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.model import GlimpseModel

_MARK = "_glimpse_engine"


def accelerate(hf_model: Any, glimpse: str | Path | None = None) -> Any:
    """Let this engine serve `hf_model.generate(...)`.

    Weights are shared, not copied, and nothing of the model is changed but the method looked up as `generate`.

    Args:
        hf_model: a loaded `Qwen2_5_VLForConditionalGeneration`.
        glimpse: GlimpsePrune modules for it (folder or hub id); None: the same results as before, unpruned.

    Returns:
        `hf_model`.

    Raises:
        GlimpseError: the model is accelerated already.
        CheckpointError: the model or the modules cannot be used; the model is left as it was.
    """
    if _MARK in vars(hf_model):
        raise GlimpseError(
            "accelerate(): expected a plain model, found one that is accelerated already; restore() it"
        )
    engine = GlimpseModel.from_hf(hf_model, glimpse)
    # Past nn.Module.__setattr__: neither may end up among the model's modules or parameters.
    vars(hf_model)[_MARK] = engine
    vars(hf_model)["generate"] = engine.generate
    return hf_model


def restore(hf_model: Any) -> Any:
    """Undo `accelerate`; the model is as it was.

    Raises:
        GlimpseError: the model is not accelerated.
    """
    if _MARK not in vars(hf_model):
        raise GlimpseError("restore(): expected a model that accelerate() was called on")
    del vars(hf_model)[_MARK]
    del vars(hf_model)["generate"]
    return hf_model

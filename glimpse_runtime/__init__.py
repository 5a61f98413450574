# SPDX-License-Identifier: Apache-2.0
"""Glimpse: visual token pruning that turns into time and memory.

model = glimpse_runtime.GlimpseModel.from_pretrained(base, glimpse=modules)
out = model.generate(**processor_inputs, max_new_tokens=64, return_dict_in_generate=True)
out.sequences, out.pruning
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glimpse_runtime import plans
    from glimpse_runtime.errors import CheckpointError, GlimpseError, UnsupportedOptionError
    from glimpse_runtime.hf import accelerate, restore
    from glimpse_runtime.model import GlimpseModel
    from glimpse_runtime.plan import PrunePlan, Stage
    from glimpse_runtime.prefill_result import PrefillResult
    from glimpse_runtime.processor import Processor
    from glimpse_runtime.report import GlimpseGenerateOutput, PicturePruning, PruningReport
    from glimpse_runtime.stages.budget import Budget
    from glimpse_runtime.stages.places import Layer, LayerInput, Vision

# Resolved on first use: torch and transformers take seconds to import, and `glimpse --help` needs neither.
_HOMES = {
    "Budget": "stages.budget",
    "CheckpointError": "errors",
    "GlimpseError": "errors",
    "GlimpseGenerateOutput": "report",
    "GlimpseModel": "model",
    "Layer": "stages.places",
    "LayerInput": "stages.places",
    "PicturePruning": "report",
    "PrefillResult": "prefill_result",
    "Processor": "processor",
    "PrunePlan": "plan",
    "PruningReport": "report",
    "Stage": "plan",
    "UnsupportedOptionError": "errors",
    "Vision": "stages.places",
    "accelerate": "hf",
    "restore": "hf",
}

__all__ = [
    "Budget",
    "CheckpointError",
    "GlimpseError",
    "GlimpseGenerateOutput",
    "GlimpseModel",
    "Layer",
    "LayerInput",
    "PicturePruning",
    "PrefillResult",
    "Processor",
    "PrunePlan",
    "PruningReport",
    "Stage",
    "UnsupportedOptionError",
    "Vision",
    "accelerate",
    "plans",
    "restore",
]


def __getattr__(name: str) -> Any:
    if name == "plans":
        return import_module(f"{__name__}.plans")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

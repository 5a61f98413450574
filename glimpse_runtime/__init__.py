# SPDX-License-Identifier: Apache-2.0
"""Glimpse: visual token pruning that turns into time and memory.

model = glimpse_runtime.GlimpseModel.from_pretrained(base, glimpse=modules)
out = model.generate(**processor_inputs, max_new_tokens=64, return_dict_in_generate=True)
out.sequences, out.pruning
"""

from glimpse_runtime.errors import CheckpointError, GlimpseError, UnsupportedOptionError
from glimpse_runtime.hf import accelerate, restore
from glimpse_runtime.model import GlimpseModel
from glimpse_runtime.plan import Layer, PrunePlan, Stage
from glimpse_runtime.prefill_result import PrefillResult
from glimpse_runtime.report import GlimpseGenerateOutput, PicturePruning, PruningReport
from glimpse_runtime.selection import Budget

__all__ = [
    "Budget",
    "CheckpointError",
    "GlimpseError",
    "GlimpseGenerateOutput",
    "GlimpseModel",
    "Layer",
    "PicturePruning",
    "PrefillResult",
    "PrunePlan",
    "PruningReport",
    "Stage",
    "UnsupportedOptionError",
    "accelerate",
    "restore",
]

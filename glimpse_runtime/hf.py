# SPDX-License-Identifier: Apache-2.0
"""Drop-in for an already loaded Hugging Face model: same object, same `generate` call."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.model import GlimpseModel


class _Generate:
    """Stands in for the model's `generate`.

    The engine holds views of the model's weights. Where these were replaced since (`model.to(...)`, `.float()`, new
    parameters), it is built anew, so that the call always answers for the model as it is.
    """

    def __init__(self, hf_model: Any, modules: str | Path | None) -> None:
        self._model = hf_model
        self._modules = modules
        self._engine: GlimpseModel | None = None
        self._built_on: tuple[tuple[int, Any], ...] = ()

    def engine(self) -> GlimpseModel:
        if self._engine is None or self._weights() != self._built_on:
            self._engine = GlimpseModel.from_hf(self._model, self._modules)
            self._built_on = self._weights()  # only now: on a GPU some were moved
        return self._engine

    def _weights(self) -> tuple[tuple[int, Any], ...]:
        return tuple((p.data_ptr(), p.dtype) for p in self._model.parameters())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        engine = self.engine()
        engine.generation_config = self._model.generation_config
        return engine.generate(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Generate:
        return _Generate(copy.deepcopy(self._model, memo), self._modules)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Generate, (self._model, self._modules)


def accelerate(hf_model: Any, glimpse: str | Path | None = None) -> Any:
    """Let this engine serve `hf_model.generate(...)`.

    Weights are shared, not copied, and nothing of the model is changed but the method looked up as `generate`; on a GPU the
    parameters of projections that are one product move to lie side by side.

    Args:
        hf_model: a loaded `Qwen2_5_VLForConditionalGeneration`.
        glimpse: GlimpsePrune modules for it (folder or hub id); None: the same results as before, unpruned.

    Returns:
        `hf_model`.

    Raises:
        GlimpseError: the model is accelerated already.
        CheckpointError: the model or the modules cannot be used; the model is left as it was.
    """
    if isinstance(vars(hf_model).get("generate"), _Generate):
        raise GlimpseError(
            "accelerate(): expected a plain model, found one that is accelerated already; restore() it"
        )
    generate = _Generate(hf_model, glimpse)
    generate.engine()
    # Past nn.Module.__setattr__: it may not end up among the model's modules or parameters.
    vars(hf_model)["generate"] = generate
    return hf_model


def restore(hf_model: Any) -> Any:
    """Undo `accelerate`; the model is as it was.

    Raises:
        GlimpseError: the model is not accelerated.
    """
    if not isinstance(vars(hf_model).get("generate"), _Generate):
        raise GlimpseError("restore(): expected a model that accelerate() was called on")
    del vars(hf_model)["generate"]
    return hf_model

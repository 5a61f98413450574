# SPDX-License-Identifier: Apache-2.0
"""The tiny model on a GPU that is none: kernels by their definitions, graphs on tape, and what the host waits for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import glimpse_runtime as glimpse
from glimpse_kernels import dispatch
from glimpse_runtime.engine import Engine
from glimpse_runtime.graphs import Capture
from glimpse_runtime.models.qwen2_5_vl import layout
from glimpse_runtime.uploads import Arriving
from tests.graph_tape import TapeCapture
from tests.stand_in import StandIn, stand_in_gpu

GOLDEN = Path(__file__).parents[1] / "golden" / "glimpse"


@dataclass
class Device:
    """waits: what the host waited for outside of kernels: the definitions look at lengths, which kernels do on the device."""

    gpu: StandIn

    @property
    def waits(self) -> list[str]:
        return self.gpu.reads

    def model(self, modules: str | None = "gp_v1", capture: Capture | None = None) -> glimpse.GlimpseModel:
        folder = None if modules is None else GOLDEN / modules
        model = glimpse.GlimpseModel.from_pretrained(
            GOLDEN / "base", folder, dtype=torch.float32, device="cuda"
        )
        model.engine = Engine(model.base.decoder, capture=capture)
        return model


COUNT = "how many rows stay"


@contextmanager
def counting(gpu: StandIn) -> Iterator[None]:
    """Inside, waits for numbers on their way to the host are among `gpu.reads`."""
    wait = Arriving.wait

    def noted(self: Arriving) -> list[int]:
        if self._done is not None:
            gpu.reads.append(COUNT)
        return wait(self)

    with mock.patch.object(Arriving, "wait", noted):
        yield


@contextmanager
def device() -> Iterator[Device]:
    """Inside the block ``cuda:0`` exists and the definitions serve it."""
    fresh = mock.patch.object(layout, "_known", OrderedDict())
    with stand_in_gpu() as gpu, counting(gpu), dispatch.force_backend("naive"), fresh:
        select = dispatch.select

        def unseen(*names: Any, **options: Any) -> Callable[..., Any]:
            serve = select(*names, **options)

            def run(*args: Any, **kwargs: Any) -> Any:
                with gpu.unwatched():
                    return serve(*args, **kwargs)

            return run

        with mock.patch.object(dispatch, "select", unseen):
            yield Device(gpu)


def tapes(model: glimpse.GlimpseModel) -> list[Any]:
    """What the model's engine captured, oldest first."""
    capture = model.engine.graphs.capture
    assert isinstance(capture, TapeCapture)
    return capture.tapes

# SPDX-License-Identifier: Apache-2.0
"""Memory of a prefill: bytes of its keys and values, and the most that its tensors hold at one moment.

The latter is counted from every allocation that torch makes, so it is the same in each run and no other process has a part in it.
What is not in it: weights, the picture's own patches, and the few buffers that kernels keep for their threads.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch

from glimpse_lab.compare.asked import inputs_of, large
from glimpse_lab.compare.contenders import Contender
from glimpse_lab.compare.store import Store

_TOWER = "compare: vision tower"


class _Marked:
    """A vision tower that leaves a mark in the profile where it ends."""

    def __init__(self, tower: Any) -> None:
        self._tower = tower

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(_TOWER):
            return self._tower(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tower, name)


def measure(model: Any, inputs: dict[str, Any], contender: Contender) -> dict[str, int]:
    """Bytes of one prefill.

    Returns:
        kv: of the prompt's keys and values in all layers. tower, behind: the most that is alive at one moment while the vision
        tower runs, and from its end on.
    """
    from glimpse_runtime import GlimpseModel  # what a run keeps for the next one would not be counted

    fresh = GlimpseModel(replace(model.base, vision=_Marked(model.base.vision)))
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would tell on stderr that it starts and stops
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        result = fresh.prefill(**inputs, plan=contender.plan, max_new_tokens=1)
    events = profile.profiler.kineto_results.events()
    end = max(event.end_ns() for event in events if event.name() == _TOWER)
    alive = 0
    most = {"tower": 0, "behind": 0}
    for at, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        alive += size
        phase = "tower" if at < end else "behind"
        most[phase] = max(most[phase], alive)
    layers = model.base.decoder.config.num_layers
    kv = sum(part.nbytes for layer in range(layers) for part in result.kv(0, layer))
    return {"kv": kv, **most}


class Memory:
    """One record a contender."""

    def __init__(self, store: Store, size: tuple[int, int], contenders: list[Contender]) -> None:
        self._store, self._picture, self._contenders = store, large(*size), contenders

    def left(self) -> list[Contender]:
        done = {(r["plan"], r["budget"]) for r in self._store.of("memory") if r["size"] == self._picture.size}
        return [contender for contender in self._contenders if contender.key not in done]

    def run(self, model: Any, processor: Any, advance: Any) -> None:
        """Measure who is left. `advance` is called behind every record."""
        left = self.left()
        if not left:
            return
        inputs = inputs_of(processor, self._picture, self._picture.questions()[:1])
        measure(
            model, inputs, self._contenders[0]
        )  # what is made once and stays would count for whoever comes first
        for contender in left:
            own = {"size": self._picture.size, "plan": contender.name, "budget": contender.budget}
            self._store.add({"kind": "memory", **own, **measure(model, inputs, contender)})
            advance()

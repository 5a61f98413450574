# SPDX-License-Identifier: Apache-2.0
"""What a pruning method is: stages that say where tokens are scored, and which of them stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol

import torch

from glimpse_runtime.errors import GlimpseError, UnsupportedOptionError
from glimpse_runtime.models.qwen2_5_vl.layout import VisionLayout
from glimpse_runtime.selection import Budget


@dataclass(frozen=True)
class Layer:
    """A stage inside decoder layer `index` (0-based); beyond the last layer means the last layer."""

    index: int


@dataclass(frozen=True)
class Probe:
    """Learned rows appended to each sequence with pictures, so that a layer can be asked what it looks at.

    Attributes:
        length: rows a sequence.
        vectors: layer → `[length, width]`. Layer 0's are the input embeddings of the rows, the others are added to
            the rows' hidden state before their layer.
    """

    length: int
    vectors: Mapping[int, torch.Tensor]


class Scorer(Protocol):
    """Turns named taps of the model into one fp32 score a visual token.

    Attributes:
        vision_taps: vision blocks whose pooled output it reads.
        query_layers: decoder layers in which it reads the last probe row's logits against the visual keys.
        normalized: those logits as log-softmax over the whole row instead of raw.
        probe: rows it needs in the prompt.
    """

    @property
    def vision_taps(self) -> tuple[int, ...]: ...
    @property
    def query_layers(self) -> tuple[int, ...]: ...
    @property
    def normalized(self) -> bool: ...
    @property
    def probe(self) -> Probe: ...

    def prepare(self, taps: Mapping[int, torch.Tensor], layout: VisionLayout) -> Any:
        """What depends on the pictures alone; `taps[b]` is `[N, vision width]` in the tower's raster order."""
        ...

    def score(self, logits: Sequence[torch.Tensor], prepared: Any) -> torch.Tensor:
        """`[N]` fp32 from `logits`, `[N, heads]` fp32 for each of `query_layers`, in the tower's raster order."""
        ...


@dataclass(frozen=True)
class Stage:
    """One pruning step.

    Attributes:
        at: where it happens.
        score: how a token's importance is computed; None if the keep mask is given with the call.
        select: which tokens stay.
        positions: "keep": kept tokens keep their original rotary positions.
        evict_earlier: the keys and values of the layers before the stage lose the dropped tokens too.
    """

    at: Layer
    score: Scorer | None
    select: Budget
    positions: Literal["keep"] = "keep"
    evict_earlier: Literal[True] = True


@dataclass(frozen=True)
class PrunePlan:
    """A pruning method: one declaration that prefill executes."""

    name: str
    stages: tuple[Stage, ...] = field(default=())

    def __post_init__(self) -> None:
        if len(self.stages) != 1:
            raise UnsupportedOptionError(f"plan {self.name!r}: expected one stage, found {len(self.stages)}")
        stage = self.stages[0]
        for name, value, known in (
            ("positions", stage.positions, "keep"),
            ("evict_earlier", stage.evict_earlier, True),
        ):
            if value != known:
                raise UnsupportedOptionError(
                    f"plan {self.name!r}: {name}: expected {known!r}, found {value!r}"
                )
        if stage.at.index < 0:
            raise GlimpseError(f"plan {self.name!r}: layer must be >= 0, found {stage.at.index}")
        late = [
            layer for layer in (stage.score.query_layers if stage.score else ()) if layer > stage.at.index
        ]
        if late:
            raise GlimpseError(
                f"plan {self.name!r}: scores are read in layers {late}, after the stage in layer {stage.at.index}"
            )

    def with_budget(self, **changes: Any) -> PrunePlan:
        """The same method with other selection options (fields of `Budget`)."""
        known = {f.name for f in fields(Budget)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise GlimpseError(f"selection options: expected some of {sorted(known)}, found {unknown}")
        stages = tuple(replace(stage, select=replace(stage.select, **changes)) for stage in self.stages)
        return replace(self, stages=stages)

    def with_given_masks(self) -> PrunePlan:
        """The same method for keep masks that come with the call: nothing is scored, budgets work per picture."""
        stages = tuple(
            replace(stage, score=None, select=replace(stage.select, threshold=0.5, group="picture"))
            for stage in self.stages
        )
        return replace(self, stages=stages)

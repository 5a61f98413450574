# SPDX-License-Identifier: Apache-2.0
"""What a pruning method is: stages that say where tokens are scored, which of them stay, and what becomes of the others."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from glimpse_runtime.errors import GlimpseError, UnsupportedOptionError
from glimpse_runtime.stages.budget import Budget
from glimpse_runtime.stages.mergers import Merge
from glimpse_runtime.stages.places import Layer, LayerInput, Place, Vision
from glimpse_runtime.stages.scorers import GlanceScorer, RowScorer, Scorer, VisionScorer
from glimpse_runtime.stages.selection import Selector
from glimpse_runtime.taps import VisionTaps


@dataclass(frozen=True)
class Stage:
    """One pruning step.

    Attributes:
        at: where it happens.
        select: which tokens stay.
        score: how a token's importance is computed; None if the selection goes by features alone, or the keep mask is given with
            the call.
        merge: what becomes of the features of the others; None: nothing. Only at `Vision()`.
        positions: "keep": kept tokens keep their original rotary positions; "renumber": rows count anew from 0, and
            generated tokens continue from there in the layers behind the stage.
        evict_earlier: the keys and values of the layers before the stage lose the dropped tokens too.
    """

    at: Place
    select: Selector
    score: Scorer | None = None
    merge: Merge | None = None
    positions: Literal["keep", "renumber"] = "keep"
    evict_earlier: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.at, (Vision, LayerInput, Layer)):
            raise GlimpseError(f"at: expected Vision(), LayerInput(k) or Layer(k), found {self.at!r}")
        if not isinstance(self.select, Selector):
            raise GlimpseError(f"select: expected a Selector, found {self.select!r}")
        if self.positions not in ("keep", "renumber"):
            raise GlimpseError(f"positions: expected 'keep' or 'renumber', found {self.positions!r}")
        known = {Vision: (VisionScorer,), LayerInput: (RowScorer,), Layer: (RowScorer, GlanceScorer)}[
            type(self.at)
        ]
        if self.score is not None and not isinstance(self.score, known):
            names = " or ".join(kind.__name__ for kind in known)
            raise GlimpseError(f"score at {self.at}: expected a {names}, found {type(self.score).__name__}")
        if self.merge is not None and not isinstance(self.merge, Merge):
            raise GlimpseError(f"merge: expected a Merge, found {self.merge!r}")
        if self.merge is not None and not isinstance(self.at, Vision):
            raise UnsupportedOptionError(
                f"merge: tokens are merged before the decoder alone, found it at {self.at}"
            )

        if self.select.scored and self.score is None and not isinstance(self.select, Budget):
            raise GlimpseError(
                f"score: expected one at {self.at}, {type(self.select).__name__} selects by it; found none"
            )
        if self.glance is not None and not self.evict_earlier:
            raise UnsupportedOptionError(
                "evict_earlier: expected True where a score needs rows of its own in the prompt, which nobody may see later; "
                "found False"
            )
        needs_tower = self.select.whole_pictures or self.select.taps != VisionTaps()
        if needs_tower and not isinstance(self.at, Vision):
            raise UnsupportedOptionError(
                f"select at {self.at}: {type(self.select).__name__} looks at what the vision tower gave: expected it at Vision()"
            )
        if self.evict_earlier and self.positions == "renumber":
            raise UnsupportedOptionError(
                "positions: expected 'keep' together with evict_earlier, the keys of earlier layers are rotated already; "
                "found 'renumber'"
            )

    @property
    def taps(self) -> VisionTaps:
        """What it wants to see of the vision tower."""
        of_score = VisionTaps() if self.score is None else self.score.taps
        return of_score | self.select.taps | (VisionTaps() if self.merge is None else self.merge.taps)

    @property
    def glance(self) -> GlanceScorer | None:
        """The scorer, if it needs rows of its own in the prompt."""
        return self.score if isinstance(self.score, GlanceScorer) else None


@dataclass(frozen=True)
class PrunePlan:
    """A pruning method: one declaration that prefill executes. Stages come in the order in which tokens meet them.

    Raises GlimpseError where the stages cannot follow each other; the text says why.
    """

    name: str
    stages: tuple[Stage, ...] = field(default=())

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise GlimpseError(f"plan: name: expected a name, found {self.name!r}")
        if not isinstance(self.stages, (tuple, list)) or not all(isinstance(s, Stage) for s in self.stages):
            raise GlimpseError(f"plan {self.name!r}: expected a tuple of stages, found {self.stages!r}")
        if not self.stages:
            raise GlimpseError(f"plan {self.name!r}: expected at least one stage, found none")
        for before, stage in zip(self.stages[:-1], self.stages[1:], strict=True):
            self._check_follows(before, stage)
        evicting = [number for number, stage in enumerate(self.stages) if stage.evict_earlier]
        for number, stage in enumerate(self.stages):
            later = isinstance(stage.at, Vision) is False and evicting and number < evicting[-1]
            if later and stage.positions == "renumber":
                raise UnsupportedOptionError(
                    f"plan {self.name!r}: positions at {stage.at}: expected 'keep' before a stage that evicts dropped rows from "
                    "all layers before it, whose keys would count from different rows; found 'renumber'"
                )
        glances = [stage for stage in self.stages if stage.glance]
        if len(glances) > 1:
            raise GlimpseError(
                f"plan {self.name!r}: expected at most one stage whose score needs rows of its own in the prompt, "
                f"found {len(glances)}"
            )
        for stage in glances:
            if isinstance(stage.at, Layer) and stage.at.index < 0:
                raise GlimpseError(f"plan {self.name!r}: layer must be >= 0, found {stage.at.index}")
            self._check_glance(stage)

    def _check_follows(self, before: Stage, stage: Stage) -> None:
        why = None
        if isinstance(stage.at, Vision) and not isinstance(before.at, Vision):
            why = "tokens have left the vision tower for good when they are in the decoder: put it first"
        elif not isinstance(before.at, Vision) and not isinstance(stage.at, Vision):
            here, there = stage.at.order, before.at.order
            # Shares and numbers, and those from either end, are comparable only in a decoder of known depth.
            comparable = type(here[0]) is type(there[0]) and (here[0] < 0) == (there[0] < 0)
            if comparable and here <= there:
                why = "the tokens have passed it already: put it first, or one of them at another layer"
        if why is None and stage.select.whole_pictures:
            why = "it cuts whole pictures into windows, which are not whole any more: put it first"
        if why is not None:
            raise GlimpseError(f"plan {self.name!r}: {stage.at} cannot come behind {before.at}: {why}")

    def _check_glance(self, stage: Stage) -> None:
        assert stage.glance is not None and isinstance(stage.at, Layer)
        late = [
            n for n in stage.glance.query_layers if isinstance(stage.at.index, int) and n > stage.at.index
        ]
        if late:
            raise GlimpseError(
                f"plan {self.name!r}: scores are read in layers {late}, after the stage in layer {stage.at.index}"
            )

    def resolved(self, layers: int) -> PrunePlan:
        """The same method for a decoder of so many layers: places are layer numbers, none beyond the last one.

        Raises:
            GlimpseError: in this decoder the stages cannot follow each other.
        """
        stages = tuple(replace(stage, at=stage.at.resolved(layers)) for stage in self.stages)
        try:
            found = replace(self, stages=stages)
        except GlimpseError as error:
            asked = ", ".join(str(stage.at) for stage in self.stages)
            raise type(error)(f"{error}; in a decoder of {layers} layers, found {asked}") from error
        for number, stage in enumerate(stages):
            if stage.glance is None or not number:
                continue
            earlier = stages[number - 1].at
            early = [n for n in stage.glance.query_layers if earlier.order >= (n, 0)]
            if early:
                raise GlimpseError(
                    f"plan {self.name!r}: scores are read in layers {early}, when {earlier} has not dropped its tokens yet: "
                    "put that stage further ahead"
                )
        return found

    @property
    def taps(self) -> VisionTaps:
        """What its stages want to see of the vision tower."""
        wanted = VisionTaps()
        for stage in self.stages:
            wanted = wanted | stage.taps
        return wanted

    @property
    def glance(self) -> GlanceScorer | None:
        """The scorer that needs rows of its own in the prompt, if there is one."""
        return next((stage.glance for stage in self.stages if stage.glance), None)

    def with_budget(self, **changes: Any) -> PrunePlan:
        """The same method with other selection options (fields of `Budget`).

        Raises:
            GlimpseError: an option that `Budget` does not know.
            UnsupportedOptionError: no stage, or more than one, selects by a `Budget`.
        """
        known = {f.name for f in fields(Budget)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise GlimpseError(f"selection options: expected some of {sorted(known)}, found {unknown}")
        takers = [stage for stage in self.stages if isinstance(stage.select, Budget)]
        if len(takers) != 1:
            raise UnsupportedOptionError(
                f"plan {self.name!r}: {', '.join(sorted(changes))}: expected one stage that selects by a threshold and a cap, found "
                f"{len(takers)}; what a plan like this keeps is said where it is made"
            )
        stages = tuple(
            replace(stage, select=replace(stage.select, **changes))
            if isinstance(stage.select, Budget)
            else stage
            for stage in self.stages
        )
        return replace(self, stages=stages)

    def with_given_masks(self) -> PrunePlan:
        """The same method for keep masks that come with the call: nothing is scored, budgets work per picture.

        Raises:
            UnsupportedOptionError: the plan is not one stage with a `Budget`.
        """
        if len(self.stages) != 1 or not isinstance(self.stages[0].select, Budget):
            raise UnsupportedOptionError(
                f"plan {self.name!r}: keep masks: expected a plan of one stage that selects by a threshold, found "
                + ", ".join(f"{type(s.select).__name__} at {s.at}" for s in self.stages)
            )
        stage = self.stages[0]
        assert isinstance(stage.select, Budget)
        given = replace(stage, score=None, select=replace(stage.select, threshold=0.5, group="picture"))
        return replace(self, stages=(given,))

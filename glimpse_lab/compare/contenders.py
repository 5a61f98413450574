# SPDX-License-Identifier: Apache-2.0
"""Who takes part: every plan at every budget that it can reach."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Any

from glimpse_lab.compare.control import at_random
from glimpse_runtime import plans
from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.plan import PrunePlan
from glimpse_runtime.plans.registry import entry
from glimpse_runtime.stages.places import Vision

UNPRUNED = "unpruned"
RANDOM = "random"
CASCADE = "divprune+glimpse"
SIGN = "cdpruner:sign=minus"
"""CDPruner's relevance as the original has it for CLIP; which sign suits a model is for a measurement to say."""

OPTIONS: dict[str, dict[str, Any]] = {
    "sparsevlm": {"fewer_heads": "all", "layers": (2 / 32, 6 / 32, 15 / 32)}
}
"""What methods need here beyond their defaults: the small model has 4 heads, SparseVLM+ picks 14; and 10 layers, where it drops behind
2, 6 and 15 of 32."""


@dataclass(frozen=True)
class Contender:
    """A method at a budget.

    Attributes:
        name: of the method, perhaps with options; two methods with a "+"; "random" or "unpruned".
        budget: share of the visual tokens, in (0, 1]; None: as many as it likes.
    """

    name: str
    budget: float | None
    plan: PrunePlan | None

    @property
    def key(self) -> tuple[str, float | None]:
        return self.name, self.budget


@dataclass(frozen=True)
class Missing:
    """A method that cannot have a budget, and why."""

    name: str
    budget: float
    why: str


def known() -> list[str]:
    """Names that `contenders` takes."""
    return [*plans.names(), SIGN, CASCADE, RANDOM]


def contenders(
    names: list[str], budgets: list[float], glimpse: PrunePlan, layers: int
) -> tuple[list[Contender], list[Missing]]:
    """The model without pruning and glimpse without a cap, then each method at each budget.

    Args:
        names: registered ones, also as ``NAME:option=value``; "random"; or ``NAME+glimpse`` for one that prunes before the decoder,
            at twice the budget, with glimpse behind it.
        glimpse: with the model's modules.
        layers: of the decoder.

    Raises:
        GlimpseError: a name that is not known, or cannot be put before glimpse.
    """
    found = [Contender(UNPRUNED, None, None), Contender("glimpse", None, capped(glimpse, None))]
    missing = []
    for name in names:
        _check(name)
        for budget in budgets:
            try:
                found.append(Contender(name, budget, _plan(name, budget, glimpse, layers)))
            except GlimpseError as error:
                missing.append(Missing(name, budget, _reason(error)))
    return found, missing


def capped(glimpse: PrunePlan, ratio: float | None) -> PrunePlan:
    """Glimpse that keeps at most this share of the tokens that come to it."""
    return glimpse.with_budget(max_remain_ratio=ratio)


def _check(name: str) -> None:
    first, plus, second = name.partition("+")
    method, *said = first.split(":")
    if name == RANDOM:
        return
    if (
        method not in plans.names()
        or (plus and second != "glimpse")
        or (method == "glimpse" and (plus or said))
    ):
        raise GlimpseError(
            f"plans: expected some of {', '.join(known())}, or another NAME:option=value or NAME+glimpse; found {name!r}"
        )
    if said:  # a slip in them is no reason of the method's
        scaled, options = entry(method).scale(method)(1.0), _options(first)
        if set(scaled) & set(options):
            raise GlimpseError(
                f"plans: expected no options that the budget decides, {', '.join(scaled)}; found {name!r}"
            )
        plans.make(method, **scaled, **options)


def _options(name: str) -> dict[str, Any]:
    """Of ``NAME:option=value:...``, with those that the method needs here."""
    method, *said = name.split(":")
    found = dict(OPTIONS.get(method, {}))
    for part in said:
        option, _, text = part.partition("=")
        try:
            found[option] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[option] = text
    return found


def _plan(name: str, budget: float, glimpse: PrunePlan, layers: int) -> PrunePlan:
    if name == "glimpse":
        return capped(glimpse, budget)
    if name == RANDOM:
        return at_random(budget)
    first, plus, _ = name.partition("+")
    if not plus:
        return plans.at_budget(name.split(":")[0], budget, layers, **_options(name))
    if budget > 0.5:
        raise GlimpseError("twice the budget is more than all tokens")
    before = plans.at_budget(first.split(":")[0], 2 * budget, layers, **_options(first))
    if not all(isinstance(stage.at, Vision) for stage in before.stages):
        raise GlimpseError(f"{first} prunes in the decoder, too, where glimpse evicts from all layers")
    return plans.cascade(before, capped(glimpse, 0.5))


def _reason(error: GlimpseError) -> str:
    """The message without what a table says already."""
    text = re.sub(r"^plan '[^']*': (budget: )?", "", " ".join(str(error).split()))
    return re.sub(r", found [0-9.e-]+$", "", text)

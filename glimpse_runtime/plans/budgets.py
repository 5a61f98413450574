# SPDX-License-Identifier: Apache-2.0
"""Methods at a common budget: which share of the visual tokens a plan leaves in the cache, and plans that leave a given one."""

from __future__ import annotations

from typing import Any

from glimpse_runtime.errors import GlimpseError, UnsupportedOptionError
from glimpse_runtime.plan import PrunePlan
from glimpse_runtime.plans.registry import entry, make
from glimpse_runtime.stages.places import Layer, Vision

LEAST = 1e-9
"""The smallest scale, and what two budgets may differ by."""


def kept_share(plan: PrunePlan, layers: int) -> float:
    """Mean over a decoder's layers of the share of visual tokens whose keys and values a prompt leaves in the cache.

    Of shares, before they are rounded to tokens: a picture of few tokens keeps at least one of them. FastV's "equivalent
    tokens" (arXiv:2403.06764) over the number of tokens is this.

    Args:
        layers: of the decoder.

    Raises:
        UnsupportedOptionError: scores, or the prompt, decide how many tokens stay.
        GlimpseError: no plan, no number of layers, or stages that cannot follow each other in a decoder of so many.
    """
    if not isinstance(plan, PrunePlan):
        raise GlimpseError(f"plan: expected a PrunePlan, found {plan!r}")
    if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
        raise GlimpseError(f"layers: expected the number of a decoder's layers, at least 1, found {layers!r}")
    cached, share = [1.0] * layers, 1.0
    for stage in plan.resolved(layers).stages:
        left = stage.select.left(share)
        if left is None:
            raise UnsupportedOptionError(
                f"plan {plan.name!r}: a kept share: expected a budget that is known beforehand at {stage.at}, found "
                f"{stage.select}"
            )
        share = left
        first = 0 if isinstance(stage.at, Vision) else int(stage.at.index) + isinstance(stage.at, Layer)
        if stage.evict_earlier:
            first = 0
        cached[first:] = [share] * (layers - first)
    return sum(cached) / layers


def at_budget(name: str, budget: float, layers: int, /, **options: Any) -> PrunePlan:
    """A registered method with the scale at which its `kept_share` is `budget`; shapes of schedules stay as published.

    Args:
        budget: in (0, 1].
        layers: of the decoder.
        options: other options of the method.

    Raises:
        GlimpseError: the method cannot keep so little, or so much, in this decoder.
    """
    real = isinstance(budget, (int, float)) and not isinstance(budget, bool)
    if not real or not 0.0 < budget <= 1.0:
        raise GlimpseError(f"budget: expected a share in (0, 1], found {budget!r}")
    scaled = entry(name).scale(name)
    taken = sorted(set(scaled(1.0)) & set(options))
    if taken:
        raise GlimpseError(
            f"plan {name!r}: options: expected none that the budget decides, found {', '.join(taken)}"
        )

    def plan_at(scale: float) -> PrunePlan:
        return make(name, **{**scaled(scale), **options})

    low, high = LEAST, 1.0
    least, most = (kept_share(plan_at(scale), layers) for scale in (low, high))
    if not least - LEAST <= budget <= most + LEAST:
        why = (
            "layers before its stages hold all tokens"
            if budget < least
            else "more than its schedule at its full"
        )
        raise GlimpseError(
            f"plan {name!r}: budget: expected a share from {least:.3f} to {most:.3f} in a decoder of {layers} layers "
            f"({why}), found {budget}"
        )
    while high - low > 1e-12:
        middle = (low + high) / 2
        if kept_share(plan_at(middle), layers) < budget:
            low = middle
        else:
            high = middle
    # Bisection ends beside a round number: 0.109999... of 100 tokens would be 10 of them.
    return plan_at(max(LEAST, round(high, 9)))

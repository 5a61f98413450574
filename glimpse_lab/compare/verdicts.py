# SPDX-License-Identifier: Apache-2.0
"""Who beats glimpse at the same budget, and whom it beats, by the numbers alone."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Literal

from glimpse_lab.compare.contenders import RANDOM
from glimpse_lab.compare.summary import Point, chance

Side = Literal["theirs", "glimpse's"]

CHANCE = 0.05
"""Differences that equally good methods show more often than that are marked."""


def budgets_of(summary: dict[str, Any]) -> list[float]:
    return sorted({point["budget"] for point in summary["points"] if point["budget"] is not None})


def point_of(summary: dict[str, Any], plan: str, budget: float | None) -> Point | None:
    return next((p for p in summary["points"] if p["plan"] == plan and p["budget"] == budget), None)


def plans_of(summary: dict[str, Any]) -> list[str]:
    """Methods that have points, or would, in the order in which they took part."""
    named = [p["plan"] for p in summary["points"] if p["budget"] is not None]
    return list(dict.fromkeys([*named, *(m["plan"] for m in summary["missing"])]))


def large_of(summary: dict[str, Any]) -> str | None:
    """The largest picture that was timed."""
    timed = {size for point in summary["points"] for size in point["times"]}
    return max(timed, key=lambda size: int(size.split("x")[0]), default=None)


def by_accuracy(own: Point, glimpse: Point) -> tuple[Side, bool] | None:
    """Whose answers are right more often, and whether that could be chance."""
    if own["right"] == glimpse["right"]:
        return None
    side: Side = "theirs" if own["right"] > glimpse["right"] else "glimpse's"
    return side, chance(own["better"], own["worse"]) >= CHANCE


def by_time(own: Point, glimpse: Point, size: str) -> tuple[Side, bool] | None:
    """Whose first token comes sooner, and whether the middle halves of the rounds overlap."""
    a, b = own["times"][size], glimpse["times"][size]
    if a["ratio"] == b["ratio"]:
        return None
    overlap = a["low"] <= b["high"] and b["low"] <= a["high"]
    return ("theirs" if a["ratio"] < b["ratio"] else "glimpse's"), overlap


def by_memory(own: Point, glimpse: Point) -> tuple[Side, bool] | None:
    """Whose tensors need less at their peak. Counted, not measured: there is no chance in it."""
    a, b = (max(p["memory"]["tower"], p["memory"]["behind"]) for p in (own, glimpse))
    return None if a == b else ("theirs" if a < b else "glimpse's", False)


def by_cache(own: Point, glimpse: Point) -> tuple[Side, bool] | None:
    """Whose keys and values are fewer."""
    a, b = (p["memory"]["kv"] for p in (own, glimpse))
    return None if a == b else ("theirs" if a < b else "glimpse's", False)


def verdicts(summary: dict[str, Any]) -> dict[str, dict[str, dict[Side, list[tuple[float, bool]]]]]:
    """For each method and axis ("answers", "time", "memory", "cache"): the budgets at which one or the other wins, each with whether
    that is within chance."""
    found: dict[str, dict[str, dict[Side, list[tuple[float, bool]]]]] = {}
    size = large_of(summary)
    for plan in plans_of(summary):
        if plan in ("glimpse", RANDOM):
            continue
        axes: dict[str, dict[Side, list[tuple[float, bool]]]] = defaultdict(
            lambda: {"theirs": [], "glimpse's": []}
        )
        for budget in budgets_of(summary):
            own, glimpse = point_of(summary, plan, budget), point_of(summary, "glimpse", budget)
            if own is None or glimpse is None:
                continue
            outcomes = {"answers": by_accuracy(own, glimpse)}
            if size is not None:
                outcomes["time"] = by_time(own, glimpse, size)
            if "memory" in own and "memory" in glimpse:
                outcomes |= {"memory": by_memory(own, glimpse), "cache": by_cache(own, glimpse)}
            for axis, outcome in outcomes.items():
                if outcome is not None:
                    axes[axis][outcome[0]].append((budget, outcome[1]))
        found[plan] = dict(axes)
    return found


def best(summary: dict[str, Any], budget: float) -> list[Point]:
    """The methods' points at a budget, most right answers first."""
    points = [p for p in summary["points"] if p["budget"] == budget and p["plan"] != RANDOM]
    return sorted(points, key=lambda p: (-p["right"], p["plan"]))


def slower_than_unpruned(summary: dict[str, Any], size: str) -> list[Point]:
    """Points of glimpse whose first token comes later than without any pruning, in the middle half of the rounds too."""
    own = [p for p in summary["points"] if p["plan"] == "glimpse"]
    return [p for p in own if p["times"][size]["low"] > 1.0]


def no_better_than_random(summary: dict[str, Any], budget: float) -> list[Point]:
    """Points of methods that give at most as many right answers as tokens at random."""
    control = point_of(summary, RANDOM, budget)
    return [] if control is None else [p for p in best(summary, budget) if p["right"] <= control["right"]]

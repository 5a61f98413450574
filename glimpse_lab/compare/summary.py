# SPDX-License-Identifier: Apache-2.0
"""From the records of a run to the numbers of the page: one point a contender."""

from __future__ import annotations

import math
from collections import defaultdict
from statistics import mean, median, quantiles
from typing import Any

from glimpse_lab.compare.contenders import UNPRUNED, Contender, Missing
from glimpse_lab.compare.store import Store

Point = dict[str, Any]


def summarise(
    store: Store,
    contenders: list[Contender],
    missing: list[Missing],
    pictures: set[tuple[str, int]],
    rounds: dict[str, list[dict[str, Any]]],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """What is known about each of the contenders.

    Args:
        pictures: size and number of those that count.
        rounds: of prefills, by the size of their picture; each begins with the unpruned model.
    """
    questions = {
        (r["size"], r["number"]): r["questions"]
        for r in store.of("questions")
        if (r["size"], r["number"]) in pictures
    }
    answers: dict[tuple[str, float | None], dict[tuple[str, int], dict[str, Any]]] = defaultdict(dict)
    for record in store.of("answers"):
        answers[record["plan"], record["budget"]][record["size"], record["number"]] = record
    memory = {(r["plan"], r["budget"]): r for r in store.of("memory")}
    times = {size: _times(records) for size, records in rounds.items() if records}
    points = []
    for contender in contenders:
        point: Point = {"plan": contender.name, "budget": contender.budget}
        budget = contender.budget
        own = {other.key for other in contenders}  # the store may hold those of other runs, too
        rival = ("glimpse", budget) if ("glimpse", budget) in own else ("glimpse", None)
        point |= _accuracy(questions, answers[contender.key], answers[UNPRUNED, None], answers[rival])
        point["times"] = {size: found[contender.key] for size, found in times.items()}
        if contender.key in memory:
            record = memory[contender.key]
            point["memory"] = {name: record[name] for name in ("size", "kv", "tower", "behind")}
        points.append(point)
    runs = [run[2:] for records in rounds.values() for record in records for run in record["runs"]]
    return {
        "settings": settings,
        "questions": sum(len(asked) for asked in questions.values()),
        "pictures": len(questions),
        "core": round(sum(core for _, core in runs) / sum(wall for wall, _ in runs), 3) if runs else None,
        "points": points,
        "missing": [{"plan": m.name, "budget": m.budget, "why": m.why} for m in missing],
    }


def _accuracy(questions: Any, own: Any, unpruned: Any, rival: Any) -> Point:
    """Right answers, those equal to the unpruned model's, and who is right where the other is not."""
    right = agree = better = worse = total = 0
    kept: list[float] = []
    tasks: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    sizes: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for picture, asked in questions.items():
        kept += own[picture]["kept"]
        answered = own[picture]["answers"], unpruned[picture]["answers"], rival[picture]["answers"]
        for question, answer, whole, other in zip(asked, *answered, strict=True):
            is_right, other_right = answer == question["answer"], other == question["answer"]
            total += 1
            right += is_right
            agree += answer == whole
            better += is_right and not other_right
            worse += other_right and not is_right
            for group in (tasks[question["task"]], sizes[picture[0]]):
                group[0] += is_right
                group[1] += 1
    return {
        "questions": total, "right": right, "agree": agree, "kept": round(mean(kept), 5), "better": better,
        "worse": worse, "tasks": dict(tasks), "sizes": dict(sizes),
    }  # fmt: skip


def _times(records: list[dict[str, Any]]) -> dict[tuple[str, float | None], dict[str, float]]:
    """Median seconds by the wall and of the core; median and quartiles of the core's time for one second of the unpruned model's,
    the mean of its runs right before and right behind."""
    walls, cores, ratios = defaultdict(list), defaultdict(list), defaultdict(list)
    for record in records:
        runs = record["runs"]
        paces = [at for at, run in enumerate(runs) if run[0] == UNPRUNED]
        for at, (name, budget, wall, core) in enumerate(runs):
            walls[name, budget].append(wall)
            cores[name, budget].append(core)
            around = [max(p for p in paces if p <= at), min((p for p in paces if p >= at), default=paces[-1])]
            ratios[name, budget].append(core / mean(runs[p][3] for p in around))
    found = {}
    for key, own in ratios.items():
        low, _, high = quantiles(own, n=4, method="inclusive") if len(own) > 1 else (own[0],) * 3
        found[key] = {
            "wall": round(median(walls[key]), 4),
            "core": round(median(cores[key]), 4),
            "ratio": round(median(own), 4),
            "low": round(low, 4),
            "high": round(high, 4),
        }
    return found


def interval(right: int, total: int) -> tuple[float, float]:
    """Bounds of a share at 95 %, by Wilson's score (Wilson 1927, JASA 22)."""
    z, share = 1.959964, right / total
    middle = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    whole = 1 + z * z / total
    return max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole)


def chance(better: int, worse: int) -> float:
    """How likely two equally good contenders differ by as much, or more, on the questions that one of them alone got right: the
    exact sign test, two-sided."""
    n = better + worse
    tail = sum(math.comb(n, i) for i in range(min(better, worse) + 1)) / 2**n
    return min(1.0, 2 * tail)

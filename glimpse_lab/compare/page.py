# SPDX-License-Identifier: Apache-2.0
"""The generated part of ``docs/methods.md``: Markdown from a summary, nothing by hand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glimpse_lab.compare.contenders import RANDOM, UNPRUNED
from glimpse_lab.compare.summary import Point, interval
from glimpse_lab.compare.verdicts import (
    best,
    budgets_of,
    large_of,
    no_better_than_random,
    plans_of,
    point_of,
    slower_than_unpruned,
    verdicts,
)
from glimpse_lab.world import TASKS
from glimpse_runtime.errors import GlimpseError

BEGIN = "<!-- begin: written by glimpse compare -->"
END = "<!-- end: written by glimpse compare -->"

Cell = Callable[[Point], str]


def percent(budget: float | None) -> str:
    return "no cap" if budget is None else f"{100 * budget:g} %"


def generated(summary: dict[str, Any], picture: str = "images/methods.svg") -> str:
    """All of it, without the markers.

    Args:
        picture: where the plot is, from the page.
    """
    parts = [_how(summary), f"![Accuracy and agreement against what each method needs]({picture})"]
    accuracy: Cell = lambda p: f"{100 * p['right'] / p['questions']:.1f} ({100 * p['kept']:.1f})"  # noqa: E731
    parts += ["#### Right answers", _right(summary), _by_budget(summary, accuracy), _footnotes(summary)]
    parts += ["#### Most right answers at each budget", _best(summary)]
    if "glimpse" in plans_of(summary):
        parts += ["#### Against glimpse", _against(summary)]
    agreement: Cell = lambda p: f"{100 * p['agree'] / p['questions']:.1f}"  # noqa: E731
    parts += ["#### Loyalty", "Answers that are the unpruned model's, right or wrong, in percent."]
    parts += [_by_budget(summary, agreement)]
    shown = _shown(summary)
    if shown is not None:
        parts += [
            f"#### By question, at {percent(shown)}",
            "Right answers in percent.",
            _by_task(summary, shown),
        ]
    small = budgets_of(summary)[:2][-1]
    parts += [
        f"#### By size of the picture, at {percent(small)}",
        "Right answers in percent.",
        _by_size(summary, small),
    ]
    parts += _timed(summary)
    parts += _weighed(summary)
    return "\n\n".join(part for part in parts if part)


def _how(summary: dict[str, Any]) -> str:
    s = summary["settings"]
    widest = max(
        (high - low) / 2 for p in summary["points"] for low, high in [interval(p["right"], p["questions"])]
    )
    return (
        f"`{s['command']}`: {summary['questions']} questions about {summary['pictures']} held-out pictures of "
        f"{len(s['sizes'])} sizes, {s['dtype']}, greedy, torch {s['torch']} ({s['cpu']}). Half the width of a 95 % interval is at most "
        f"{100 * widest:.1f} points; all methods answer the same questions, so differences between them are surer than that."
    )


def _right(summary: dict[str, Any]) -> str:
    return (
        "In percent, letter for letter, by budget; in brackets the share of visual tokens whose keys and values were in the cache, in "
        "percent, counted there."
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _by_budget(summary: dict[str, Any], cell: Cell) -> str:
    """Methods by budgets, and what has none below."""
    budgets = budgets_of(summary)
    rows = []
    for plan in plans_of(summary):
        points = [point_of(summary, plan, budget) for budget in budgets]
        rows.append([f"`{plan}`", *("–" if p is None else cell(p) for p in points)])
    for plan, name in (("glimpse", "`glimpse`, no cap"), (UNPRUNED, "unpruned")):
        found = point_of(summary, plan, None)
        if found is not None:
            rows.append([name, cell(found), *[""] * (len(budgets) - 1)])
    return _table(["", *map(percent, budgets)], rows)


def _footnotes(summary: dict[str, Any]) -> str:
    why: dict[tuple[str, str], list[str]] = defaultdict(list)
    for m in summary["missing"]:
        why[m["plan"], m["why"]].append(percent(m["budget"]))
    return "\n".join(
        f"- `{plan}` has no point at {', '.join(at)}: {reason}." for (plan, reason), at in why.items()
    )


def _best(summary: dict[str, Any]) -> str:
    lines = []
    for budget in budgets_of(summary):
        said = [f"`{p['plan']}` {100 * p['right'] / p['questions']:.1f}" for p in best(summary, budget)[:4]]
        line = f"- {percent(budget)}: {', '.join(said)}"
        blind = [f"`{p['plan']}`" for p in no_better_than_random(summary, budget)]
        if blind:
            share = point_of(summary, RANDOM, budget)
            assert share is not None
            line += f"; no better than {100 * share['right'] / share['questions']:.1f} at random: {', '.join(blind)}"
        lines.append(line)
    return "\n".join(lines)


def _against(summary: dict[str, Any]) -> str:
    size, axes = large_of(summary), ["answers", "time", "memory", "cache"]
    found = verdicts(summary)
    axes = [axis for axis in axes if any(axis in own for own in found.values())]
    names = {
        "answers": "more right answers",
        "time": f"sooner first token, {size}",
        "memory": "lower peak of memory",
        "cache": "smaller cache",
    }
    text = (
        "Budgets at which the method is ahead of `glimpse` at the same budget, and at which `glimpse` is ahead of it. In brackets: the "
        "difference could be chance (answers: exact sign test over the questions that one of the two alone got right, p ≥ 0.05; "
        "time: the middle halves of the rounds overlap)."
    )
    tables = []
    for side, title in (("theirs", "The method is ahead"), ("glimpse's", "`glimpse` is ahead")):
        rows = []
        for plan, own in found.items():
            cells = [
                ", ".join(_marked(*where) for where in own.get(axis, {}).get(side, [])) or "–"  # type: ignore[call-overload]
                for axis in axes
            ]
            rows.append([f"`{plan}`", *cells])
        tables.append(_table([title, *(names[axis] for axis in axes)], rows))
    return "\n\n".join([text, *tables])


def _marked(budget: float, could_be_chance: bool) -> str:
    return f"({percent(budget)})" if could_be_chance else percent(budget)


def _shown(summary: dict[str, Any]) -> float | None:
    """The smallest budget that all methods reach."""
    return next(
        (b for b in budgets_of(summary) if all(point_of(summary, plan, b) for plan in plans_of(summary))),
        None,
    )


def _by_task(summary: dict[str, Any], budget: float) -> str:
    tasks = [task for task in TASKS if task in summary["points"][0]["tasks"]]
    rows = []
    for plan, at, name in (
        *((plan, budget, f"`{plan}`") for plan in plans_of(summary)),
        (UNPRUNED, None, "unpruned"),
    ):
        point = point_of(summary, plan, at)
        if point is not None:
            shares = (point["tasks"][task] for task in tasks)
            rows.append([name, *(f"{100 * right / total:.0f}" for right, total in shares)])
    return _table(["", *tasks], rows)


def _tokens(size: str) -> int:
    height, width = map(int, size.split("x"))
    return height // 28 * (width // 28)


def _by_size(summary: dict[str, Any], budget: float) -> str:
    """Sizes in three groups, by their visual tokens."""
    known = sorted({_tokens(size) for size in summary["points"][0]["sizes"]})
    groups = [[n for n in known if low <= n < high] for low, high in ((0, 90), (90, 180), (180, 1 << 30))]
    groups = [group for group in groups if group]
    head = [
        f"{group[0]} to {group[-1]} tokens" if len(group) > 1 else f"{group[0]} tokens" for group in groups
    ]
    rows = []
    for plan, at, name in (
        *((plan, budget, f"`{plan}`") for plan in plans_of(summary)),
        (UNPRUNED, None, "unpruned"),
    ):
        point = point_of(summary, plan, at)
        cells = []
        for group in groups:
            own = [] if point is None else [c for size, c in point["sizes"].items() if _tokens(size) in group]
            asked = sum(total for _, total in own)
            cells.append(f"{100 * sum(right for right, _ in own) / asked:.1f}" if asked else "–")
        rows.append([name, *cells])
    return _table(["", *head], rows)


def _timed(summary: dict[str, Any]) -> list[str]:
    sizes = sorted(
        {size for p in summary["points"] for size in p["times"]}, key=lambda s: int(s.split("x")[0])
    )
    if not sizes:
        return []
    s, whole = summary["settings"], point_of(summary, UNPRUNED, None)
    assert whole is not None
    rounds = "one round" if s["rounds"] == 1 else f"{s['rounds']} rounds"
    parts = [
        "#### Time to the first token",
        f"Median of {rounds}, one thread, one prompt with one picture, vision tower included, the picture's preparation "
        "not; all methods take turns within a round, in an order of its own. Time of the core: on one thread a prefill waits for "
        "nothing, so on an idle machine that is what a clock shows. Unpruned = 1, by its runs nearest before and behind. The process had "
        f"{100 * summary['core']:.0f} % of its core while it was timed"
        + (
            "."
            if summary["core"] > 0.95
            else ": the machine was busy, and differences of some percent mean nothing."
        ),
    ]
    for size in sizes:
        title = (
            f"{size} ({_tokens(size)} visual tokens), unpruned {1000 * whole['times'][size]['core']:.0f} ms"
        )
        ratio: Cell = lambda p, at=size: f"{p['times'][at]['ratio']:.2f}"  # type: ignore[misc]  # noqa: E731
        parts += [title + ":", _by_budget(summary, ratio)]
        late = slower_than_unpruned(summary, size)
        if late:
            at = ", ".join(percent(p["budget"]) for p in late)
            parts.append(f"At {size} `glimpse` is slower than no pruning at all: {at}.")
    return parts


def _weighed(summary: dict[str, Any]) -> list[str]:
    weighed = [p for p in summary["points"] if "memory" in p]
    if not weighed:
        return []

    def mib(name: str) -> Cell:
        return lambda p: f"{p['memory'][name] / 2**20:.2f}"

    size = weighed[0]["memory"]["size"]
    parts = [
        "#### Memory",
        f"One prompt with one picture of {size}, MiB, weights and the picture's patches left out. Keys and values of the prompt, text "
        "included:",
        _by_budget(summary, mib("kv")),
    ]
    for name, said in (
        ("tower", "while the vision tower runs"),
        ("behind", "from its end to the first token"),
    ):
        parts += [f"The most that tensors hold at one moment {said}:", _by_budget(summary, mib(name))]
    return parts


def write_into(page: Path, text: str) -> None:
    """Put `text` between the markers of a page.

    Raises:
        GlimpseError: the page is not there, or does not have each marker once.
    """
    if not page.is_file():
        raise GlimpseError(
            f"--markdown: expected a page with the lines {BEGIN!r} and {END!r}, found no file {page}"
        )
    old = page.read_text(encoding="utf-8")
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
        raise GlimpseError(f"--markdown: expected the lines {BEGIN!r} and {END!r} once each in {page}")
    head, tail = old[: old.index(BEGIN)], old[old.index(END) :]
    page.write_text(f"{head}{BEGIN}\n\n{text}\n\n{tail}", encoding="utf-8")


def part_of(page: str) -> str:
    """What is between the markers."""
    return page[page.index(BEGIN) + len(BEGIN) : page.index(END)].strip()

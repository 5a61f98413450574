# SPDX-License-Identifier: Apache-2.0
"""Plots of a summary: accuracy and agreement against what each method needs."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glimpse_lab.compare.contenders import RANDOM, UNPRUNED
from glimpse_lab.compare.summary import Point, interval
from glimpse_lab.compare.verdicts import budgets_of, plans_of, point_of
from glimpse_runtime.errors import GlimpseError

Value = Callable[[Point], float]

_COLOURS = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf", "#393b79", "#637939", "#ad494a",
)  # fmt: skip
_MARKERS = "osD^v<>pPXhd"
_KEPT = "visual tokens in the cache, %"
_GLIMPSE, _WHOLE = "#d62728", "#555555"


def check_matplotlib() -> None:
    """Raises GlimpseError: matplotlib is not there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise GlimpseError(
            "plots: expected matplotlib (pip install 'glimpse-engine[compare]'), found none"
        ) from error


def _accuracy(point: Point) -> float:
    return 100 * point["right"] / point["questions"]


def _agreement(point: Point) -> float:
    return 100 * point["agree"] / point["questions"]


def _peak(point: Point) -> float:
    return max(point["memory"]["tower"], point["memory"]["behind"]) / 2**20


def _panels(summary: dict[str, Any]) -> list[tuple[str, str, Value, Value]]:
    """Of each its axes' names, and their values."""
    kept: Value = lambda p: 100 * p["kept"]  # noqa: E731
    right, same = "right answers, %", "same answer as unpruned, %"
    found = [
        (_KEPT, right, kept, _accuracy),
        (_KEPT, same, kept, _agreement),
    ]
    sizes = sorted({s for p in summary["points"] for s in p["times"]}, key=lambda s: int(s.split("x")[0]))
    for size in sizes:
        ratio: Value = lambda p, at=size: p["times"][at]["ratio"]  # type: ignore[misc]  # noqa: E731
        found.append((f"time to the first token at {size}, unpruned = 1", right, ratio, _accuracy))
    if all("memory" in p for p in summary["points"]):
        size = summary["points"][0]["memory"]["size"]
        behind: Value = lambda p: p["memory"]["behind"] / 2**20  # noqa: E731
        found.append((f"peak memory of the prefill at {size}, MiB", right, _peak, _accuracy))
        found.append((f"peak memory behind the tower at {size}, MiB", right, behind, _accuracy))
    return found


def draw(summary: dict[str, Any], *files: Path) -> None:
    """Write the figure into each of the files; their endings say how."""
    check_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = _panels(summary)
    columns = 2
    rows = -(-len(panels) // columns)
    # Letters stay letters, and the same numbers give the same file.
    settings = {"svg.fonttype": "none", "svg.hashsalt": "glimpse", "font.size": 9, "path.simplify": True}
    with rc_context(settings):
        figure = Figure(figsize=(10, 3.4 * rows + 0.9), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            _draw_panel(axes, summary, panel)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        handles, labels = grid.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".svg":
                figure.savefig(file, metadata={"Date": None}, facecolor="white")
            else:
                _save_small(figure, file)


def _save_small(figure: Any, file: Path) -> None:
    """As PNG with few colours, a third of the bytes."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110, metadata={"Software": None}, facecolor="white")
    Image.open(drawn).convert("RGB").quantize(96).save(file, optimize=True)


def _is_kept(across: str) -> bool:
    """Whether that axis counts tokens. One panel with intervals is enough, and there they hide least."""
    return across == _KEPT


def _style(plan: str, number: int) -> tuple[str, dict[str, Any]]:
    """Colour, and what else a line has."""
    if plan == "glimpse":
        return _GLIMPSE, {"marker": "*", "markersize": 9, "linewidth": 2, "zorder": 4}
    if plan == RANDOM:
        return "#999999", {"marker": ".", "markersize": 4, "linewidth": 1, "linestyle": ":", "zorder": 2}
    marker = _MARKERS[number % len(_MARKERS)]
    return _COLOURS[number % len(_COLOURS)], {
        "marker": marker,
        "markersize": 4.5,
        "linewidth": 1,
        "zorder": 3,
    }


def _draw_panel(axes: Any, summary: dict[str, Any], panel: tuple[str, str, Value, Value]) -> None:
    across, up, x, y = panel
    others = [plan for plan in plans_of(summary) if plan not in ("glimpse", RANDOM)]
    budgets = budgets_of(summary)
    for number, plan in enumerate([RANDOM, *others, "glimpse"]):
        points = [p for p in (point_of(summary, plan, b) for b in budgets) if p is not None]
        if not points:
            continue
        colour, style = _style(plan, number)
        axes.plot(
            [x(p) for p in points], [y(p) for p in points], color=colour, label=plan, alpha=0.9, **style
        )
        if y is _accuracy and plan != RANDOM and _is_kept(across):
            for p in points:
                low, high = interval(p["right"], p["questions"])
                axes.vlines(x(p), 100 * low, 100 * high, color=colour, linewidth=0.8, alpha=0.35, zorder=2)
    free, whole = point_of(summary, "glimpse", None), point_of(summary, UNPRUNED, None)
    if free is not None:
        axes.axhline(y(free), color=_GLIMPSE, linewidth=0.8, linestyle=":", label="glimpse, no cap", zorder=1)
    if whole is not None:
        axes.axhline(y(whole), color=_WHOLE, linewidth=0.8, linestyle="--", label=UNPRUNED, zorder=1)
        if _is_kept(across):
            axes.set_xlim(0, None)
        else:
            axes.axvline(x(whole), color=_WHOLE, linewidth=0.8, linestyle="--", zorder=1)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.set_ylim(-2, 102)
    axes.grid(linewidth=0.4, alpha=0.5)

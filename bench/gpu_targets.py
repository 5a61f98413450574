# SPDX-License-Identifier: Apache-2.0
"""What the kernels are to reach on an H200 in bf16, and how far a run got.

The rows named here are those of `bench.op_cases_gpu` and its neighbours at 7b sizes; "4096 tokens" is a picture of 64 x 64
merged tokens, of 128 x 128 patches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MODEL = "7b"
PICTURE = "7b 64x64"  # `Sizes.name` of `bench.gpu_worker.TARGET_SHAPE`
PIXELS = "1792 px"
"""The same picture in rows that depend on nothing else."""
SHOWN = (MODEL, PICTURE, PIXELS)
FA2 = "FA2"
"""What the names of contenders begin with that are torch's own FlashAttention-2."""
LOOP = "loop of windows"

Rows = Mapping[tuple[str, str, str], Mapping[str, Any]]
CAUSAL = {
    1024: "causal, 1k tokens",
    2048: "causal, 2k tokens",
    4096: "causal, 4k tokens",
    8192: "causal, 8k tokens",
}
WINDOWS = "vision, windows, beside a loop"
FULL = "vision, full, 16k patches"
DECODE = "64 rows, 8k tokens each"
TOGETHER = "with compact"
SIXTEEN = "16 pictures"
ALL_STAY = "keys, values, hidden, all rows stay"
SMALL = "keys, values, hidden, 128 rows"
GATHERS = "beside boolean gathers"
BOOLEAN = "boolean gathers"
"""What the names of contenders begin with that index with a mask, as GlimpsePrune's own code does."""


@dataclass(frozen=True)
class Target:
    """asked: in words, with the unit. limit: the number; at_least: whether more is better. look: the figure in a run's rows and
    ceilings; raises KeyError where it was not measured."""

    name: str
    limit: float
    at_least: bool
    unit: str
    look: Callable[[Rows, Mapping[str, Any]], float]

    @property
    def asked(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g} {self.unit}"

    def met(self, found: float) -> bool:
        return found >= self.limit if self.at_least else found <= self.limit

    def judged(self, rows: Mapping[Any, Mapping[str, Any]], ceilings: Mapping[str, Any]) -> dict[str, Any]:
        """asked, measured and met; measured None where the run has no figure."""
        measured: float | None
        try:
            measured = self.look(rows, ceilings)
        except (KeyError, StopIteration, ZeroDivisionError, TypeError):
            measured = None
        met = None if measured is None else self.met(measured)
        return {"name": self.name, "asked": self.asked, "measured": measured, "unit": self.unit, "met": met}


def _over(row: Mapping[str, Any], prefix: str) -> float:
    """How many times as fast as the fastest contender whose name begins so."""
    times = [c["s"] for name, c in row["contenders"].items() if name.startswith(prefix)]
    if not times:
        raise KeyError(prefix)
    return float(min(times) / row["ours_s"])


def _causal(what: str) -> Callable[[Rows, Mapping[str, Any]], float]:
    return lambda rows, ceilings: _over(rows["attention", what, MODEL], FA2)


def _received(rows: Rows, ceilings: Mapping[str, Any]) -> float:
    """Over the faster of our forward and torch's."""
    flash = rows["attention", FULL, MODEL]
    times = [c["s"] for name, c in flash["contenders"].items() if name.startswith(FA2)]
    ours = next(
        row["ours_s"]
        for (op, what, shape), row in rows.items()
        if op == "received_attention" and shape in (PICTURE, MODEL) and ("full" in what or "16k" in what)
    )
    return float(ours / min([flash["ours_s"], *times]))


TARGETS: tuple[Target, ...] = (
    *(
        Target(f"attention, causal, {n // 1024}k tokens, over torch's FA2", 1.2, True, "x", _causal(what))
        for n, what in CAUSAL.items()
    ),
    Target(
        "attention, causal, 4k tokens", 420, True, "TFLOP/s",
        lambda rows, _: rows["attention", CAUSAL[4096], MODEL]["rate"] / 1e12,
    ),
    Target(
        "attention, vision windows, 16k patches, over a loop of windows", 2, True, "x",
        lambda rows, _: _over(rows["attention", WINDOWS, MODEL], LOOP),
    ),
    Target("received_attention, 16k patches, in flash forwards", 1.5, False, "forwards", _received),
    Target(
        "decode_attention, 64 rows of 8k tokens, of copy bandwidth", 85, True, "%",
        lambda rows, c: 100 * rows["decode_attention", DECODE, MODEL]["rate"] / c["copy_bytes_s"],
    ),
    Target(
        "select_tokens + compact, 4096 tokens, 19 layers", 25, False, "us",
        lambda rows, _: 1e6 * rows["select_tokens", TOGETHER, PICTURE]["ours_s"],
    ),
    Target(
        "select_tokens, 16 pictures of 4096 tokens", 10, False, "us",
        lambda rows, _: 1e6 * rows["select_tokens", SIXTEEN, PIXELS]["ours_s"],
    ),
    Target(
        "compact, all of 4157 rows, 19 layers, of copy bandwidth", 70, True, "%",
        lambda rows, c: 100 * rows["compact", ALL_STAY, PICTURE]["rate"] / c["copy_bytes_s"],
    ),
    Target(
        "compact, 128 rows, 19 layers", 10, False, "us",
        lambda rows, _: 1e6 * rows["compact", SMALL, MODEL]["ours_s"],
    ),
    Target(
        "compact, 19 layers, over boolean gathers", 20, True, "x",
        lambda rows, _: _over(rows["compact", GATHERS, PICTURE], BOOLEAN),
    ),
    Target(
        "vip, 4096 tokens", 0.6, False, "ms",
        lambda rows, _: 1e3 * rows["vip", "1 picture", PICTURE]["ours_s"],
    ),
)  # fmt: skip


def check(rows: Sequence[Mapping[str, Any]], ceilings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every target, see `Target.judged`."""
    by_name = {
        (r["op"], r["case"], r["shape"]): r
        for r in rows
        if "op" in r and not r.get("fault") and "ours_s" in r
    }
    return [target.judged(by_name, ceilings) for target in TARGETS]


def figure(target: Mapping[str, Any]) -> str:
    return "not measured" if target["measured"] is None else f"{target['measured']:.3g} {target['unit']}"

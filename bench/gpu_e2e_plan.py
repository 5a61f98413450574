# SPDX-License-Identifier: Apache-2.0
"""The rows of `bench.gpu_e2e`, those that matter most first; the last ones are the first to go where time is short."""

from __future__ import annotations

from bench.gpu_e2e_checks import LARGE, SMALL
from bench.gpu_e2e_contenders import ORIGINAL, OURS, STOCK
from bench.gpu_e2e_measure import Row
from bench.gpu_e2e_world import Scale

FEW, SOME = 0.074, 0.22
"""Shares of the visual tokens that stay."""


def rows(scale: Scale, quick: bool = False) -> list[Row]:
    """quick: the checks, and the rows behind the first targets."""
    small, middle, large = scale.tokens
    many = scale.batches[-1]
    found = [Row("check", name, seconds=30) for name in (*SMALL, *LARGE)]
    found += [
        asked(OURS, middle, FEW, seconds=25),
        asked(OURS, middle),
        asked(ORIGINAL, middle, FEW),
        asked(STOCK, middle, seconds=25),
    ]
    if quick:
        return found
    found += [
        several(middle, many, FEW, seconds=30),
        several(middle, many, seconds=35),
        room(middle, FEW),
        room(middle),
        asked(OURS, middle, SOME),
        asked(ORIGINAL, middle, SOME),
        asked(OURS, middle, FEW, by="threshold"),
        room(middle, FEW, how="pictures"),
        room(middle, how="pictures"),
        asked(OURS, small, FEW),
        asked(OURS, small),
        asked(ORIGINAL, small, FEW),
        asked(STOCK, small),
        asked(OURS, large, FEW, seconds=25),
        asked(OURS, large, seconds=25),
        asked(ORIGINAL, large, FEW, seconds=30),
        room(large, FEW),
        room(large),
        *(several(middle, n, share) for n in scale.batches[1:-1] for share in (FEW, None)),
        several(middle, many, SOME, seconds=30),
        Row("start", "warm-up of the runtime", tokens=middle, seconds=30),
        asked(ORIGINAL, middle, FEW, how="dense"),
        asked(OURS, small, SOME),
        asked(OURS, large, SOME, seconds=25),
        several(middle, scale.batches[1], contender=STOCK, seconds=25),
        Row("decode", f"{STOCK}, static cache, {middle} tokens", STOCK, middle, how="static", seconds=75),
        asked(STOCK, large, seconds=40),
    ]
    return found


def asked(
    contender: str,
    tokens: int,
    ratio: float | None = None,
    *,
    by: str = "cap",
    how: str = "",
    seconds: float = 18,
) -> Row:
    """A request with one picture."""
    words = [contender, f"{tokens} tokens", share(ratio)]
    words += [f"by {by}"] * (by != "cap") + [f"{how} mask in the vision tower"] * (how == "dense")
    return Row("request", ", ".join(words), contender, tokens, 1, ratio, by, how, seconds)


def several(
    tokens: int, batch: int, ratio: float | None = None, *, contender: str = OURS, seconds: float = 18
) -> Row:
    """Decoding of many rows."""
    name = f"{contender}, {batch} rows of {tokens} tokens, {share(ratio)}"
    return Row("batch", name, contender, tokens, batch, ratio, seconds=seconds)


def room(tokens: int, ratio: float | None = None, *, how: str = "") -> Row:
    """Memory of one prefill."""
    words = ["memory", f"{tokens} tokens" + (" in four pictures" if how == "pictures" else ""), share(ratio)]
    return Row("room", ", ".join(words), OURS, tokens, 1, ratio, how=how, seconds=10)


def share(ratio: float | None) -> str:
    return "unpruned" if ratio is None else f"{100 * ratio:.3g} % kept"

# SPDX-License-Identifier: Apache-2.0
"""The check before the clock: an op whose result is off gets no number."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.op_registry import Work

FP32_UNITS = 8
"""Units in the last place granted in fp32, where the definition itself carries that much rounding."""


@dataclass(frozen=True)
class Verdict:
    """Largest error of ours against the definition and what was allowed; `fault` says what is wrong, if anything."""

    error: float
    allowed: float
    fault: str = ""


def judge(work: Work) -> Verdict:
    """Compare `ours` with the definition.

    The rule is FlashAttention's: our error against the definition in fp32 is at most twice that of plain torch in the same
    dtype, plus one rounding of the largest value. Ops that only move or choose (tolerance 0) must be equal.
    """
    truths, plains = work.truth(), work.plain()
    try:
        found = work.ours()
    except Exception as error:  # whatever it is, the op gets no number and the others still do
        return Verdict(float("nan"), 0.0, f"{type(error).__name__}: {error}")
    if len(found) != len(truths):
        return Verdict(float("nan"), 0.0, f"{len(found)} results, expected {len(truths)}")
    worst = Verdict(0.0, 0.0)
    for i, (ours, plain, truth) in enumerate(zip(found, plains, truths, strict=True)):
        if ours.shape != truth.shape:
            return Verdict(
                float("nan"), 0.0, f"result {i}: shape {list(ours.shape)}, expected {list(truth.shape)}"
            )
        exact = truth.double()
        largest = exact.abs().max().item() if truth.numel() else 0.0
        error = _distance(ours, exact)
        if work.tolerance is not None:
            allowed = work.tolerance * largest
        else:
            unit = torch.finfo(plain.dtype).eps * largest
            granted = FP32_UNITS * unit if plain.dtype is torch.float32 else unit / 2
            allowed = 2 * _distance(plain, exact) + granted
        if not error <= allowed:  # NaN too
            return Verdict(error, allowed, f"result {i}: error {error:.2e}, allowed {allowed:.2e}")
        if error >= worst.error:
            worst = Verdict(error, allowed)
    return worst


def _distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    return (found.double() - exact).abs().max().item() if exact.numel() else 0.0

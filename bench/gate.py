# SPDX-License-Identifier: Apache-2.0
"""The check before the clock: an op whose result is off gets no number."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor

from bench.op_registry import Work

FP32_UNITS = 8
"""Units in the last place granted in fp32, where the definition itself carries that much rounding."""
PLAIN_UNITS = 32
"""Plain torch further than this from the definition computes something else, and would be no yardstick."""


@dataclass(frozen=True)
class Verdict:
    """Largest error of ours against the definition and what was allowed; `fault` says what is wrong, if anything."""

    error: float
    allowed: float
    fault: str = ""


def judge(work: Work, dtype: torch.dtype) -> Verdict:
    """Compare `ours` with the definition.

    The rule is FlashAttention's: our error against the definition in fp32 is at most twice that of plain torch in the same
    dtype, plus one rounding of the largest value. Ops that only move or choose (tolerance 0) must be equal.
    """
    truths, plains = work.truth(), work.plain()
    try:
        found = work.ours()
    except Exception as problem:  # whatever it is, this op gets no number and the others still do
        return Verdict(nan, 0.0, f"{type(problem).__name__}: {problem}")
    if len(found) != len(truths):
        return Verdict(nan, 0.0, f"{len(found)} results, expected {len(truths)}")
    worst = Verdict(0.0, 0.0)
    for i, (ours, plain, truth) in enumerate(zip(found, plains, truths, strict=True)):
        verdict = _judge_one(f"result {i}", ours, plain, truth, work.tolerance, torch.finfo(dtype).eps)
        if verdict.fault:
            return verdict
        if verdict.error >= worst.error:
            worst = verdict
    return worst


def _judge_one(
    name: str, ours: Tensor, plain: Tensor, truth: Tensor, tolerance: float | None, eps: float
) -> Verdict:
    if ours.shape != truth.shape:
        return Verdict(nan, 0.0, f"{name}: shape {list(ours.shape)}, expected {list(truth.shape)}")
    exact = truth.double()
    unit = eps * exact.abs().max().item() if truth.numel() else 0.0
    error = _distance(ours, exact)
    # Plain torch may give a different form of the same answer (a list of rows without its padding): then only ours counts.
    noise = _distance(plain, exact) if plain.shape == truth.shape else 0.0
    if not noise <= PLAIN_UNITS * unit:
        return Verdict(
            error, 0.0, f"{name}: plain torch is off by {noise:.2e}; the benchmark itself is wrong"
        )
    if tolerance is None:
        granted = FP32_UNITS * unit if eps == torch.finfo(torch.float32).eps else unit / 2
        allowed = 2 * noise + granted
    else:
        allowed = tolerance * unit / eps
    if not error <= allowed:  # a NaN fails too
        return Verdict(error, allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}")
    return Verdict(error, allowed)


def _distance(found: Tensor, exact: Tensor) -> float:
    return (found.double() - exact).abs().max().item() if exact.numel() else 0.0

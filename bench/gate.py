# SPDX-License-Identifier: Apache-2.0
"""The check before the clock: an op whose result is off gets no number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor

from bench.op_registry import Work

FP32_UNITS = 8
"""Units in the last place of the largest value granted in fp32, where the sums inside are as coarse as the result."""
PLAIN_UNITS = 32
"""Plain torch further than this from the definition computes something else, and would be no yardstick."""


@dataclass(frozen=True)
class Verdict:
    """Largest error of ours against the definition and what was allowed; `fault` says what is wrong, if anything."""

    error: float
    allowed: float
    fault: str = ""


class Gate:
    """What a result has to be, from one piece of work whose contenders nobody has called yet.

    The rule is FlashAttention's: our error against the definition in double precision is at most twice that of plain torch in
    the same dtype, plus one rounding of the largest value. Ops that only move or choose (tolerance 0) must be equal.

    dropped: given where not every formulation in plain torch has to work; takes the names of those that raise or are off,
    with the reason. The first that is left is the measure of rounding.
    """

    def __init__(self, work: Work, dtype: torch.dtype, dropped: dict[str, str] | None = None) -> None:
        self._eps, self._tolerance = torch.finfo(dtype).eps, work.tolerance
        with definitions_in_double():
            self._truths = work.truth()
        self._plains: tuple[Tensor, ...] | None = None
        self.fault = ""
        for name, call in work.contenders().items():
            try:
                results = call()
            except Exception as problem:
                if dropped is None:
                    raise
                dropped[name] = f"{type(problem).__name__}: {problem}"[:300]
                continue
            if name != work.plain_name and not _near(results, self._truths, self._eps):
                if dropped is None:
                    self.fault = f"plain torch ({name}) is off; the benchmark itself is wrong"
                    return
                dropped[name] = "its result is off"
            elif self._plains is None:
                self._plains = results
        if self._plains is None:
            self.fault = f"no formulation in plain torch works: {dropped}"

    def check(self, ours: Callable[[], tuple[Tensor, ...]]) -> Verdict:
        """ours: of the same work, or of one built anew from the same values."""
        if self.fault or self._plains is None:
            return Verdict(nan, 0.0, self.fault)
        try:
            found = ours()
        except Exception as problem:  # whatever it is, this op gets no number and the others still do
            return Verdict(nan, 0.0, f"{type(problem).__name__}: {problem}")
        if len(found) != len(self._truths):
            return Verdict(nan, 0.0, f"{len(found)} results, expected {len(self._truths)}")
        worst = Verdict(0.0, 0.0)
        for i, (mine, plain, truth) in enumerate(zip(found, self._plains, self._truths, strict=True)):
            verdict = _judge_one(f"result {i}", mine, plain, truth, self._tolerance, self._eps)
            if verdict.fault:
                return verdict
            if verdict.error >= worst.error:
                worst = verdict
        return worst


def judge(work: Work, dtype: torch.dtype, dropped: dict[str, str] | None = None) -> Verdict:
    """Compare `ours` with the definition; see `Gate`."""
    return Gate(work, dtype, dropped).check(work.ours)


def _near(found: tuple[Tensor, ...], truths: tuple[Tensor, ...], eps: float) -> bool:
    return all(
        _distance(got, wanted.double()) <= PLAIN_UNITS * _unit(wanted, eps)
        for got, wanted in zip(found, truths, strict=True)
    )


def _judge_one(
    name: str, ours: Tensor, plain: Tensor, truth: Tensor, tolerance: float | None, eps: float
) -> Verdict:
    if ours.shape != truth.shape:
        return Verdict(nan, 0.0, f"{name}: shape {list(ours.shape)}, expected {list(truth.shape)}")
    exact = truth.double()
    unit = _unit(truth, eps)
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


@contextmanager
def definitions_in_double() -> Iterator[None]:
    """Inside the block `Tensor.float()` gives doubles: the definitions, which compute in what it gives, become references for
    fp32 kernels too. Not thread-safe."""
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    try:
        yield
    finally:
        del torch.Tensor.float  # what the base class has shows again


def _unit(truth: Tensor, eps: float) -> float:
    """One unit in the last place of the largest value."""
    return eps * truth.double().abs().max().item() if truth.numel() else 0.0


def _distance(found: Tensor, exact: Tensor) -> float:
    return (found.double() - exact).abs().max().item() if exact.numel() else 0.0

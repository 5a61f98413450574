# SPDX-License-Identifier: Apache-2.0
"""What the machine itself can do at this moment: bytes read a second, FLOP/s of a matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import Clock, cache_bytes

GEMM = (2048, 1024, 4096)  # rows, inputs, outputs: a prefill product of the shape `mid`


@dataclass
class Ceilings:
    """The most this machine was seen to do: bytes read a second, and FLOP/s of a matrix product by dtype.

    forms: the rates of every formulation by name; the highest of a kind is the ceiling.
    """

    read: float
    gemm: dict[torch.dtype, float]
    forms: dict[str, float] = field(default_factory=dict)

    def better(self, other: Ceilings) -> Ceilings:
        """The higher of two looks (other work on the machine disturbs, nothing helps)."""
        gemm = {dtype: max(rate, other.gemm[dtype]) for dtype, rate in self.gemm.items()}
        forms = {name: max(rate, other.forms.get(name, rate)) for name, rate in self.forms.items()}
        return Ceilings(max(self.read, other.read), gemm, forms)


class Look:
    """Measures the ceilings with torch's threads, a fraction of a second a look; its buffers are made once.

    Reading: three reductions over a buffer eight times the last-level cache (at least 256 MiB). Products: torch's
    `F.linear`, and oneDNN with weights that were packed before, which is the best that torch can do.
    """

    def __init__(
        self, dtypes: list[torch.dtype], *, quick: bool = False, now: Clock = time.perf_counter
    ) -> None:
        self._now, self._repeats = now, 2 if quick else 4
        self._buffer = torch.ones((1 << 20 if quick else max(8 * cache_bytes(), 256 << 20)) // 4)
        rows, inputs, outputs = (n // 32 for n in GEMM) if quick else GEMM
        self._flops = 2.0 * rows * inputs * outputs
        self._operands = {
            dtype: (torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype))
            for dtype in dtypes
        }
        self._packed = {dtype: prepacked(w, x.shape[0]) for dtype, (x, w) in self._operands.items()}

    def __call__(self) -> Ceilings:
        buffer = self._buffer
        whole = buffer.view(torch.int64)
        forms = {
            "read: sum of int64": buffer.nbytes / self._shortest(whole.sum),
            "read: sum of fp32": buffer.nbytes / self._shortest(buffer.sum),
            "read: max of fp32": buffer.nbytes / self._shortest(buffer.amax),
        }
        read, gemm = max(forms.values()), {}
        for dtype, (x, w) in self._operands.items():
            name = "bf16" if dtype is torch.bfloat16 else "fp32"
            rates = {f"{name} product: F.linear": self._rate(lambda x=x, w=w: F.linear(x, w))}  # type: ignore[misc]
            packed = self._packed[dtype]
            if packed:
                rates[f"{name} product: oneDNN, packed before"] = self._rate(lambda x=x, p=packed: p(x))  # type: ignore[misc]
            gemm[dtype] = max(rates.values())
            forms |= rates
        return Ceilings(read, gemm, forms)

    def reading(self) -> float:
        """Bytes a second of the form that is usually the fastest, in some 20 ms."""
        whole = self._buffer.view(torch.int64)
        return self._buffer.nbytes / self._shortest(whole.sum, 2)

    def _rate(self, product: Callable[[], object]) -> float:
        return self._flops / self._shortest(product)

    def _shortest(self, function: Callable[[], object], repeats: int = 0) -> float:
        """Seconds of the quickest of a few calls, after one to warm up."""
        function()
        lasted = []
        for _ in range(repeats or self._repeats):
            began = self._now()
            function()
            lasted.append(self._now() - began)
        return min(lasted)


def prepacked(weight: Tensor, rows: int, bias: Tensor | None = None) -> Callable[[Tensor], Tensor] | None:
    """`F.linear` with oneDNN's own layout of the weights, as torch.compile uses it; None where torch has no such op."""
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    except (AttributeError, RuntimeError):
        return None
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

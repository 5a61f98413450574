# SPDX-License-Identifier: Apache-2.0
"""What the GPU itself can do: bytes moved by a large copy (read plus written), and FLOP/s of a large matrix product.

python -m bench.gpu_ceilings       prints them as JSON
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.gpu_facts import MOVING

COPY_BYTES = 2 << 30
GEMM = 8192
LOAD_SECONDS = 1.0


def _median(function: Callable[[], object], repeats: int, warm: int = 3) -> float:
    """Seconds a call between events, launches queued ahead. On a CPU, of the host's clock."""
    for _ in range(warm):
        function()
    if not torch.cuda.is_available():
        began = time.perf_counter()
        function()
        return time.perf_counter() - began
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        function()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)) * 1e-3


def copy_rate(size: int, device: str) -> float:
    source = torch.randint(0, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2.0 * size / _median(lambda: target.copy_(source), 20)


def gemm_rate(size: int, dtype: torch.dtype, device: str) -> float:
    """On random values: zeros run faster."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / _median(lambda: a @ b, 20)


def clocks_under_load() -> dict[str, str]:
    """What nvidia-smi says while products are running."""
    a = torch.randn(4096, 4096, device="cuda").bfloat16()
    query = ["nvidia-smi", f"--query-gpu={','.join(MOVING)}", "--format=csv,noheader,nounits"]
    began = time.perf_counter()
    for _ in range(2000):
        a @ a
    process = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
    while process.poll() is None and time.perf_counter() - began < 10 * LOAD_SECONDS:
        for _ in range(200):
            a @ a
        torch.cuda.synchronize()
    text = process.communicate(timeout=10)[0].strip()
    torch.cuda.synchronize()
    return (
        dict(zip(MOVING, (v.strip() for v in text.splitlines()[0].split(",")), strict=True)) if text else {}
    )


def measure() -> dict[str, Any]:
    """Each figure by itself: one that fails leaves its reason behind."""
    on_gpu = torch.cuda.is_available()
    device, size, edge = ("cuda", COPY_BYTES, GEMM) if on_gpu else ("cpu", 1 << 20, 128)
    looks: dict[str, Callable[[], Any]] = {
        "copy_bytes_s": lambda: copy_rate(size, device),
        "gemm_flop_s": lambda: {
            "bf16": gemm_rate(edge, torch.bfloat16, device),
            "fp32": gemm_rate(edge // 2, torch.float32, device),
        },
    }
    if on_gpu:
        looks["clocks_under_load"] = clocks_under_load
    found: dict[str, Any] = {"copy_bytes": size, "gemm_edge": edge}
    for name, look in looks.items():
        try:
            with torch.inference_mode():
                found[name] = look()
        except Exception as problem:
            found.setdefault("problems", []).append(f"{name}: {type(problem).__name__}: {problem}"[:300])
    return found


def of(ceilings: dict[str, Any], unit: str, dtype: str) -> float | None:
    """The ceiling of a row in its unit a second; None where it was not measured."""
    if unit == "byte":
        return ceilings.get("copy_bytes_s")
    rates = ceilings.get("gemm_flop_s") or {}
    return rates.get("fp32" if dtype == "fp32" else "bf16")


if __name__ == "__main__":
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("bench.gpu_ceilings: no CUDA device")
    print(json.dumps(measure()))

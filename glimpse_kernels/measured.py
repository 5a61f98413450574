# SPDX-License-Identifier: Apache-2.0
"""What was measured on GPUs: the record by which `dispatch` takes one of several kernels, and `attention` a library's.

``measured.json`` holds seconds by the name of a GPU, the op, the kind of call and the provider (a backend, or a library behind
a module of the op). ``python -m bench.choices`` writes it on a GPU, after it has held every provider against the definition.

A kind of call is a dtype and sizes in powers of two (`kind`). The sizes are the op's own numbers, from shapes and capacities
alone: nothing is read from the device, and a choice captured in a CUDA graph stays right for every replay.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch

RECORD = Path(__file__).with_name("measured.json")

Times = Mapping[str, float]
"""Seconds of a call by provider."""


@lru_cache(maxsize=1)
def record() -> Mapping[str, Mapping[str, Mapping[str, Times]]]:
    """GPU -> op -> kind of call -> provider -> seconds."""
    found: dict[str, dict[str, dict[str, Times]]] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def of(gpu: str, op: str) -> Mapping[str, Times]:
    """Kind of call -> provider -> seconds; empty where nothing was measured."""
    return record().get(gpu, {}).get(op, {})


def write(found: Mapping[str, Mapping[str, Mapping[str, Times]]], path: Path | None = None) -> None:
    """Replace the record. Choices that were made before stay as they are in this process."""
    text = json.dumps(found, indent=1, sort_keys=True) + "\n"
    (path or RECORD).write_text(text, encoding="utf-8")
    record.cache_clear()


@lru_cache(maxsize=64)
def _name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def gpu(index: int | None = None) -> str:
    """Name of a GPU, of the current one if None; empty where there is none."""
    if not torch.cuda.is_available():
        return ""
    return _name(torch.cuda.current_device() if index is None else index)


def bucket(length: float) -> int:
    """The nearest power of two by ratio, at least 1: 90 is 64, 91 is 128."""
    return 1 << (max(0, math.frexp(length * length)[1]) >> 1)


def buckets(size: Sequence[int]) -> tuple[int, ...]:
    """`bucket` of each; for keys of a cache."""
    return tuple([1 << ((n * n).bit_length() >> 1) for n in size])


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def kind(dtype: torch.dtype, size: Sequence[int]) -> str:
    """What measurements of a call are kept by: "bfloat16 16x4096"."""
    return f"{dtype_name(dtype)} {'x'.join(str(n) for n in buckets(size))}"


def _parsed(name: str) -> tuple[str, tuple[int, ...]]:
    """dtype and sizes of a `kind`; no sizes for the kinds that an op names in its own way (`attention`)."""
    dtype, _, sizes = name.partition(" ")
    parts = sizes.split("x")
    return dtype, tuple(int(n) for n in parts) if all(n.isdigit() for n in parts) else ()


def order(name: str) -> tuple[str, tuple[int, ...], str]:
    """To sort kinds by: dtype, sizes, then whatever the op calls them."""
    return *_parsed(name), name


def nearest(gpu: str, op: str, dtype: torch.dtype, size: Sequence[int], among: Sequence[str]) -> str:
    """The measured kind that says most about a call, one where some provider of `among` was timed; empty if there is none.

    The distance is the sum of |log2| of the ratios of the sizes; of equally near kinds the smaller one, by the product of its
    sizes. The dtype itself goes before others: an op that only moves bytes, or waits for latency, is alike in all of them.
    Kinds with another number of sizes are calls of another sort, and tell nothing.
    """
    wanted, name = buckets(size), dtype_name(dtype)
    best: tuple[tuple[bool, float, int, tuple[int, ...], str], str] | None = None
    for candidate, times in of(gpu, op).items():
        measured_dtype, sizes = _parsed(candidate)
        if len(sizes) != len(wanted) or not sizes or not any(p in times for p in among):
            continue
        far = sum(abs(math.log2(a / b)) for a, b in zip(sizes, wanted, strict=True))
        rank = (measured_dtype != name, far, math.prod(sizes), sizes, measured_dtype)
        if best is None or rank < best[0]:
            best = rank, candidate
    return best[1] if best else ""


def ranking(
    gpu: str, op: str, dtype: torch.dtype, size: Sequence[int], among: Sequence[str]
) -> dict[str, str]:
    """The providers of `among` that were timed on the nearest kind of call, the fastest first, each with the reason in words."""
    near = nearest(gpu, op, dtype, size, among)
    if not near:
        return {}
    times = of(gpu, op)[near]
    ordered = sorted((p for p in among if p in times), key=lambda p: times[p])
    first = ordered[0]

    def figure(provider: str) -> str:
        return f"{1e6 * times[provider]:.1f} us"

    words = {first: f"fastest here as measured: {figure(first)} ({near})"}
    for provider in ordered[1:]:
        words[provider] = (
            f"slower than {first} here as measured: {figure(provider)}, {figure(first)} ({near})"
        )
    return words


def fastest_first(
    index: int | None, op: str, dtype: torch.dtype, size: Sequence[int], verdicts: list[tuple[str, bool, str]]
) -> list[tuple[str, bool, str]]:
    """(backend, usable, reason) of an op's backends as `dispatch` prefers them: where several kernels are usable on the GPU of this
    index and some were timed on it, those come first by their times, with the figures in the reasons."""
    kernels = [backend for backend, usable, _ in verdicts if usable and backend != "naive"]
    if len(kernels) < 2:
        return verdicts
    name = gpu(index)
    ranked = ranking(name, op, dtype, size, kernels)
    why = ranked if size or not of(name, op) else dict.fromkeys(kernels, "the size decides, as measured")
    places = {backend: place for place, backend in enumerate(ranked)}
    told = [(b, usable, f"{reason}; {why[b]}" if b in why else reason) for b, usable, reason in verdicts]
    return sorted(told, key=lambda verdict: places.get(verdict[0], len(places)))

# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels share: whether Triton is here, what it runs on, and launch configurations by architecture.

A kernel runs on a GPU, or under Triton's interpreter (``TRITON_INTERPRET=1`` before this package is imported), which
executes it on CPU tensors in NumPy: slow, and wrong in bf16 (which the tests mend), but the same code.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

import torch

HOPPER = 90
"""Compute capability 9.0, ten times the major number plus the minor: the first with tensor-memory descriptors."""

LOG2E = 1.4426950408889634
"""log2(e): kernels take exponentials to the base of two."""


@lru_cache(maxsize=1)
def missing() -> str:
    """Why Triton kernels cannot run in this process at all; empty where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return ""


@lru_cache(maxsize=1)
def interpreting() -> bool:
    """Whether kernels of this process are interpreted. Triton decides when a kernel is defined, so this never changes."""
    if missing():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


@dataclass(frozen=True)
class Chip:
    """What a launch depends on.

    capability: compute capability, ten times the major number plus the minor: 80, 90, 100.
    multiprocessors: how many programs run at once; persistent kernels start so many, fixed grids are cut from it.
    """

    capability: int
    multiprocessors: int


INTERPRETER = Chip(capability=HOPPER, multiprocessors=3)
"""The interpreter has every feature; so few multiprocessors that persistent kernels loop, and unevenly."""

_forced_chip: Chip | None = None


def chip(device: torch.device) -> Chip:
    """The chip that kernels on tensors of this device run on."""
    if _forced_chip is not None:
        return _forced_chip
    if device.type != "cuda":
        return INTERPRETER
    return _cuda_chip(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache(maxsize=64)
def _cuda_chip(index: int) -> Chip:
    found = torch.cuda.get_device_properties(index)
    return Chip(10 * int(found.major) + int(found.minor), int(found.multi_processor_count))


@contextmanager
def force_chip(value: Chip) -> Iterator[None]:
    """Inside the block every device is this chip: to test the plain path of a kernel, or to compile for a target."""
    global _forced_chip
    previous, _forced_chip = _forced_chip, value
    try:
        yield
    finally:
        _forced_chip = previous


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`, for `n` of at least 1."""
    return 1 << (n - 1).bit_length()


def parts(dim: int) -> tuple[int, int]:
    """A head dimension as one power of two of at least 16 that holds it, or as the sum of two that waste less: (size, 0 or size).

    80 is 64 + 16 and 192 is 128 + 64: products of tiles want powers of two, and 128 or 256 would be work for nothing.
    """
    whole = max(16, power_of_2(dim))
    first = whole // 2
    second = max(16, power_of_2(dim - first)) if dim > first else 0
    return (first, second) if first >= 16 and second and first + second < whole else (whole, 0)


ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True)
class Launch:
    """The usual launch configuration; an op whose tiles have more sides derives from it."""

    warps: int
    stages: int = 2


class Configs(Generic[ConfigT]):
    """Launch configurations of one kernel by (capability, key), chosen by measurement and written down: nothing is tuned at
    run time, so the first call costs what the others cost and results never depend on a race.

    table: (capability, key) -> configuration. The entry of the highest capability not above the device's serves.
    candidates: what `bench.tune` tries for a key.
    """

    def __init__(
        self,
        name: str,
        table: Mapping[tuple[int, Hashable], ConfigT],
        candidates: Sequence[ConfigT] = (),
    ) -> None:
        self.name = name
        self.table = dict(table)
        self.candidates = tuple(candidates)
        self._forced: ConfigT | None = None
        self._found: dict[tuple[int, Hashable], ConfigT] = {}

    def pick(self, capability: int, key: Hashable) -> ConfigT:
        """The configuration to launch with. KeyError where neither this capability nor a lower one has `key`."""
        if self._forced is not None:
            return self._forced
        # 12.x has the tensor cores and the shared memory of 8.9, not those of 10.0.
        capability = 89 if capability >= 120 else capability
        found = self._found.get((capability, key))
        if found is None:
            fitting = [c for c, k in self.table if k == key and c <= capability]
            if not fitting:
                raise KeyError(f"{self.name}: no launch configuration for {key!r} on capability {capability}")
            found = self._found[capability, key] = self.table[max(fitting), key]
        return found

    @contextmanager
    def forced(self, config: ConfigT) -> Iterator[None]:
        """Inside the block every launch uses this configuration."""
        previous, self._forced = self._forced, config
        try:
            yield
        finally:
            self._forced = previous

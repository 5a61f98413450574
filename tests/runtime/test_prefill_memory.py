# SPDX-License-Identifier: Apache-2.0
"""What prefill holds on a GPU at most. Counted outside of kernels: every tensor that was made there, by the memory behind it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from glimpse_runtime import plans
from glimpse_runtime.prefill import Prefill
from glimpse_runtime.workspace import PrefillMemory
from tests import stand_in

from .conftest import make_batch
from .on_stand_in import device

PICTURES = [[5, (16, 20), 4, (12, 12), 9], [3, (20, 20), 8]]


class Ledger:
    """now, most: bytes that are held, and were at most since `most` was set."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._held: dict[int, tuple[int, int]] = {}  # tensors on it and bytes, by address
        self._inside = 0

    def add(self, tensor: torch.Tensor, memory: torch.Tensor) -> None:
        storage = memory.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        tensors, known = self._held.get(address, (0, size))
        self.now += 0 if tensors else known
        self._held[address] = tensors + 1, known
        weakref.finalize(tensor, self._drop, address)
        self._look()

    def _drop(self, address: int) -> None:
        tensors, size = self._held.pop(address)
        if tensors > 1:
            self._held[address] = tensors - 1, size
        else:
            self.now -= size

    def _look(self) -> None:
        if not self._inside:
            self.most = max(self.most, self.now)

    @contextmanager
    def kernel(self) -> Iterator[None]:
        """What a definition makes on its way, a kernel does not."""
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            self._look()


def most(options: dict[str, Any], limit: int) -> int:
    """Bytes on the device, weights and pool included, from the embedded prompt to its logits."""
    ledger, start = Ledger(), Prefill.start
    make, unwatched = stand_in.DeviceTensor.__new__, stand_in.StandIn.unwatched

    def made(cls: Any, memory: torch.Tensor) -> Any:
        tensor = make(cls, memory)
        ledger.add(tensor, memory)
        return tensor

    @contextmanager
    def kernel(self: stand_in.StandIn) -> Iterator[None]:
        with ledger.kernel(), unwatched(self):
            yield

    def started(self: Prefill, *args: Any) -> None:
        ledger.most = ledger.now
        start(self, *args)

    batch, _ = make_batch(PICTURES)
    with (
        mock.patch.object(stand_in.DeviceTensor, "__new__", made),
        mock.patch.object(stand_in.StandIn, "unwatched", kernel),
        mock.patch.object(Prefill, "start", started),
        device() as here,
    ):
        model = here.model()
        model.engine.workspace = PrefillMemory(model.base.decoder, limit)
        for _ in range(2):  # the second one finds what the first one left
            model.prefill(**batch, **options)
        return ledger.most


@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["nothing is kept", "everything is kept"])
def test_a_pruned_prompt_needs_no_more_than_an_unpruned_one(limit: int) -> None:
    plain = most({"plan": None}, limit)
    for ratio in (0.074, 0.22):
        assert most({"threshold": 0.0, "max_remain_ratio": ratio}, limit) < plain


LISTS = 1.001
"""Numbers of rows, a thousandth of what the rows themselves hold."""

OTHERS = {
    "fastv": plans.fastv(3, 0.9),
    "pyramiddrop": plans.pyramiddrop(layers=(1, 3, 4)),
    "vscan": plans.vscan(0.5),
    "visionzip": plans.visionzip(0.4, 0.1),
    "divprune": plans.divprune(0.3),
}


@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["nothing is kept", "everything is kept"])
def test_nor_do_other_methods(limit: int) -> None:
    """Those that keep all keys of the layers before their stages too."""
    plain = most({"plan": None}, limit)
    for name, plan in OTHERS.items():
        assert most({"plan": plan}, limit) <= LISTS * plain, name

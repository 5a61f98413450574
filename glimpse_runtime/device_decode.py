# SPDX-License-Identifier: Apache-2.0
"""Decoding on a GPU: captured steps, and tokens that the host reads some steps later.

A step is two captured pieces of work: the layers (`DeviceLanes.step`), keyed by lanes, widths of the block tables, pool and segments;
and the choice of the next tokens (`Picker.pick`), keyed by lanes, what it can do, and segments. The second one stands alone because a
call's first token comes from prefill's logits, and because it is so cheap to capture that no two ways to sample need the layers twice.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator, Sequence
from functools import partial

import torch

from glimpse_runtime.cache import KvLease
from glimpse_runtime.decode import DecodeLoop, pool_is_full
from glimpse_runtime.device_sampling import RING, Choice
from glimpse_runtime.engine import Engine
from glimpse_runtime.lanes import CHUNK
from glimpse_runtime.prefill import Prefill

LAG = 1
"""Steps that are queued behind the one whose tokens the host waits for: what it does with them has to take less time than these.
So many run for nothing after the last row has ended."""


class DeviceLoop:
    """The decoding state of a batch on a GPU; `step`, `advance` and `retire` as in `DecodeLoop`.

    Args:
        engine: keeps the static memory and what was captured.
        leases: what prefill left, see `DecodeLoop`.
        next_positions: `[3, B]` for each of them, see `DecodeLoop`.
        room: rows that prefill left free for each sequence.

    Raises:
        GlimpseError: the leases are not those of all layers in order.
    """

    def __init__(
        self, engine: Engine, leases: Sequence[KvLease], next_positions: Sequence[torch.Tensor], room: int
    ) -> None:
        self._engine, self.leases = engine, tuple(leases)
        self._batch, self._room, self._planned = len(leases[0].capacities), room, 0
        self._station = engine.station(leases)
        self._leave = weakref.finalize(self, engine.leave, self._station)
        self._leave.atexit = False
        lanes = self._station.lanes
        lanes.admit(leases, next_positions)
        pools = [lease.pool for lease in leases]
        self._work = partial(lanes.step, pools)
        self._key = ("step", lanes.count, lanes.widths, pools[0].generation, lanes.segments)
        self._pick: Hashable = None  # what takes turns with it

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append `tokens [B]` and return the logits `[B, vocabulary]` after them, in memory of their own.

        Raises:
            GlimpseError: the pool is full.
        """
        return self.advance(tokens).clone()

    def advance(self, tokens: torch.Tensor) -> torch.Tensor:
        """`step` whose result is overwritten by the next one."""
        self._station.lanes.tokens[: self._batch].copy_(tokens)
        self._forward()
        return self._station.lanes.logits[: self._batch]

    def retire(self, finished: torch.Tensor) -> None:
        """Stop computing the rows where `finished [B]` is true."""
        self._station.lanes.active[: self._batch].logical_and_(~finished)

    def tokens(
        self, logits: torch.Tensor, choice: Choice, steps: int, said: torch.Tensor | None = None
    ) -> Iterator[torch.Tensor]:
        """Up to `steps` tokens of each row, `[B]` int64 on the host at a time, the first ones from prefill's `logits`.

        The device is `LAG` steps ahead of what was given out. It knows itself which rows have ended; whoever sees that all
        have may stop asking. `said`: see `Picker.begin`.
        """
        station = self._station
        lanes, picker, ring = station.lanes, station.picker, station.ring
        lanes.logits[: self._batch].copy_(logits)
        picker.begin(choice, said)
        ring.begin()
        kind = choice.kind
        pick, self._pick = partial(picker.pick, kind), ("pick", lanes.count, kind, lanes.segments)
        for step in range(steps + LAG):
            if step < steps:
                if step:
                    self._forward()
                station.graphs.run(self._pick, pick, self._key)
                ring.send()
            if step >= LAG:
                yield ring.receive()[: self._batch]

    def close(self) -> None:
        """Leave the static memory to the next batch; the loop is at its end."""
        self._leave()

    def _forward(self) -> None:
        if self._room <= 0:
            raise pool_is_full()
        self._room -= 1
        if not self._planned:
            self._station.lanes.plan()
            self._planned = CHUNK
        self._planned -= 1
        if self._engine.captures(*self.leases):
            self._station.graphs.run(self._key, self._work, self._pick)
        else:  # for another batch the pool grew meanwhile: this one is replayed nowhere else
            self._work()


assert LAG < RING


def loop_for(prefill: Prefill) -> DecodeLoop | DeviceLoop:
    """The decoding loop behind a finished prefill, on its device."""
    left = (prefill.leases, prefill.next_positions, prefill.extra_rows)
    if prefill.batch.device.type == "cpu":
        return DecodeLoop(prefill.decoder, *left)
    return DeviceLoop(prefill.engine, *left)

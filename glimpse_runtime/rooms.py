# SPDX-License-Identifier: Apache-2.0
"""Where prefill puts keys and values: the pool, or a workspace for as long as a later stage may drop rows of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from glimpse_kernels import compact
from glimpse_runtime.cache import KvLease
from glimpse_runtime.engine import Engine
from glimpse_runtime.models.qwen2_5_vl.decoder import Decoder
from glimpse_runtime.packing import PackedBatch
from glimpse_runtime.plan import Stage
from glimpse_runtime.restriction import shrunk
from glimpse_runtime.stages.places import Layer, Vision
from glimpse_runtime.stages.selection import bounds_of
from glimpse_runtime.stages.views import RowKeys, prompt_ends
from glimpse_runtime.tail import Place


@dataclass
class Room:
    """Keys and values of some layers that see the same rows.

    Attributes:
        layers: which ones.
        k, v: `[layers, places, kv heads, head_dim]`.
        batch: the rows.
        cu_rows, cu_places: int32 offsets of the segments of queries and keys for `attention`.
        slots: `[T]` int32 place of each row; None: its number.
        alive: `[T']` int32 rows that are left since, -1 behind the last one; None: all.
    """

    layers: range
    k: torch.Tensor
    v: torch.Tensor
    batch: PackedBatch
    cu_rows: torch.Tensor
    cu_places: torch.Tensor
    slots: torch.Tensor | None = None
    alive: torch.Tensor | None = None

    @classmethod
    def workspace(cls, decoder: Decoder, layers: range, batch: PackedBatch) -> Room:
        """Memory of its own, row by row."""
        config = decoder.config
        shape = (len(layers), batch.num_rows, config.num_kv_heads, config.head_dim)
        # Not of what prefill keeps for the next prompt: its room is needed behind the stage.
        k, v = (torch.empty(shape, dtype=decoder.dtype, device=decoder.device) for _ in range(2))
        return cls(layers, k, v, batch, batch.cu_seqlens, batch.cu_seqlens)

    @classmethod
    def leased(cls, lease: KvLease, batch: PackedBatch) -> Room:
        """In the pool."""
        place = Place(lease.k_slots, lease.v_slots, lease.starts)
        slots = place.slots(batch.cu_seqlens, batch.num_rows)
        cu_rows, cu_places = place.segments(batch.cu_seqlens)
        return cls(lease.layers, lease.k_slots, lease.v_slots, batch, cu_rows, cu_places, slots)

    def keys(self, layer: int) -> torch.Tensor:
        """`[places, kv heads, head_dim]` of a layer."""
        return self.k[layer - self.layers.start]

    def values(self, layer: int) -> torch.Tensor:
        return self.v[layer - self.layers.start]

    def places(self, rows: torch.Tensor) -> torch.Tensor:
        """`[n]` int32 places of `rows [n]` int32."""
        return rows if self.slots is None else self.slots.index_select(0, rows)

    def row_keys(self, layer: int) -> RowKeys:
        """The keys of a layer for those who look at the prompts, without probe rows."""
        batch = self.batch
        begins = batch.cu_seqlens[:-1]
        ends = prompt_ends(batch)
        first = self.places(begins)
        bounds = torch.stack([first, first + (ends - begins)], dim=1).flatten()
        return RowKeys(self.keys(layer), bounds, self.places(batch.token_rows))

    def drop(self, index: torch.Tensor) -> None:
        """Of the rows that were left, those at `index [n]` int32 are; -1 is none."""
        if self.alive is None:
            self.alive = index
        else:
            found = self.alive.index_select(0, index.clamp(min=0))
            self.alive = torch.where(index < 0, -1, found)

    def move(self, lease: KvLease, slots: torch.Tensor) -> None:
        """Bring what is left to `slots [n]` int32 of a lease that has these layers among its own."""
        assert self.alive is not None
        some = slice(self.layers.start - lease.layers.start, self.layers.stop - lease.layers.start)
        compact(self.alive, slots, self.k, self.v, lease.k_slots[some], lease.v_slots[some])


class Rooms:
    """All of them, for one prompt batch.

    Args:
        engine: has the pool.
        extra_rows: room for each sequence's generated tokens.

    Attributes:
        leases: in the order of their layers, one for the layers between two stages; each one's `lengths` are its prompt rows.
        next_positions: of each of them, `[3, B]` rotary positions of the first generated token.
    """

    def __init__(self, engine: Engine, extra_rows: int) -> None:
        self._engine, self._extra_rows = engine, extra_rows
        self._waiting: list[Room] = []  # workspaces
        self.leases: tuple[KvLease, ...] = ()
        self.next_positions: tuple[torch.Tensor, ...] = ()

    def lease(self, batch: PackedBatch, stages: Sequence[Stage]) -> None:
        """Room in the pool for all layers: those that were run have the rows of `batch`, as the next ones do up to the first of
        `stages`, the ones to come."""
        segments, begin, lengths = [], 0, list(batch.prompt_lengths)
        for stage in stages:
            assert not isinstance(stage.at, Vision)
            stop = int(stage.at.index) + isinstance(stage.at, Layer)
            segments.append((range(begin, stop), lengths))
            # A budget over several pictures bounds their sum more closely than that of each.
            together = stage.select.row_bounds(batch)
            begin, batch = stop, shrunk(batch, bounds_of(stage.select, batch), probes=False)
            lengths = [min(bounds) for bounds in zip(together, batch.prompt_lengths, strict=True)]
        segments.append((range(begin, self._engine.decoder.config.num_layers), lengths))
        self.leases = self._engine.lease_all(
            [(layers, self._capacities(lengths)) for layers, lengths in segments if layers]
        )

    def _capacities(self, lengths: Sequence[int]) -> list[int]:
        return [length + self._extra_rows for length in lengths]

    def widen(self, batch: PackedBatch) -> None:
        """Room for all rows of `batch` in the layers behind the last stage, which have none yet: more may stay than was thought."""
        if self.leases and len(self.next_positions) < len(self.leases):
            *others, last = self.leases
            (anew,) = self._engine.lease_all([(last.layers, self._capacities(batch.prompt_lengths))])
            last.release()
            self.leases = (*others, anew)

    def wait(self, layers: range, batch: PackedBatch) -> Room:
        """A workspace for layers that are about to run."""
        self._waiting.append(Room.workspace(self._engine.decoder, layers, batch))
        return self._waiting[-1]

    def enter(self, layers: range, batch: PackedBatch, next_positions: torch.Tensor) -> Room:
        """The room in the pool of layers that are about to run."""
        return Room.leased(self.occupy(layers.start, batch.cu_seqlens, next_positions), batch)

    def occupy(self, layer: int, cu_seqlens: torch.Tensor, next_positions: torch.Tensor) -> KvLease:
        """The lease of a layer, whose rows are known now: those of sequences packed as `cu_seqlens` says."""
        number, lease = next((n, lease) for n, lease in enumerate(self.leases) if layer in lease.layers)
        if number == len(self.next_positions):
            lease.lengths = cu_seqlens[1:] - cu_seqlens[:-1]
            self.next_positions += (next_positions,)
        return lease

    def drop(self, index: torch.Tensor) -> None:
        """Of the rows in workspaces, those at `index [n]` int32 are left; -1 is none."""
        for room in self._waiting:
            room.drop(index)

    def move(self, cu_seqlens: torch.Tensor, rows: int, next_positions: torch.Tensor) -> None:
        """What is left in workspaces goes to the pool, `rows` rows packed as `cu_seqlens` says."""
        lease = self.occupy(0, cu_seqlens, next_positions)
        slots = Place(lease.k_slots, lease.v_slots, lease.starts).slots(cu_seqlens, rows)
        while self._waiting:
            self._waiting.pop(0).move(lease, slots)

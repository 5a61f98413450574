# SPDX-License-Identifier: Apache-2.0
"""Memory for keys and values: the paged pool, and the runs of its blocks that batches lease."""

from __future__ import annotations

import weakref
from bisect import insort
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cached_property
from operator import itemgetter
from typing import TypeAlias

import torch

from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.models.qwen2_5_vl.config import TextConfig
from glimpse_runtime.uploads import upload

BLOCK_SIZE = 32

Segment: TypeAlias = tuple[range, Sequence[int]]
"""Layers of a decoder in which the sequences have the same rows, and room for how many of each sequence."""


class Runs:
    """Who has which of `total` blocks in which layers: rectangles. The first run of blocks that fits is given out.

    Leases that share no layer may have the same blocks.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._taken: list[tuple[int, int, range]] = []  # first block, blocks, layers; by the first block
        self._returned: deque[tuple[int, int, range]] = deque()

    @property
    def free(self) -> int:
        """Blocks that nobody has in any layer."""
        return sum(room for _, room in self._gaps())

    @property
    def longest(self) -> int:
        """Blocks of the longest run that nobody has in any layer."""
        return max((room for _, room in self._gaps()), default=0)

    def take(self, count: int, layers: range) -> int | None:
        """The first block of a run of `count` that nobody has in these layers; None if no gap is that long."""
        first = next((start for start, room in self._gaps(layers) if count <= room), None)
        if first is not None:
            insort(self._taken, (first, count, layers), key=itemgetter(0))
        return first

    def give_back(self, first: int, count: int, layers: range) -> None:
        """Undo `take`. May come at any moment, in the middle of a `take` too: from the garbage collector."""
        self._returned.append((first, count, layers))

    def _gaps(self, layers: range | None = None) -> Iterator[tuple[int, int]]:
        """First block and blocks of each gap in these layers (None: in all of them), ascending."""
        while self._returned:
            self._taken.remove(self._returned.popleft())
        at = 0
        for first, count, own in self._taken:
            if layers is None or (own.start < layers.stop and layers.start < own.stop):
                if at < first:
                    yield at, first - at
                at = max(at, first + count)
        if at < self.total:
            yield at, self.total - at


class KvPool:
    """Blocks of keys and values; sequences lease them.

    Attributes:
        layers: of the decoder, those that it has room for.
        k, v: `[layers, blocks, BLOCK_SIZE, kv heads, head_dim]`.
        generation: which of an engine's pools this is; what was captured on one is of no use on another.
        runs: who has which blocks.
    """

    def __init__(
        self,
        config: TextConfig,
        blocks: int,
        dtype: torch.dtype,
        device: torch.device,
        generation: int = 0,
        layers: range | None = None,
    ) -> None:
        self.layers = range(config.num_layers) if layers is None else layers
        shape = (len(self.layers), blocks, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.generation = generation
        self.runs = Runs(blocks)

    @staticmethod
    def bytes_of(config: TextConfig, blocks: int, dtype: torch.dtype) -> int:
        """Bytes of keys and values in so many blocks of all layers."""
        row = 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize
        return blocks * BLOCK_SIZE * row

    @property
    def blocks(self) -> int:
        return self.k.shape[1]

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    @cached_property
    def k_slots(self) -> torch.Tensor:
        """`[layers, slots, kv heads, head_dim]`: the pool without its block borders (slot = block * BLOCK_SIZE + offset)."""
        return self.k.flatten(1, 2)

    @cached_property
    def v_slots(self) -> torch.Tensor:
        return self.v.flatten(1, 2)

    def layer(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[blocks, BLOCK_SIZE, kv heads, head_dim]` of the decoder's layer `number`."""
        at = self.layers.index(number)
        return self.k[at], self.v[at]

    def lease(self, capacities: Sequence[int], layers: range | None = None) -> KvLease | None:
        """Room for `capacities[b]` rows of sequence b in these layers (None: all of the pool); None if there is no gap
        that holds them all."""
        leases = self.lease_all([(self.layers if layers is None else layers, capacities)])
        return None if leases is None else leases[0]

    def lease_all(self, segments: Sequence[Segment]) -> tuple[KvLease, ...] | None:
        """A lease for each segment; None, and nothing is taken, if they do not fit together.

        Raises:
            GlimpseError: a segment has no layers, or some that the pool does not have.
        """
        for layers, _ in segments:
            if not layers or layers.step != 1 or {layers[0], layers[-1]} - set(self.layers):
                raise GlimpseError(f"keys and values: expected layers of {self.layers}, found {layers}")
        leases: list[KvLease] = []
        for layers, capacities in segments:
            blocks = blocks_of(capacities)
            first = self.runs.take(sum(blocks), layers)
            if first is None:
                for lease in leases:
                    lease.release()
                return None
            leases.append(KvLease(self, first, blocks, layers))
        return tuple(leases)


def blocks_of(capacities: Sequence[int]) -> list[int]:
    """Blocks that hold so many rows, of each sequence."""
    return [-(-capacity // BLOCK_SIZE) for capacity in capacities]


def blocks_for(segments: Sequence[Segment]) -> int:
    """Blocks of a pool in which `lease_all` finds room for these segments if nothing else is there."""
    counts = [(sum(blocks_of(capacities)), layers) for layers, capacities in segments]
    runs = Runs(sum(count for count, _ in counts))
    return max((runs.take(count, layers) or 0) + count for count, layers in counts)


class KvLease:
    """The rows of a batch in some layers of a pool: one run of blocks, sequence after sequence, each with blocks of its own.

    Prefill reads and writes it as if it were a pool of its own: `k_slots`, `v_slots` and `starts` count from the
    lease's first slot, and from its first layer. Decoding goes by `block_table` and `slots_at`, which count from the
    pool's.

    Its blocks go back to the pool with `release`, or when nobody refers to the lease any more. Whoever leases them then
    writes to them behind everything that the same stream was given before.

    Attributes:
        pool: where it lies; kept alive by it.
        layers: of the decoder, those whose keys and values it holds.
        first: first block in the pool.
        block_table: `[B, max blocks a sequence]` int32 blocks of the pool. Those of a sequence lie one after the other.
        starts: `[B]` int32 first slot of each sequence, from the lease's first.
        capacities: slots of each sequence.
        lengths: `[B]` int32 rows of the prompt, on the device. Those that decoding adds are counted by its loop.
    """

    def __init__(self, pool: KvPool, first: int, blocks: Sequence[int], layers: range) -> None:
        self.pool = pool
        self.layers = layers
        self.first = first
        self._count = sum(blocks)
        self._release = weakref.finalize(self, pool.runs.give_back, first, self._count, layers)
        self._release.atexit = False
        self.capacities = tuple(count * BLOCK_SIZE for count in blocks)
        batch, width = len(blocks), max(blocks)
        # Table and starts go up in one piece.
        host = torch.zeros(batch * (width + 1), dtype=torch.int32, device="cpu")
        table, starts = host[: batch * width].view(batch, width), host[batch * width :]
        at = 0
        for b, count in enumerate(blocks):
            table[b, :count] = torch.arange(first + at, first + at + count, dtype=torch.int32, device="cpu")
            starts[b] = at * BLOCK_SIZE
            at += count
        device = upload(host, pool.k.device)
        self.block_table, self.starts = device[: batch * width].view(batch, width), device[batch * width :]
        self.lengths = torch.zeros_like(self.starts)

    def release(self) -> None:
        """Give the blocks back; what they hold is gone. May be called again."""
        self._release()

    @property
    def released(self) -> bool:
        return not self._release.alive

    @cached_property
    def k_slots(self) -> torch.Tensor:
        """`[layers, slots, kv heads, head_dim]`: the lease without its block borders."""
        return self.window(self._count * BLOCK_SIZE)[0]

    @cached_property
    def v_slots(self) -> torch.Tensor:
        return self.window(self._count * BLOCK_SIZE)[1]

    def window(self, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`k_slots` and `v_slots` with more rows of the pool behind them, `slots` in all, or what the pool has.

        Leases of a similar size that begin at the same block then have the same memory and the same shapes.
        """
        rows = slice(self.first * BLOCK_SIZE, self.first * BLOCK_SIZE + slots)
        above = self.pool.layers.start
        layers = slice(self.layers.start - above, self.layers.stop - above)
        return self.pool.k_slots[layers, rows], self.pool.v_slots[layers, rows]

    def keys(self, layer: int) -> torch.Tensor:
        """`[slots, kv heads, head_dim]` of the decoder's layer `layer`.

        Raises:
            ValueError: the lease does not have this layer.
        """
        return self.k_slots[self.layers.index(layer)]

    def values(self, layer: int) -> torch.Tensor:
        """Like `keys`."""
        return self.v_slots[self.layers.index(layer)]

    def slots_at(self, rows: torch.Tensor) -> torch.Tensor:
        """`[n, B]` int32 slot of the pool for row number `rows [n, B]` (int32) of each sequence; rows past its blocks:
        in the last."""
        return slots_at(self.block_table, rows)

    def rows(self, row: int, layer: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `length` keys and values `[length, kv heads, head_dim]` of one sequence in the decoder's layer
        `layer` (views).

        Raises:
            GlimpseError: the lease was released.
            ValueError: it does not have this layer.
        """
        if self.released:
            raise GlimpseError("the keys and values of this batch are gone: their room was given back")
        start = sum(self.capacities[:row])
        rows = slice(start, start + length)
        return self.keys(layer)[rows], self.values(layer)[rows]


def slots_at(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`[n, B]` int32 slot of row number `rows [n, B]` of each sequence of a `[B, width]` block table."""
    blocks = torch.div(rows, BLOCK_SIZE, rounding_mode="floor").clamp_(max=table.shape[1] - 1)
    return table.gather(1, blocks.T.long()).T * BLOCK_SIZE + rows % BLOCK_SIZE

# SPDX-License-Identifier: Apache-2.0
"""Memory for keys and values: the paged pool, and the runs of its blocks that batches lease."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from functools import cached_property

import torch

from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.models.qwen2_5_vl.config import TextConfig
from glimpse_runtime.uploads import upload

BLOCK_SIZE = 32


class Runs:
    """Who has which of `total` blocks: runs of neighbours, the first gap that fits is given out."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._gaps = (
            [(0, total)] if total else []
        )  # first block and blocks of each gap, ascending, never touching
        self._returned: deque[tuple[int, int]] = deque()

    @property
    def free(self) -> int:
        """Blocks that nobody has."""
        self._settle()
        return sum(count for _, count in self._gaps)

    @property
    def longest(self) -> int:
        """Blocks of the longest gap."""
        self._settle()
        return max((count for _, count in self._gaps), default=0)

    def take(self, count: int) -> int | None:
        """The first block of a run of `count`; None if no gap is that long."""
        self._settle()
        for i, (first, room) in enumerate(self._gaps):
            if count <= room:
                self._gaps[i : i + 1] = [(first + count, room - count)] if count < room else []
                return first
        return None

    def give_back(self, first: int, count: int) -> None:
        """Undo `take`. May come at any moment, in the middle of a `take` too: from the garbage collector."""
        self._returned.append((first, count))

    def _settle(self) -> None:
        while self._returned:
            gaps, self._gaps = sorted([*self._gaps, self._returned.popleft()]), []
            for start, length in gaps:
                if self._gaps and sum(self._gaps[-1]) == start:
                    start, length = self._gaps[-1][0], self._gaps.pop()[1] + length
                self._gaps.append((start, length))


class KvPool:
    """Blocks of keys and values; sequences lease them.

    Attributes:
        k, v: `[layers, blocks, BLOCK_SIZE, kv heads, head_dim]`.
        generation: which of an engine's pools this is; what was captured on one is of no use on another.
        runs: who has which blocks.
    """

    def __init__(
        self, config: TextConfig, blocks: int, dtype: torch.dtype, device: torch.device, generation: int = 0
    ) -> None:
        shape = (config.num_layers, blocks, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.generation = generation
        self.runs = Runs(blocks)

    @staticmethod
    def bytes_of(config: TextConfig, blocks: int, dtype: torch.dtype) -> int:
        """Bytes of keys and values in so many blocks."""
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

    def lease(self, capacities: Sequence[int]) -> KvLease | None:
        """Room for `capacities[b]` rows of sequence b; None if there is no gap that holds them all."""
        blocks = blocks_of(capacities)
        first = self.runs.take(sum(blocks))
        return None if first is None else KvLease(self, first, blocks)


def blocks_of(capacities: Sequence[int]) -> list[int]:
    """Blocks that hold so many rows, of each sequence."""
    return [-(-capacity // BLOCK_SIZE) for capacity in capacities]


class KvLease:
    """The rows of a batch in a pool: one run of blocks, sequence after sequence, each with blocks of its own.

    Prefill reads and writes it as if it were a pool of its own: `k_slots`, `v_slots` and `starts` count from the
    lease's first slot. Decoding goes by `block_table` and `slots_at`, which count from the pool's.

    Its blocks go back to the pool with `release`, or when nobody refers to the lease any more. Whoever leases them then
    writes to them behind everything that the same stream was given before.

    Attributes:
        pool: where it lies; kept alive by it.
        first: first block in the pool.
        block_table: `[B, max blocks a sequence]` int32 blocks of the pool. Those of a sequence lie one after the other.
        starts: `[B]` int32 first slot of each sequence, from the lease's first.
        capacities: slots of each sequence.
        lengths: `[B]` int32 rows in use, on the device. (On a GPU those that decoding adds are counted elsewhere.)
    """

    def __init__(self, pool: KvPool, first: int, blocks: Sequence[int]) -> None:
        self.pool = pool
        self.first = first
        self._count = sum(blocks)
        self._release = weakref.finalize(self, pool.runs.give_back, first, self._count)
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
        return self.pool.k_slots[:, rows], self.pool.v_slots[:, rows]

    def slots_at(self, rows: torch.Tensor) -> torch.Tensor:
        """`[n, B]` int32 slot of the pool for row number `rows [n, B]` (int32) of each sequence; rows past its blocks:
        in the last."""
        return slots_at(self.block_table, rows)

    def rows(self, row: int, layer: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `length` keys and values `[length, kv heads, head_dim]` of one sequence in one layer (views).

        Raises:
            GlimpseError: the lease was released.
        """
        if self.released:
            raise GlimpseError("the keys and values of this batch are gone: their room was given back")
        start = sum(self.capacities[:row])
        return self.k_slots[layer, start : start + length], self.v_slots[layer, start : start + length]


def slots_at(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`[n, B]` int32 slot of row number `rows [n, B]` of each sequence of a `[B, width]` block table."""
    blocks = torch.div(rows, BLOCK_SIZE, rounding_mode="floor").clamp_(max=table.shape[1] - 1)
    return table.gather(1, blocks.T.long()).T * BLOCK_SIZE + rows % BLOCK_SIZE

# SPDX-License-Identifier: Apache-2.0
"""Memory for keys and values: the paged pool that decoding reads, and the workspace that pruning empties into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from glimpse_runtime.models.qwen2_5_vl.config import TextConfig

BLOCK_SIZE = 32


@dataclass
class KvPool:
    """Keys and values of the rows that stay.

    Attributes:
        k, v: `[layers, blocks, BLOCK_SIZE, kv heads, head_dim]`.
        block_table: `[B, max blocks a sequence]` int32. The blocks of a sequence lie one after the other, so that
            prefill may read them as one run.
        starts: first slot of each sequence (slot = block * BLOCK_SIZE + offset).
        capacities: slots of each sequence.
        lengths: `[B]` int32 rows in use, on the device.
    """

    k: torch.Tensor
    v: torch.Tensor
    block_table: torch.Tensor
    starts: torch.Tensor
    capacities: tuple[int, ...]
    lengths: torch.Tensor

    @classmethod
    def allocate(
        cls, config: TextConfig, capacities: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> KvPool:
        """Room for `capacities[b]` rows of sequence b."""
        blocks = [-(-capacity // BLOCK_SIZE) for capacity in capacities]
        first = [sum(blocks[:b]) for b in range(len(blocks))]
        shape = (config.num_layers, sum(blocks), BLOCK_SIZE, config.num_kv_heads, config.head_dim)
        table = torch.zeros(len(blocks), max(blocks), dtype=torch.int32)
        for b, (start, count) in enumerate(zip(first, blocks, strict=True)):
            table[b, :count] = torch.arange(start, start + count, dtype=torch.int32)
        return cls(
            k=torch.empty(shape, dtype=dtype, device=device),
            v=torch.empty(shape, dtype=dtype, device=device),
            block_table=table.to(device),
            starts=torch.tensor([b * BLOCK_SIZE for b in first], dtype=torch.int32, device=device),
            capacities=tuple(count * BLOCK_SIZE for count in blocks),
            lengths=torch.zeros(len(blocks), dtype=torch.int32, device=device),
        )

    @property
    def k_slots(self) -> torch.Tensor:
        """`[layers, slots, kv heads, head_dim]`: the pool without its block borders."""
        return self.k.flatten(1, 2)

    @property
    def v_slots(self) -> torch.Tensor:
        return self.v.flatten(1, 2)

    def prefill_slots(self, cu_seqlens: torch.Tensor, rows: int) -> torch.Tensor:
        """`[rows]` int32 slot of each packed row when sequence b holds rows `cu[b]..cu[b+1]`; -1 past the last one."""
        row = torch.arange(rows, dtype=torch.int32, device=cu_seqlens.device)
        sequence = torch.searchsorted(cu_seqlens[1:], row, right=True).clamp_(max=cu_seqlens.shape[0] - 2)
        slots = row - cu_seqlens[sequence] + self.starts[sequence]
        return torch.where(row < cu_seqlens[-1], slots, -1).to(torch.int32)

    def prefill_segments(self, lengths: torch.Tensor) -> torch.Tensor:
        """`[2B + 1]` int32 offsets that read the pool as packed keys.

        Every sequence is one segment of `lengths[b]` keys; the unused slots behind it are a second one, for which
        the caller has no queries.
        """
        end = torch.full_like(self.starts[:1], self.k_slots.shape[1])
        return torch.cat([torch.stack([self.starts, self.starts + lengths], dim=1).flatten(), end])

    def slots_at(self, rows: torch.Tensor) -> torch.Tensor:
        """`[n, B]` int32 slot of row number `rows [n, B]` (int32) of each sequence; rows past its blocks: in the last."""
        blocks = torch.div(rows, BLOCK_SIZE, rounding_mode="floor").clamp_(max=self.block_table.shape[1] - 1)
        table = self.block_table.gather(1, blocks.T.long()).T
        return table * BLOCK_SIZE + rows % BLOCK_SIZE

    def rows(self, row: int, layer: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `length` keys and values `[length, kv heads, head_dim]` of one sequence in one layer (views)."""
        start = int(self.starts[row])
        return self.k_slots[layer, start : start + length], self.v_slots[layer, start : start + length]


@dataclass(frozen=True)
class Workspace:
    """Keys and values of all rows in the layers up to a pruning stage; `[layers, T, kv heads, head_dim]` each."""

    k: torch.Tensor
    v: torch.Tensor

    @classmethod
    def allocate(
        cls, config: TextConfig, layers: int, rows: int, dtype: torch.dtype, device: torch.device
    ) -> Workspace:
        shape = (layers, rows, config.num_kv_heads, config.head_dim)
        return cls(
            torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device)
        )

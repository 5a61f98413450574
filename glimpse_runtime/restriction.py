# SPDX-License-Identifier: Apache-2.0
"""A batch, its pictures' layout and what the tower gave, without the tokens that a stage dropped.

How many stay is known to the host; which ones is not, and nobody waits to learn it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from glimpse_kernels import Selection
from glimpse_runtime.models.qwen2_5_vl.layout import VisionLayout
from glimpse_runtime.packing import PackedBatch, Picture, rows_and_sequences
from glimpse_runtime.uploads import Arriving, lengths_of, upload


@dataclass(frozen=True)
class Restriction:
    """What stays of a batch.

    Attributes:
        batch: the rows that stay. Its pictures know how many tokens each of them has left. Visual tokens are numbered in
            prompt order, the tower's output too.
        rows: `[T']` int32 where its rows were.
        tokens: `[N']` int64 where its visual tokens were, in prompt order.
    """

    batch: PackedBatch
    rows: torch.Tensor
    tokens: torch.Tensor


def shrunk(batch: PackedBatch, left: Sequence[int], *, probes: bool) -> PackedBatch:
    """What the host knows of a batch of whose pictures so many tokens are left; its tensors are those of before.

    Args:
        probes: whether probe rows stay.
    """
    pictures: list[Picture] = []
    lengths, prompts = list(batch.lengths), list(batch.prompt_lengths)
    at = 0
    for p, count in zip(batch.pictures, left, strict=True):
        pictures.append(replace(p, start=at, left=count))
        at += count
        lengths[p.row] -= p.tokens - count
        prompts[p.row] -= p.tokens - count
    found = replace(batch, lengths=tuple(lengths), prompt_lengths=tuple(prompts), pictures=tuple(pictures))
    return found if probes else replace(found, lengths=tuple(prompts), probed=(), probe_length=0)


def counted(batch: PackedBatch, keep: torch.Tensor) -> list[int]:
    """How many tokens stay of each picture by `keep [N]` bool; that is waited for."""
    bounds = upload(batch.picture_bounds, batch.device)
    return lengths_of(Arriving(counts_before(keep).index_select(0, bounds)))


def restricted(batch: PackedBatch, selection: Selection, left: Sequence[int], *, probes: bool) -> Restriction:
    """Drop what `selection` does not keep.

    Args:
        left: how many visual tokens stay of each picture; has to be true.
        probes: whether `selection` keeps probe rows.
    """
    small = shrunk(batch, left, probes=probes)
    count = sum(left)
    rows = selection.index[: sum(small.lengths)]
    tokens = compacted(selection.keep, count)
    # Where each old row is now; those that went are nowhere, and nobody asks.
    moved = torch.zeros(batch.num_rows, dtype=torch.int64, device=batch.device)
    moved.index_copy_(0, rows.long(), torch.arange(len(rows), device=batch.device))
    visual_rows = moved.index_select(0, batch.visual_rows.index_select(0, tokens))
    token_rows = visual_rows.to(torch.int32)
    from_tower = batch.visual_order.index_select(0, tokens)
    return Restriction(
        replace(
            small,
            ids=batch.ids.index_select(0, rows),
            positions=batch.positions.index_select(1, rows),
            visual_rows=visual_rows,
            visual_order=torch.arange(count, device=batch.device),
            cu_seqlens=selection.cu_seqlens,
            probe_rows=moved.index_select(0, batch.probe_rows.flatten()).view(batch.probe_rows.shape)
            if probes
            else batch.probe_rows[:0],
            token_rows=token_rows,
            tower_rows=token_rows,
            tower_probe=batch.tower_probe.index_select(0, from_tower),
            always_kept=batch.always_kept.index_select(0, rows),
            token_ids=tokens if batch.token_ids is None else batch.token_ids.index_select(0, tokens),
        ),
        rows,
        tokens,
    )


def restricted_layout(layout: VisionLayout, from_tower: torch.Tensor, batch: PackedBatch) -> VisionLayout:
    """Where the tokens lie that stayed, in the order of a restricted batch; nothing of it is about patches.

    Args:
        from_tower: `[N']` int64 row of `layout`, in raster order, that each token of the batch had.
    """
    total, device = layout.token_order.shape[0], batch.device
    keep = torch.zeros(total, dtype=torch.bool, device=device).index_fill_(0, from_tower, True)
    now = torch.zeros(total, dtype=torch.int64, device=device)
    now.index_copy_(0, from_tower, torch.arange(batch.num_visual, device=device))
    in_windows = keep.index_select(0, layout.token_order)
    order = now.index_select(0, layout.token_order.index_select(0, compacted(in_windows, batch.num_visual)))
    return replace(
        layout,
        token_order=order,
        token_rank=torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=device)),
        cu_token_frames=upload(batch.picture_bounds, device),
        cu_token_windows=counts_before(in_windows).index_select(0, layout.cu_token_windows),
        rows=layout.rows.index_select(0, from_tower),
        cols=layout.cols.index_select(0, from_tower),
    )


def counts_before(keep: torch.Tensor) -> torch.Tensor:
    """`[N + 1]` int32: how many of `keep [N]` are true before each place, and behind the last one in all."""
    return torch.cat([keep.new_zeros(1, dtype=torch.int32), keep.cumsum(0, dtype=torch.int32)])


def compacted(keep: torch.Tensor, count: int) -> torch.Tensor:
    """`[count]` int64 places where `keep [N]` is true, ascending; there have to be so many."""
    place = keep.cumsum(0)
    # Those that go are written behind the last one.
    place = torch.where(keep, place - 1, count)
    found = torch.empty(count + 1, dtype=torch.int64, device=keep.device)
    found.scatter_(0, place, torch.arange(len(keep), device=keep.device))
    return found[:count]


def renumbered(cu_seqlens: torch.Tensor, rows: int) -> torch.Tensor:
    """`[3, rows]` int64 rotary positions that count from 0 in each sequence."""
    row, sequence = rows_and_sequences(cu_seqlens, rows)
    return (row - cu_seqlens.index_select(0, sequence)).long().expand(3, -1)


def past(lengths: torch.Tensor) -> torch.Tensor:
    """`[3, B]` int64 rotary positions behind sequences of `lengths [B]` rows that count from 0."""
    return lengths.long().expand(3, -1)

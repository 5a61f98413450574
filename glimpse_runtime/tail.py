# SPDX-License-Identifier: Apache-2.0
"""The layers on the rows that stay, keys and values to the pool, to the logits of the next token.

After a stage these are few rows: on a GPU it takes longer to ask for their kernels than to run them, so they are captured
once for a number of rows and replayed. What a batch is (where its sequences begin, which slots are theirs) is then read
from memory. The rows are rounded up to a bucket; those that belong to no sequence have no slot, nobody attends to them,
and whatever they hold stays in their own row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from glimpse_kernels import attention, rope
from glimpse_runtime.cache import KvLease
from glimpse_runtime.engine import Engine
from glimpse_runtime.graphs import bucket
from glimpse_runtime.models.qwen2_5_vl.decoder import Buffers, Decoder, DecoderLayer, Stream
from glimpse_runtime.packing import rows_and_sequences
from glimpse_runtime.workspace import Scratch

LEAST, LARGEST = 64, 2048
"""Rows between which the layers behind the last stage are captured, all layers where that was before the decoder: with more, the GPU
is what takes the time."""


LEAST_WINDOW = 8192
"""Slots of the pool that captured layers look at, at least: so that it is the same for most batches."""


def row_bucket(rows: int) -> int | None:
    """How many rows are captured for so many: four steps from one power of two to the next. None: too many."""
    if rows > LARGEST:
        return None
    step = max(bucket(rows) // 8, LEAST // 4)
    return max(LEAST, -(-rows // step) * step)


def row_buckets(most: int) -> list[int]:
    """All numbers of rows that are captured for up to `most` rows, the largest first."""
    found = {row_bucket(rows) or LEAST for rows in range(1, min(most, LARGEST) + 1)}
    return sorted(found, reverse=True)


@dataclass(frozen=True)
class Place:
    """Room for the keys and values of a batch in the decoder's last layers.

    Attributes:
        k, v: `[layers, slots, kv heads, head_dim]`; the last ones are those of the last layer.
        starts: `[B]` int32 first slot of each sequence, ascending.
    """

    k: torch.Tensor
    v: torch.Tensor
    starts: torch.Tensor

    def slots(self, cu_seqlens: torch.Tensor, rows: int) -> torch.Tensor:
        """`[rows]` int32 slot of each packed row when sequence b holds rows `cu[b]..cu[b+1]`; -1 past the last one."""
        row, sequence = rows_and_sequences(cu_seqlens, rows)
        own = row + (self.starts - cu_seqlens[:-1]).index_select(0, sequence)
        return torch.where(row < cu_seqlens[-1], own, -1).to(torch.int32)

    def segments(self, cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[2B]` int32 offsets of the queries `cu[b]..cu[b+1]` and of the slots of their keys.

        Between two sequences lies a segment without queries: the slots that the first one does not use (yet).
        """
        begin, end = cu_seqlens[:-1], cu_seqlens[1:]
        keys = torch.stack([self.starts, self.starts + (end - begin)], dim=1)
        return torch.stack([begin, end], dim=1).flatten(), keys.flatten()


def finish(
    engine: Engine,
    lease: KvLease,
    first: int,
    stream: Stream,
    cu_seqlens: torch.Tensor,
    longest: int,
    scratch: Scratch,
    *,
    pruned: bool = True,
) -> torch.Tensor:
    """Layers `first`.. on the rows of `stream`, and the logits `[B, vocabulary]` after the last row of each sequence.

    Args:
        lease: takes their keys and values; its layers end with the last one, and may begin before `first`.
        cu_seqlens: `[B + 1]` int32 where the sequences are; rows behind the last one belong to nobody.
        longest: the most rows a sequence may have.
        scratch: for what the layers leave behind.
        pruned: False for rows that no stage has seen: layers are not captured for them.
    """
    decoder = engine.decoder
    assert lease.layers.start <= first and lease.layers.stop == decoder.config.num_layers
    if first == decoder.config.num_layers:  # the stage was in the last layer
        return decoder.logits(stream)
    rows = row_bucket(stream.hidden.shape[0]) if pruned else None
    if rows is not None and engine.captures(lease):
        return _replayed(engine, lease, first, stream, cu_seqlens, rows)
    into = Buffers.allocate(
        decoder.config, stream.hidden.shape[0], decoder.dtype, decoder.device, scratch.empty
    )
    place = Place(lease.k_slots, lease.v_slots, lease.starts)
    return _layers(decoder, first, stream, place, cu_seqlens, longest, into)


def prepare(engine: Engine, lease: KvLease, first: int, rows: int) -> None:
    """Have layers `first`.. captured for so many rows of a batch like that of `lease`, whose own contents are lost.

    Args:
        rows: at least one a sequence, at most `LARGEST`.
    """
    decoder, batch = engine.decoder, lease.starts.shape[0]
    angles = decoder.config.head_dim // 2
    hidden = torch.zeros(rows, decoder.config.hidden_size, dtype=decoder.dtype, device=decoder.device)
    cos, sin = (torch.zeros(rows, angles, dtype=torch.float32, device=decoder.device) for _ in range(2))
    ends = torch.arange(batch + 1, dtype=torch.int32, device=decoder.device)
    if first < decoder.config.num_layers and engine.captures(lease):
        _replayed(engine, lease, first, Stream(hidden, None, cos, sin), ends, row_bucket(rows) or LARGEST)


def _replayed(
    engine: Engine,
    lease: KvLease,
    first: int,
    stream: Stream,
    cu_seqlens: torch.Tensor,
    rows: int,
) -> torch.Tensor:
    decoder, batch, given = engine.decoder, lease.starts.shape[0], stream.hidden.shape[0]
    window = bucket(sum(lease.capacities), LEAST_WINDOW)
    keys, values = lease.window(window)
    held = engine.workspace.tail(rows, bucket(batch), LARGEST)
    held.hidden[:given].copy_(stream.hidden)
    held.cos[:given].copy_(stream.cos)
    held.sin[:given].copy_(stream.sin)
    if stream.delta is None:
        held.delta.zero_()
    else:
        held.delta[:given].copy_(stream.delta)
    held.cu_seqlens[: batch + 1].copy_(cu_seqlens)
    held.cu_seqlens[batch + 1 :].copy_(cu_seqlens[batch:].expand(held.starts.shape[0] - batch))
    held.starts[:batch].copy_(lease.starts)
    held.starts[batch:].fill_(keys.shape[1])

    def work() -> None:
        """On memory that stays where it is; every number here is in the key."""
        into = Buffers.allocate(decoder.config, rows, decoder.dtype, decoder.device)
        whole = Stream(held.hidden, held.delta, held.cos, held.sin)
        place = Place(keys, values, held.starts)
        _layers(decoder, first, whole, place, held.cu_seqlens, rows, into, held.logits)

    key = ("tail", first, rows, held.starts.shape[0], lease.pool.generation, lease.first, keys.shape[1])
    engine.graphs.run(key, work)
    return held.logits[:batch].clone()


def _layers(
    decoder: Decoder,
    first: int,
    stream: Stream,
    place: Place,
    cu_seqlens: torch.Tensor,
    longest: int,
    into: Buffers,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The layers themselves: nothing here reads a number from the device. The last layer's output is wanted for last rows only."""
    slots = place.slots(cu_seqlens, stream.hidden.shape[0])
    cu_q, cu_k = place.segments(cu_seqlens)
    count = decoder.config.num_layers
    for number in range(first, count - 1):
        layer = decoder.layers[number]
        layer.qkv(decoder.normed(stream, layer.input_norm, into.x), outs=into.qkv)
        q, k, v = (decoder.heads(part) for part in into.qkv)
        keys, values = place.k[number - count], place.v[number - count]
        rope(q, k, stream.cos, stream.sin, v=v, k_out=keys, v_out=values, slots=slots)
        attention(q, keys, values, cu_q, cu_k, causal=True, max_seqlen_q=longest, out=into.attended)
        decoder.finish_layer(layer, stream, into.attended, into)
    layer, keys, values = decoder.layers[-1], place.k[-1], place.v[-1]
    x = decoder.normed(stream, layer.input_norm, into.x)
    write_keys(decoder, layer, stream, x, into, keys, values, slots)
    ends = last_rows(cu_seqlens)
    stream, x = pick(stream, ends), x.index_select(0, ends)
    q = decoder.heads(layer.qkv.parts[0](x))
    rope(q, None, stream.cos, stream.sin)
    cu_q, _ = place.segments(one_each(cu_seqlens))
    attended = attention(q, keys, values, cu_q, cu_k, causal=True, max_seqlen_q=1)
    decoder.finish_layer(layer, stream, attended)
    return decoder.logits(stream, out=out)


def write_keys(
    decoder: Decoder,
    layer: DecoderLayer,
    stream: Stream,
    x: torch.Tensor,
    into: Buffers,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor | None = None,
) -> None:
    """Keys and values of the stream's normed rows `x` in a layer whose queries are not wanted for all of them."""
    layer.qkv.tail(1)(x, outs=into.qkv[1:])
    k, v = (decoder.heads(part) for part in into.qkv[1:])
    nobody = k[:, :0]
    rope(nobody, k, stream.cos, stream.sin, v=v, k_out=keys, v_out=values, slots=slots)


def last_rows(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """`[B]` int64 last packed row of every sequence."""
    return (cu_seqlens[1:] - 1).long()


def one_each(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """`[B + 1]` int32 offsets of one row a sequence."""
    return torch.arange(cu_seqlens.shape[0], dtype=torch.int32, device=cu_seqlens.device)


def pick(stream: Stream, rows: torch.Tensor) -> Stream:
    """Some rows of a stream without a pending `delta`."""
    hidden, cos, sin = (part.index_select(0, rows) for part in (stream.hidden, stream.cos, stream.sin))
    return Stream(hidden, None, cos, sin)

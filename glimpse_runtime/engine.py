# SPDX-License-Identifier: Apache-2.0
"""What a model keeps on its device between two calls: the pool of keys and values, and captured work."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch

from glimpse_runtime.cache import BLOCK_SIZE, KvLease, KvPool, Segment, blocks_for
from glimpse_runtime.device_sampling import Picker
from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.graphs import Capture, Graphs, bucket, capture_on, wait_for
from glimpse_runtime.lanes import DeviceLanes
from glimpse_runtime.memory import DeviceMemory, memory_of, readable
from glimpse_runtime.models.qwen2_5_vl.decoder import Decoder
from glimpse_runtime.token_ring import TokenRing
from glimpse_runtime.workspace import PrefillMemory

logger = logging.getLogger(__name__)

_made: ContextVar[list[KvLease] | None] = ContextVar("leases of the call", default=None)

LEAST_WIDTH = 8
"""Blocks of the narrowest table that steps are captured for."""


def check_memory(device: torch.device, **limits: int | None) -> None:
    """That these bounds, in bytes, can be kept on a device.

    Raises:
        GlimpseError: one is no positive number, or the device is a CPU, where there is nothing to bound.
    """
    for name, limit in limits.items():
        if limit is None:
            continue
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise GlimpseError(f"{name}: expected a number of bytes, found {limit!r}")
        if device.type == "cpu":
            raise GlimpseError(f"{name}: expected none on a CPU, where every call has memory of its own")


@dataclass
class Station:
    """Where a batch is decoded on a GPU: static memory, and who captures the work on it.

    Attributes:
        lanes, picker, ring: the memory.
        graphs: those of the engine; if others are using its memory, or its pool was replaced, work is not captured.
        busy: whether a batch is there.
    """

    lanes: DeviceLanes
    picker: Picker
    ring: TokenRing
    graphs: Graphs
    busy: bool = False


class Engine:
    """The device side of a decoder, for one call at a time.

    On a CPU every lease has a pool of its own, of the size that it needs. On a GPU there is one pool for all of them:
    of `kv_bytes` if that is set, else it grows to the power of two of blocks that a call needs and stays that large.
    A pool that grows is a new one; who holds a lease of the old one keeps that alive.

    Args:
        decoder: the layers that write to the pool.
        capture: how work is captured: "device" for what the device offers, None: it is not.
        kv_bytes: size of the pool on a GPU.
        graph_bytes: bytes of device memory that captured work may hold; None: no bound.
        memory: who is asked about the device's memory; by default the device.

    Attributes:
        graphs: captured work. Its keys hold `pool.generation` where it touches the pool.
        workspace: what prefill works in.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        capture: Capture | Literal["device"] | None = "device",
        kv_bytes: int | None = None,
        graph_bytes: int | None = None,
        memory: DeviceMemory | None = None,
    ) -> None:
        self.decoder = decoder
        self.memory = memory_of(decoder.device) if memory is None else memory
        if capture == "device":
            capture = capture_on(decoder.device, decoder.dtype) if torch.cuda.is_available() else None
        self.graphs = Graphs(capture, graph_bytes)
        self.workspace = PrefillMemory(decoder)
        self._kv_bytes = kv_bytes
        self._pool: KvPool | None = None
        self._generations = 0
        self._stations: dict[tuple[int, tuple[range, ...]], Station] = {}
        self._stream: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has the same bounds, and nothing of what is kept."""
        return _anew, (self.decoder, self._kv_bytes, self.graphs.budget)

    @property
    def pool(self) -> KvPool | None:
        """The pool that the next lease is of, if there is one yet."""
        return self._pool

    def lease(self, capacities: Sequence[int], layers: range | None = None) -> KvLease:
        """Room for `capacities[b]` rows of sequence b in these layers (None: all), until it is released or dropped.

        Raises:
            GlimpseError: it does not fit into the pool.
        """
        whole = range(self.decoder.config.num_layers)
        return self.lease_all([(whole if layers is None else layers, capacities)])[0]

    def lease_all(self, segments: Sequence[Segment]) -> tuple[KvLease, ...]:
        """Room for all segments of a batch: on a GPU in one pool. Leased one by one they might not be, since it grows.

        Raises:
            GlimpseError: they do not fit into the pool.
        """
        if self.decoder.device.type == "cpu":
            pools = [self._make(blocks_for([segment]), segment[0]) for segment in segments]
            found = [pool.lease(rows) for pool, (_, rows) in zip(pools, segments, strict=True)]
            leases = tuple(lease for lease in found if lease is not None)
        else:
            held = None if self._pool is None else self._pool.lease_all(segments)
            if held is None:
                held = self._larger(blocks_for(segments)).lease_all(segments)
            assert held is not None
            leases = held
        made = _made.get()
        if made is not None:
            made.extend(leases)
        return leases

    @contextmanager
    def call(self, *, keep: bool = False) -> Iterator[None]:
        """Around all work of a call. Leases made inside are released when it ends; with `keep`, only if it fails."""
        self._follow()
        made: list[KvLease] = []
        outer = _made.set(made)
        try:
            yield
        except BaseException:
            keep = False
            raise
        finally:
            _made.reset(outer)
            if not keep:
                for lease in made:
                    lease.release()

    def size_pool(self, share: float, work: Callable[[], None]) -> None:
        """Make the pool as large as a GPU allows: `share` of what is free, less what `work` needs beside it.

        Args:
            work: like the most demanding call; it is done once, without capturing.

        Raises:
            GlimpseError: nothing is left.
        """
        if self.decoder.device.type == "cpu":
            return
        self._kv_bytes = None
        self._forget()
        capture, self.graphs.capture = self.graphs.capture, None
        try:
            self.memory.start()
            before = self.memory.used()
            work()
            own = 0 if self._pool is None else self._pool.nbytes
            needed = max(0, self.memory.peak() - before - own)
        finally:
            self.graphs.capture = capture
            self._forget()
        free, graphs = self.memory.free(), self.graphs.budget or 0
        kv_bytes = int(share * free) - needed - graphs
        if kv_bytes < self._bytes(1):
            raise GlimpseError(
                f"not enough memory for keys and values: {readable(free)} free, of which a call needs {readable(needed)} "
                f"beside them and captured work may take {readable(graphs)}"
            )
        self._kv_bytes = kv_bytes

    def station(self, leases: Sequence[KvLease]) -> Station:
        """Where to decode the batch of these leases, one a segment; `leave` it for the next one."""
        count, segments = bucket(len(leases[0].capacities)), tuple(lease.layers for lease in leases)
        station = self._stations.get((count, segments))
        if station is None:
            station = self._stations[count, segments] = self._station(count, segments, self.graphs)
        if station.busy or any(lease.pool is not self._pool for lease in leases):
            station = self._station(count, segments, Graphs(None))
        with torch.inference_mode(False), torch.no_grad():
            station.lanes.widen([bucket(lease.block_table.shape[1], LEAST_WIDTH) for lease in leases])
        station.busy = True
        return station

    def leave(self, station: Station) -> None:
        """The batch is through."""
        station.busy = False

    def captures(self, *leases: KvLease) -> bool:
        """Whether work on these leases may be captured: not on a CPU, nor on a pool that was replaced since."""
        return self.graphs.capture is not None and all(lease.pool is self._pool for lease in leases)

    def _larger(self, blocks: int) -> KvPool:
        """A pool with room for `blocks` more than there are in use."""
        old = self._pool
        if self._kv_bytes is not None:
            total = self._kv_bytes // self._bytes(1)
            if old is not None or blocks > total:
                raise self._full(blocks, total)
            self._pool = self._make(total)
            return self._pool
        used = 0 if old is None else old.blocks - old.runs.free
        old = None
        self._forget()  # before there is a new one
        wanted = bucket(used + blocks)
        free = self.memory.free()
        if self._bytes(wanted) > free:
            wanted = blocks
        if self._bytes(wanted) > free:
            raise GlimpseError(
                f"not enough memory for keys and values: {self._rows(blocks)} asked, {readable(free)} free"
            )
        self._pool = self._make(wanted)
        logger.info("pool of keys and values: %s", self._rows(wanted))
        return self._pool

    def _station(self, count: int, segments: tuple[range, ...], graphs: Graphs) -> Station:
        with torch.inference_mode(False), torch.no_grad():
            lanes = DeviceLanes(self.decoder, count, segments)
            picker = Picker(lanes)
            return Station(lanes, picker, TokenRing(picker.ring), graphs)

    def _follow(self) -> None:
        """What is kept here is written to by one stream after the other, should the caller change streams."""
        if self.decoder.device.type != "cuda":
            return
        now = torch.cuda.current_stream(self.decoder.device)
        if self._stream is not None and self._stream != now:
            now.wait_stream(self._stream)
        self._stream = now

    def _forget(self) -> None:
        """Let go of the pool, and of what was captured: that holds its addresses."""
        if len(self.graphs):
            wait_for(self.decoder.device)  # it may still be running
            self.graphs.drop()
        self._pool = None

    def _make(self, blocks: int, layers: range | None = None) -> KvPool:
        self._generations += 1
        # It outlives this call: no tensor of inference mode, which can be written to in that mode alone.
        with torch.inference_mode(False), torch.no_grad():
            decoder = self.decoder
            return KvPool(decoder.config, blocks, decoder.dtype, decoder.device, self._generations, layers)

    def _full(self, blocks: int, total: int) -> GlimpseError:
        free = total if self._pool is None else self._pool.runs.free
        longest = total if self._pool is None else self._pool.runs.longest
        return GlimpseError(
            f"the pool of keys and values is too small: {self._rows(blocks)} asked, {self._rows(free)} free "
            f"({self._rows(longest)} in one piece) of {self._rows(total)} in all"
        )

    def _bytes(self, blocks: int) -> int:
        return KvPool.bytes_of(self.decoder.config, blocks, self.decoder.dtype)

    def _rows(self, blocks: int) -> str:
        return f"{blocks * BLOCK_SIZE} rows ({readable(self._bytes(blocks))})"


def _anew(decoder: Decoder, kv_bytes: int | None, graph_bytes: int | None) -> Engine:
    return Engine(decoder, kv_bytes=kv_bytes, graph_bytes=graph_bytes)

# SPDX-License-Identifier: Apache-2.0
"""What the first calls of a size would have to wait for, done beforehand; and how large the pool can be."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import TYPE_CHECKING, Any

import torch

from glimpse_runtime import generate as generation
from glimpse_runtime import tail
from glimpse_runtime.cache import BLOCK_SIZE, Segment
from glimpse_runtime.device_decode import DeviceLoop
from glimpse_runtime.device_sampling import Choice
from glimpse_runtime.engine import LEAST_WIDTH
from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.graphs import bucket
from glimpse_runtime.memory import readable
from glimpse_runtime.models.qwen2_5_vl.inputs import check_ids
from glimpse_runtime.sampling import on_device

if TYPE_CHECKING:
    from glimpse_runtime.model import GlimpseModel

logger = logging.getLogger(__name__)

STEPS = 3  # tokens that are decoded: the first one, and two by the layers


@dataclass(frozen=True)
class WarmupReport:
    """What a warm-up left behind.

    Attributes:
        seconds: how long it took.
        graphs, graph_bytes: pieces of captured work, and what they hold of the device.
        kv_rows, kv_bytes: the pool of keys and values; 0 on a CPU, where a call has one of its own.
    """

    seconds: float
    graphs: int
    graph_bytes: int
    kv_rows: int
    kv_bytes: int


def warm_up(
    model: GlimpseModel,
    inputs: Mapping[str, Any] | None,
    *,
    batch_sizes: Sequence[int],
    tokens: int,
    max_new_tokens: int,
    kv_share: float | None,
    progress: Callable[[int, int], None] | None,
    options: Mapping[str, Any],
) -> WarmupReport:
    """See `GlimpseModel.warmup`."""
    began = time.perf_counter()
    engine = model.engine
    sizes = sorted(set(batch_sizes), reverse=True)
    if not sizes or sizes[-1] < 1:
        raise GlimpseError(f"batch_sizes: expected numbers of at least 1, found {list(batch_sizes)}")
    if tokens < 1 or max_new_tokens < 1:
        raise GlimpseError(
            f"tokens, max_new_tokens: expected at least 1, found {tokens} and {max_new_tokens}"
        )
    one = None if inputs is None else dict(inputs)
    if one is not None and (rows := check_ids(one.get("input_ids")).shape[0]) != 1:
        raise GlimpseError(f"inputs: expected one prompt, found {rows}")

    def run(size: int) -> None:
        given = {**options, "max_new_tokens": max_new_tokens}
        if one is None:
            longest = {range(model.base.decoder.config.num_layers): max(tokens, STEPS)}
        else:
            longest = _prompts(model, _repeated(one, size), given)
        if model.device.type != "cpu":  # it has nothing to prepare for decoding
            for rows in _shorter(list(longest.values())):
                _steps_alone(model, list(zip(longest, ([n] * size for n in rows), strict=True)), given)

    if kv_share is not None:
        if one is None:
            raise GlimpseError("kv_share: expected inputs too, to see what a call needs beside the pool")
        if not 0.0 < kv_share <= 1.0:
            raise GlimpseError(f"kv_share: expected a share in (0, 1], found {kv_share!r}")
        engine.size_pool(kv_share, lambda: run(sizes[0]))
    for done, size in enumerate(sizes):
        if progress is not None:
            progress(done, len(sizes))
        run(size)
    if progress is not None:
        progress(len(sizes), len(sizes))
    pool = engine.pool
    report = WarmupReport(
        seconds=time.perf_counter() - began,
        graphs=len(engine.graphs),
        graph_bytes=engine.graphs.cost,
        kv_rows=0 if pool is None else pool.blocks * BLOCK_SIZE,
        kv_bytes=0 if pool is None else pool.nbytes,
    )
    logger.info(
        "warm-up: %.1f s, %d graphs (%s), %d rows of keys and values (%s)",
        report.seconds, report.graphs, readable(report.graph_bytes), report.kv_rows, readable(report.kv_bytes),
    )  # fmt: skip
    return report


def _repeated(inputs: Mapping[str, Any], size: int) -> dict[str, Any]:
    """A batch of so many times the same prompt."""

    def repeat(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.cat([value] * size)
        return list(value) * size if isinstance(value, list | tuple) else value

    return {name: repeat(value) for name, value in inputs.items()}


def _prompts(model: GlimpseModel, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> dict[range, int]:
    """A call that stops after a few tokens of those that it has room for, and the layers behind its stage for batches of shorter prompts.

    Returns:
        the rows that the longest sequence had room for in each segment of the layers.
    """
    given = dict(inputs)
    ids = check_ids(given.pop("input_ids"))
    request = generation.Request.parse(model.generation_config, ids, {**given, **options})
    room, size, engine = request.max_new_tokens, ids.shape[0], model.engine
    with engine.call():
        prefill = model.prefilled(ids, request)
        longest = {lease.layers: max(lease.capacities) for lease in prefill.leases}
        capacities, first = prefill.leases[-1].capacities, prefill.tail_layer
        pruned = bool(prefill.outcomes)
        request.max_new_tokens = min(STEPS, room)
        generation.decode(prefill, ids, request, None, time.perf_counter())
    most = sum(capacities) - size * room
    for rows in tail.row_buckets(most) if pruned else ():
        if rows >= size:  # in a lease no larger than that call's
            with engine.call():
                lease = engine.lease([-(-min(rows, most) // size) + room] * size)
                tail.prepare(engine, lease, first, rows)
    return longest


def _shorter(longest: Sequence[int]) -> list[tuple[int, ...]]:
    """Rows in each segment for which steps are captured with all widths of the block tables that shorter prompts need, the most
    rows first: if sequences of up to `longest` rows shrink in all segments alike."""
    shares = {Fraction(1)}
    for rows in longest:
        width = bucket(-(-rows // BLOCK_SIZE), LEAST_WIDTH)
        while width > LEAST_WIDTH:
            width //= 2
            shares.add(Fraction(width * BLOCK_SIZE, rows))
    return [tuple(ceil(share * rows) for rows in longest) for share in sorted(shares, reverse=True)]


def _steps_alone(model: GlimpseModel, segments: Sequence[Segment], options: Mapping[str, Any]) -> None:
    """Decoding alone, as for sequences of so many rows, from nothing."""
    engine, size = model.engine, len(segments[0][1])
    ids = torch.zeros(size, 1, dtype=torch.int64, device="cpu")
    request = generation.Request.parse(model.generation_config, ids, dict(options))
    choice = on_device(request.config, 1, request.logits_processor) or Choice()
    with engine.call():
        leases = engine.lease_all(segments)
        nowhere = torch.zeros(3, size, dtype=torch.int64, device=model.device)
        logits = torch.zeros(
            size, model.base.decoder.config.vocab_size, dtype=model.dtype, device=model.device
        )
        with closing(DeviceLoop(engine, leases, [nowhere] * len(leases), STEPS)) as loop:
            for _ in loop.tokens(logits, choice, STEPS, ids):
                pass

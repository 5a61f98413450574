# SPDX-License-Identifier: Apache-2.0
"""One row of `bench.gpu_e2e`: a request asked again and again, and everything that is read off it."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench import work
from bench.gpu_e2e_contenders import OURS, Contender, Keep, Original, Runtime, Stock
from bench.gpu_e2e_seams import Marks
from bench.gpu_e2e_world import BEFORE, TEXT, World
from glimpse_runtime.cache import BLOCK_SIZE

GIB = 1 << 30
SKIPPED = 16
"""First tokens of an answer that are not timed: graphs are captured then, and some tokens are on their way to the host."""


@dataclass(frozen=True)
class Row:
    """A row of the plan.

    kind: "check"; "request" (first token with its split, then decoding; one picture); "batch" (decoding of many rows behind one
    prefill); "decode" (the second of two such requests); "room" (memory of a prefill); "start" (warm-up). name: unique.
    how: "dense": the mask in the vision tower of the original; "static": the cache of transformers; "pictures": four pictures
    instead of one. seconds: what it may take; it is not begun where less is left.
    """

    kind: str
    name: str
    contender: str = OURS
    tokens: int = 0
    batch: int = 1
    ratio: float | None = None
    by: str = "cap"
    how: str = ""
    seconds: float = 15.0


def contender(world: World, row: Row) -> Contender:
    if row.contender == OURS:
        return Runtime(world)
    if row.contender == "original":
        return Original(world, "dense" if row.how == "dense" else "flash")
    return Stock(world, static=row.how == "static")


def request(world: World, row: Row, quick: bool = False) -> dict[str, Any]:
    """From the picture in the host's memory to the first token, with the split; then decoding; peak memory of both."""
    resting = world.memory()
    served = contender(world, row)
    prompt, picture, keep = world.prompt(row.tokens), world.picture(row.tokens), Keep(row.ratio, row.by)
    notes: list[str] = []
    if row.by == "threshold":
        assert isinstance(served, Runtime) and row.ratio is not None
        keep = Keep(row.ratio, row.by, served.threshold(prompt, served.patches(picture), row.ratio))
    first: list[float] = []
    phases: list[dict[str, float]] = []
    world.tidy()
    warm, repeats = _repeats(world, row, quick)
    for number in range(warm + repeats):
        picture = world.picture(row.tokens, seed=number)
        began = time.perf_counter()
        made = served.serve(prompt, served.patches(picture), keep, 1)
        first.append(time.perf_counter() - began)
        marks = Marks(world.device)
        marks("start")
        pixels = served.patches(picture).to(world.device)
        marks("preprocess")
        notes += served.serve(prompt, pixels, keep, 1, marks).notes
        phases.append(marks.seconds())
    peak_first = world.peak()
    split = {phase: statistics.median(found[phase] for found in phases[warm:]) for phase in phases[-1]}
    found: dict[str, Any] = {
        "first_s": statistics.median(first[warm:]), "first_samples": first[warm:], "first_call_s": first[0], "phases": split,
    }  # fmt: skip
    found |= decoding(world, row, served, keep, pixels, resting)
    found["peak_first_gib"] = (peak_first - resting) / GIB
    found["notes"] = [*dict.fromkeys([*found.pop("notes"), *notes])]
    if row.contender == OURS:
        found["flop"] = flops(world, row.tokens, made.mask)
    return found


def _repeats(world: World, row: Row, quick: bool) -> tuple[int, int]:
    """Requests that warm up, and that are timed: the others take several times as long as the runtime."""
    most = 2 if quick else world.scale.repeats
    large = row.tokens == world.scale.tokens[-1]
    if row.contender == OURS:
        return min(2, most), max(1, most // 2) if large else most
    return 1, 1 if large else min(3, most)


def batch(world: World, row: Row) -> dict[str, Any]:
    """Many rows at once: how fast they are decoded, behind one prefill, which counts as it comes."""
    resting = world.memory()
    served = contender(world, row)
    keep = Keep(row.ratio, row.by)
    pixels = world.patches(row.tokens, row.batch)
    return decoding(world, row, served, keep, pixels, resting)


def decode_twice(world: World, row: Row) -> dict[str, Any]:
    """Decoding of the second of two equal requests: the first one compiles, for as long as that takes."""
    resting = world.memory()
    served = contender(world, row)
    pixels = world.patches(row.tokens, row.batch)
    began = time.perf_counter()
    served.serve(world.prompt(row.tokens, row.batch), pixels, Keep(row.ratio, row.by), world.scale.new_slow)
    first = time.perf_counter() - began
    found = decoding(world, row, served, Keep(row.ratio, row.by), pixels, resting)
    try:
        frames = dict(torch._dynamo.utils.counters["frames"])
    except AttributeError:  # never imported: nothing was compiled
        frames = {}
    return found | {"first_call_s": first, "compiled_frames": frames.get("ok", 0)}


def decoding(
    world: World, row: Row, served: Contender, keep: Keep, pixels: torch.Tensor, resting: int
) -> dict[str, Any]:
    """Time of a step, tokens a second and the bytes that a step has to read; peak memory over what was held before."""
    slow = row.contender != OURS
    new = world.scale.new_slow if slow else world.scale.new
    skip = min(SKIPPED, new // 3)
    prompt = world.prompt(row.tokens, row.batch)
    world.tidy()
    began = time.perf_counter()
    made = served.serve(prompt, pixels, keep, new)
    whole = time.perf_counter() - began
    step = made.beat.step(skip)
    notes = [] if made.tokens.shape[1] == new else [f"ended after {made.tokens.shape[1]} of {new} tokens"]
    kept = made.kept or [row.tokens] * row.batch
    rows = [TEXT + k + new / 2 for k in kept]
    reads = step_bytes(world, rows)
    return {
        "step_s": step, "tokens_s": row.batch / step, "step_bytes": reads, "whole_s": whole, "new": new, "kept": kept[0],
        "kept_rows": [min(kept), max(kept)], "peak_gib": (world.peak() - resting) / GIB, "resting_gib": resting / GIB,
        "notes": notes,
    }  # fmt: skip


def step_bytes(world: World, rows: list[float]) -> float:
    """What a decode step has to read: weights once, keys and values of every row's `rows` tokens."""
    decoder, text = world.base.decoder, world.base.config.text
    return work.decode_bytes(decoder, 0.0) + work.kv_bytes(text, sum(rows), decoder.dtype)


def flops(world: World, tokens: int, mask: torch.Tensor | None) -> dict[str, float]:
    """What each phase of a request with one picture has to compute at least. mask: which of its tokens stay; None: all."""
    base, rows, side = world.base, TEXT + tokens, 2 * round(tokens**0.5)
    done = {"vision": work.vision(base.config.vision, (1, side, side))}
    if mask is None:
        done["after"] = work.to_first_token(base.config.text, rows)
    else:
        stage = world.plan.stages[0]
        scorer: Any = stage.score
        kept = [
            *range(BEFORE),
            *(BEFORE + i for i in mask.nonzero()[:, 0].tolist()),
            *range(BEFORE + tokens, rows),
        ]
        probed = rows + scorer.probe.length
        done["before"] = work.to_scores(base.config.text, probed, stage.at.index, tokens, scorer.weights)
        done["select"] = work.prediction(scorer.weights, tokens)
        done["after"] = work.after_pruning(base.config.text, stage.at.index, kept)
    return {phase: amount.total for phase, amount in done.items()}


def room(world: World, row: Row) -> dict[str, Any]:
    """Peak memory of one prefill by a model that has served nobody, and what its keys and values take.

    how: "pictures": four pictures of a quarter of the tokens in one prompt.
    """
    world.tidy()
    resting = world.memory()
    model = world.ours()
    keep = Keep(row.ratio)
    options: dict[str, Any] = {"plan": None} if row.ratio is None else keep.options()
    prompt = world.prompt(row.tokens)
    ids, grids = prompt.ids, prompt.grids
    if row.how == "pictures":
        side = round((row.tokens // 4) ** 0.5)
        mark = ids.new_full((1, 1), 7)
        one = ids.new_full((1, side * side), world.image_token)
        ids = torch.cat([ids[:, :BEFORE], *[one, mark] * 4, ids[:, BEFORE + row.tokens :]], dim=1)
        grids = grids.new_tensor([[1, 2 * side, 2 * side]] * 4)
    pixels = world.patches(row.tokens, 1)
    inputs = {"input_ids": ids, "image_grid_thw": grids, "pixel_values": pixels}
    # A drop-in's pool grows in powers of two; what the rows themselves take is told apart.
    state = model.prefill(**inputs, **options, max_new_tokens=NEW)
    done = state.last_logits.isfinite().all()
    text = world.base.config.text
    capacity = sum(_capacities(state, ids.shape[1]))
    return {
        "peak_gib": (world.peak() - resting - pixels.nbytes) / GIB, "finite": bool(done), "rows": capacity,
        "kv_bytes": work.kv_bytes(text, capacity, world.scale.dtype), "new": NEW,
        "kept": None if state.pruning is None else state.pruning.kept,
    }  # fmt: skip


FEWEST = 0.074
NEW = 32
"""Share of the tokens that stays, and new tokens that room is kept for, where sequences are counted."""


def _capacities(state: Any, length: int) -> list[int]:
    """Rows that the pool keeps for each sequence, from the prefill's lease; by counting where that is not to be had."""
    lease = getattr(getattr(state, "_state", None), "pool", None)
    found = getattr(lease, "capacities", None)
    if found:
        return [int(rows) for rows in found]
    kept = length if state.pruning is None else length - state.pruning.total + state.pruning.kept
    return [-(-(kept + NEW) // BLOCK_SIZE) * BLOCK_SIZE]


def start(world: World, row: Row) -> dict[str, Any]:
    """`warmup` of the runtime: decoding for all batch sizes; a whole request, and whether the first one after it has anything left
    to wait for; and how many sequences a pool of 90 % of the free memory has room for."""
    scale, keep = world.scale, Keep(FEWEST)
    prompt, pixels = world.prompt(row.tokens), world.patches(row.tokens, 1)
    many = world.ours().warmup(
        batch_sizes=list(scale.batches), tokens=row.tokens + TEXT + scale.new, max_new_tokens=scale.new
    )
    found: dict[str, Any] = {"decoding": asdict(many), "batch_sizes": list(scale.batches)}
    world.tidy()
    served = Runtime(world)
    inputs = prompt.inputs | {"pixel_values": pixels}
    options = keep.options() | {"do_sample": False, "eos_token_id": world.end, "pad_token_id": 0}
    whole = served.model.warmup(inputs, max_new_tokens=scale.new, kv_share=0.9, **options)
    found["request"] = asdict(whole)
    lasted = []
    for _ in range(3):
        began = time.perf_counter()
        served.serve(prompt, pixels, keep, 1)
        lasted.append(time.perf_counter() - began)
    found["first_requests_s"] = lasted
    for name, ratio in (("unpruned", None), ("pruned", FEWEST)):
        rows = TEXT + NEW + (row.tokens if ratio is None else int(ratio * row.tokens))
        found[f"sequences_{name}"] = whole.kv_rows // (-(-rows // BLOCK_SIZE) * BLOCK_SIZE)
    return found


def described(row: Row) -> dict[str, Any]:
    return {k: v for k, v in asdict(row).items() if k != "seconds"}

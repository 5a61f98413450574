# SPDX-License-Identifier: Apache-2.0
"""What has to be right before anything is timed: each check raises AssertionError, or says what it saw.

Those of `SMALL` run on the model of this repository in fp32, where two correct programs choose the same tokens; those of `LARGE`
on the model that is measured, in bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from bench.gpu_e2e_contenders import Keep, Runtime, Stock
from bench.gpu_e2e_world import Prompt, World
from bench.original_path import OriginalPath

NEW = 24
SCORE_NOISE = 2e-3
"""Of fp32 sums in two orders, the tensor cores being off: most scores, and of the largest one the worst. The pictures are noise, for
which the predictor is steep in places. A wrong variant is off by whole units everywhere."""


def same_choice(world: World) -> dict[str, Any]:
    """The transcription and the runtime score alike, and choose the same tokens from the same scores."""
    model, path = world.ours(), OriginalPath(world.hf, world.modules)
    worst, most, counts = 0.0, 0.0, []
    for seed, tokens in enumerate(world.scale.tokens):
        prompt, pixels = world.prompt(tokens, seed=seed), world.patches(tokens, 1, seed)
        theirs = path.prefill(prompt.ids, pixels, prompt.grids)
        waiting = model.prefill(**prompt.inputs, pixel_values=pixels, select=False)
        assert waiting.scores is not None
        apart = (waiting.scores - theirs.scores[0]).abs()
        worst = max(worst, float(apart.max() / theirs.scores.abs().max()))
        most = max(most, float(apart.quantile(0.9)))
        for keep in (Keep(0.074), Keep(0.22), Keep(1.0, "threshold", 0.5)):
            made = Runtime.serve(_with(world, model), prompt, pixels, keep, 1)
            again = model.prefill(**prompt.inputs, pixel_values=pixels, select=False).scores
            assert again is not None and made.mask is not None
            # Its probabilities are 1 for many a large score, and which of equals it takes is torch's secret: smaller ones, in the
            # same order and on the same side of the threshold.
            small = again[None] * (8.0 / again.abs().max())
            chosen = path._choose(small, keep.threshold, keep.options()["max_remain_ratio"])[0].cpu()
            assert torch.equal(chosen, made.mask), (
                f"{tokens} tokens, {keep}: {(chosen != made.mask).sum()} tokens differ"
            )
            counts.append(int(chosen.sum()))
    assert max(worst, most) <= SCORE_NOISE, (
        f"scores differ: nine of ten by up to {most:.3g}, the worst by {worst:.2g} of the largest"
    )
    return {"scores_apart": most, "worst_of_largest": worst, "kept": counts}


def same_tokens(world: World) -> dict[str, Any]:
    """Greedy answers: unpruned those of transformers, pruned those of the transcription, for the same masks."""
    ours, stock, path = Runtime(world), Stock(world), OriginalPath(world.hf, world.modules)
    compared = 0
    for seed, tokens in enumerate(world.scale.tokens):
        prompt, pixels = world.prompt(tokens, seed=seed), world.patches(tokens, 1, seed)
        plain = ours.serve(prompt, pixels, Keep(), NEW).tokens
        wanted = stock.serve(prompt, pixels, Keep(), NEW).tokens
        assert torch.equal(plain, wanted), (
            f"{tokens} tokens, unpruned: {plain.tolist()} and {wanted.tolist()}"
        )
        pruned = ours.serve(prompt, pixels, Keep(0.22), NEW)
        assert pruned.mask is not None
        done = path.prefill(prompt.ids, pixels, prompt.grids, keep=pruned.mask[None])
        wanted = path.decode(done, NEW, world.end).cpu()
        assert torch.equal(pruned.tokens, wanted), (
            f"{tokens} tokens: {pruned.tokens.tolist()} and {wanted.tolist()}"
        )
        compared += plain.numel() + wanted.numel()
    return {"compared": compared}


def no_waits(world: World) -> dict[str, Any]:
    """With torch's synchronisations as errors, once everything is compiled and captured: prefill by the cap, and a whole request."""
    ours = Runtime(world)
    prompt, pixels = world.prompt(world.scale.tokens[0]), world.patches(world.scale.tokens[0], 1)
    for keep in (Keep(0.074), Keep()):
        options: dict[str, Any] = {"plan": None} if keep.ratio is None else keep.options()

        def prefill(options: dict[str, Any] = options) -> None:
            ours.model.prefill(**prompt.inputs, pixel_values=pixels, **options)

        for work in (prefill, lambda keep=keep: ours.serve(prompt, pixels, keep, NEW)):
            for _ in range(2):
                work()
        with waits_are_errors(world.device):
            prefill()
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": world.end, "pad_token_id": 0}
    with waits_are_errors(world.device):
        ours.model.generate(**prompt.inputs, pixel_values=pixels, **options, **Keep(0.074).options())
    return {"enforced": world.device.type == "cuda"}


def graphs_equal_eager(world: World) -> dict[str, Any]:
    """Answers of a model that captures, and of one that does not, token for token; sampling from one token is greedy."""
    captured, eager = Runtime(world), Runtime(world, capture=None)
    some = 0
    for keep in (Keep(), Keep(0.22)):
        for rows in sorted({1, world.scale.batches[-1]}):
            for prompt, pixels in _prompts(world, rows):
                found = captured.serve(prompt, pixels, keep, NEW).tokens
                wanted = eager.serve(prompt, pixels, keep, NEW).tokens
                assert torch.equal(found, wanted), (
                    f"{rows} rows, {keep}: {found.tolist()} and {wanted.tolist()}"
                )
                some += found.numel()
    prompt, pixels = next(_prompts(world, 1))
    options = {"max_new_tokens": NEW, "eos_token_id": world.end, "pad_token_id": 0, "plan": None}
    answers = [
        captured.model.generate(**prompt.inputs, pixel_values=pixels, **options, **how)
        for how in ({"do_sample": False}, {"do_sample": True, "top_k": 1, "temperature": 0.7})
    ]
    assert torch.equal(answers[0].cpu(), answers[1].cpu()), "sampling with top_k=1 is not greedy"
    return {"compared": some, "graphs": len(captured.model.engine.graphs)}


def short_then_long(world: World) -> dict[str, Any]:
    """What was captured by a short request serves a long one: other lengths, more steps than a chunk of the schedule."""
    ours, eager = Runtime(world), Runtime(world, capture=None)
    small, _, large = world.scale.tokens
    long = 80
    for keep in (Keep(0.22), Keep()):
        for tokens, new in ((small, 4), (small, long), (large, long), (small, 6), (large, 5)):
            prompt, pixels = world.prompt(tokens, seed=tokens), world.patches(tokens, 1, tokens)
            found = ours.serve(prompt, pixels, keep, new).tokens
            wanted = eager.serve(prompt, pixels, keep, new).tokens
            assert torch.equal(found, wanted), f"{tokens} tokens, {new} new, {keep}"
    return {"graphs": len(ours.model.engine.graphs)}


def finite(world: World) -> dict[str, Any]:
    """Logits of the random model are numbers; the share of tokens on which graphs and single launches agree in bf16."""
    captured, eager = Runtime(world), Runtime(world, capture=None)
    tokens = world.scale.tokens[0]
    prompt, pixels = world.prompt(tokens), world.patches(tokens, 1)
    found: dict[str, Any] = {}
    for name, keep in (("unpruned", Keep()), ("pruned", Keep(0.074))):
        options: dict[str, Any] = {"plan": None} if keep.ratio is None else keep.options()
        logits = captured.model.prefill(**prompt.inputs, pixel_values=pixels, **options).last_logits
        assert bool(logits.isfinite().all()), f"{name}: logits that are no numbers"
        spread = float(logits.float().std())
        assert 0.05 < spread < 50, f"{name}: logits spread by {spread:.3g}: the weights have no sane scale"
        pair = [runtime.serve(prompt, pixels, keep, NEW).tokens for runtime in (captured, eager)]
        found[name] = {"spread": spread, "equal": int((pair[0] == pair[1]).sum()), "of": pair[0].numel()}
        found[name]["different_tokens"] = len(set(pair[0][0].tolist()))
    return found


SMALL: dict[str, Callable[[World], dict[str, Any]]] = {
    check.__name__: check
    for check in (same_choice, same_tokens, no_waits, graphs_equal_eager, short_then_long)
}
LARGE: dict[str, Callable[[World], dict[str, Any]]] = {"finite": finite, "no_waits_large": no_waits}
ALL: Mapping[str, Callable[[World], dict[str, Any]]] = {**SMALL, **LARGE}


@contextmanager
def waits_are_errors(device: torch.device) -> Iterator[None]:
    """On a GPU, RuntimeError wherever torch makes the host wait for it."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
        torch.cuda.synchronize()


@contextmanager
def exact_products() -> Iterator[None]:
    """fp32 products and convolutions in fp32: with the tensor cores' shorter numbers two correct programs choose different tokens."""
    before, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = convolutions


def _with(world: World, model: Any) -> Runtime:
    found = Runtime.__new__(Runtime)
    found.name, found.world, found.model = "runtime", world, model
    return found


def _prompts(world: World, rows: int) -> Iterator[tuple[Prompt, torch.Tensor]]:
    """Batches of `rows`, each with a picture: of one size, and then, if there are several, of all sizes."""
    tokens = world.scale.tokens[1]
    yield world.prompt(tokens, rows), world.patches(tokens, rows)
    if rows == 1:
        return
    sizes = [world.scale.tokens[row % 3] for row in range(rows)]
    alone = [world.prompt(size, seed=row) for row, size in enumerate(sizes)]
    longest = max(p.ids.shape[1] for p in alone)
    ids = torch.zeros(rows, longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(alone):
        ids[row, longest - prompt.ids.shape[1] :] = prompt.ids[0]
        mask[row, longest - prompt.ids.shape[1] :] = 1
    pixels = torch.cat([world.patches(size, 1, row) for row, size in enumerate(sizes)])
    yield Prompt(ids, torch.cat([p.grids for p in alone]), mask), pixels

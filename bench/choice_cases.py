# SPDX-License-Identifier: Apache-2.0
"""The calls by which `bench.choices` compares the kernels of the ops that have two, and those of `attention` and the libraries.

The grid is coarse on purpose: a call takes the nearest measured one. Sizes are those of the 7B model where nothing else is said,
dtypes those a model runs in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from unittest import mock

import torch
from torch import Tensor

import glimpse_kernels as kernels
from bench.backends import forced
from bench.op_cases import _decode, nbytes, scores
from bench.op_cases_greedy import COUNTS, GREEDY
from bench.op_cases_select import _compact, _select
from bench.op_registry import TINY, Results, Sizes, Work, sizes
from glimpse_kernels import dispatch, measured, proof
from glimpse_kernels.attention import choice
from glimpse_kernels.attention.naive import attention as naive_attention
from glimpse_kernels.patchify.naive import patchify as naive_patchify

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # Qwen2-VL's processor
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
TEXT, VISION, DIMS = (28, 4), (16, 16), (128, 80)
"""Query and key heads of the language model and of the vision tower, and their sizes."""
WINDOW = 64
CHECKED_ROWS, CHECKED_SEGMENTS = 64, 4


@dataclass(frozen=True)
class Contest:
    """One call, ready to be made. checks: what the gate looks at, by provider; calls: what the clock looks at.

    work: the definition and plain torch, whose `ours` is not used.
    """

    work: Work
    checks: Mapping[str, Callable[[], Results]]
    calls: Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Choice:
    """A call to be measured; nothing is allocated before `build`, whose second argument takes the kinds of call it is kept by
    (`glimpse_kernels.measured.kind`)."""

    op: str
    label: str
    dtype: torch.dtype
    build: Callable[[tuple[str, ...], set[str]], Contest]


@contextmanager
def noted(op: str, kinds: set[str]) -> Iterator[None]:
    """Inside the block `kinds` takes the kind of every call of the op: as the op itself tells it, so that the two cannot differ."""
    real = dispatch.select

    def select(
        name: str,
        device: torch.device | str,
        dtype: torch.dtype,
        *,
        grad: bool = False,
        size: tuple[int, ...] = (),
    ) -> dispatch.BackendFn:
        if name == op and size:
            kinds.add(measured.kind(dtype, size))
        return real(name, device, dtype, grad=grad, size=size)

    with mock.patch.object(dispatch, "select", select):
        yield


def _between_backends(op: str, label: str, dtype: torch.dtype, make: Callable[[], Work]) -> Choice:
    def build(providers: tuple[str, ...], kinds: set[str]) -> Contest:
        def anew() -> Work:
            torch.manual_seed(0)
            return make()

        def check(backend: str) -> Callable[[], Results]:
            def run() -> Results:
                work = anew()  # buffers that no other backend has written to
                with noted(op, kinds):
                    return forced(backend, work.ours)()

            return run

        first = anew()
        return Contest(first, {b: check(b) for b in providers}, {b: forced(b, first.ours) for b in providers})

    return Choice(op, label, dtype, build)


def _patchify(height: int, width: int, size: tuple[int, int] | None = None) -> Work:
    image = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8)
    pixels = (size or (height, width))[0] * (size or (height, width))[1]

    def by(function: Callable[..., Tensor]) -> Callable[[], Results]:
        return lambda: (function(image, mean=MEAN, std=STD, **({} if size is None else {"size": size})),)

    # In fp32 the definition itself is the plain formulation: what a resize gives byte by byte, torch has in no other way.
    amount = nbytes(image) + 2 * 4 * 3 * pixels
    return Work(by(kernels.patchify), by(naive_patchify), by(naive_patchify), amount, "byte")


def between_backends(rehearse: bool = False) -> Iterator[Choice]:
    """Every op that has a kernel in Triton and one in CUDA C++."""
    half = torch.float32 if rehearse else torch.bfloat16
    fp32 = torch.float32

    def s(side: int, model: str = "7b") -> Sizes:
        return replace(TINY, side=4) if rehearse else sizes(model, side)

    for side, pictures, together in (
        (16, 1, False),
        (32, 1, False),
        (64, 1, False),
        (128, 1, False),
        (32, 16, False),
        (64, 16, False),
        (64, 16, True),
    ):
        n = 2 if rehearse and pictures > 1 else pictures
        yield _between_backends(
            "select_tokens", f"{n} x {side}x{side}{', one group' if together else ''}", fp32,
            lambda side=side, n=n, together=together: _select(s(side), n, together=together),
        )  # fmt: skip
    for side, layers, rows, room in (
        (16, None, "kept", "kept"),
        (32, None, "kept", "kept"),
        (64, None, "kept", "kept"),
        (64, None, "kept", "all"),
        (64, None, "all", "all"),
        (32, 1, "kept", "kept"),
        (128, 1, "all", "all"),
    ):
        at = s(side) if layers is None else replace(s(side), cached=layers)
        count = {"kept": at.kept, "all": at.rows}
        yield _between_backends(
            "compact", f"{at.cached} layers, {count[rows]} rows, room for {count[room]}", half,
            lambda at=at, rows=count[rows], room=count[room]: _compact(at, half, rows, room),
        )  # fmt: skip
    for batch, length in ((1, 512), (1, 2048), (1, 8192), (1, 32768), (8, 512), (8, 4096), (32, 4096)):
        batch, length = (min(batch, 2), min(length, 40)) if rehearse else (batch, length)
        yield _between_backends(
            "decode_attention", f"{batch} rows of {length}", half,
            lambda batch=batch, length=length: _decode(s(32), batch, length, half),
        )  # fmt: skip
    for side, model in ((16, "7b"), (32, "7b"), (64, "7b"), (128, "7b"), (32, "3b")):
        yield _between_backends(
            "glimpse_scores", f"{side}x{side}, {model}", half,
            lambda side=side, model=model: scores(s(side, model), half),
        )  # fmt: skip
    for op, make in GREEDY.items():
        for groups, what in COUNTS.items():
            yield _between_backends(
                op, what, half, lambda make=make, groups=groups: make(s(32), half, groups)
            )
    for edge, given in ((448, None), (896, None), (1792, None), (3584, None), (896, (1200, 1600))):
        edge, given = (56, given and (70, 90)) if rehearse else (edge, given)
        size = None if given is None else (edge, edge)
        yield _between_backends(
            "patchify", f"{edge} px{', resized' if given else ''}", fp32,
            lambda given=given or (edge, edge), size=size: _patchify(*given, size),
        )  # fmt: skip


def attention_calls(rehearse: bool = False) -> Iterator[tuple[choice.Call, bool]]:
    """The calls of a model, and whether each asks for the lse."""

    def call(
        segments: int, queries: int, keys: int, heads: tuple[int, int], dim: int, *, causal: bool
    ) -> choice.Call:
        return choice.Call(
            dtype=torch.float32 if rehearse else torch.bfloat16, dim=dim, v_dim=dim, heads=heads[0], kv_heads=heads[1],
            causal=causal, positions=False, segments=segments, queries=segments * queries, keys=segments * keys, bounded=True,
        )  # fmt: skip

    text, vision, dims = ((4, 2), (2, 2), (16, 16)) if rehearse else (TEXT, VISION, DIMS)
    for length in (WINDOW,) if rehearse else LENGTHS:
        windows = 2 if rehearse else length * 4 // WINDOW
        yield call(1, length, length, text, dims[0], causal=True), False
        yield call(1, 1, length, text, dims[0], causal=True), True
        yield call(1, length, length, vision, dims[1], causal=False), False
        yield call(windows, WINDOW, WINDOW, vision, dims[1], causal=False), False


def attention_providers(call: choice.Call, ours: bool) -> tuple[str, ...]:
    """Ours (if wanted) and the libraries that serve the call."""
    libraries = (name for name in choice.OTHERS if not choice.against(name, call))
    return (*((choice.OURS,) if ours else ()), *libraries)


def attention_choices(rehearse: bool = False) -> Iterator[tuple[Choice, tuple[str, ...]]]:
    """With the providers of each."""
    ours = rehearse or proof.proven("attention", choice.OURS)
    for call, lse in attention_calls(rehearse):
        found = Choice(
            "attention",
            f"{call.key()}, {call.segments} segments",
            call.dtype,
            lambda providers, kinds, call=call, lse=lse: _attention(call, lse, providers, kinds),
        )
        yield found, attention_providers(call, ours)


def _attention(call: choice.Call, lse: bool, providers: tuple[str, ...], kinds: set[str]) -> Contest:
    """Every provider gives the op's own results: rows outside all segments and the lse are put right inside the time. They are
    checked on some rows of a long segment, and on the first of many segments."""
    kinds.add(call.key())
    torch.manual_seed(0)
    q = torch.randn(call.queries, call.heads, call.dim).to(call.dtype)
    k = torch.randn(call.keys, call.kv_heads, call.dim).to(call.dtype)
    v = torch.randn(call.keys, call.kv_heads, call.v_dim).to(call.dtype)
    lq, lk = call.queries // call.segments, call.keys // call.segments
    each = torch.arange(call.segments + 1, dtype=torch.int32)
    cu_q, cu_k = each * lq, each * lk
    if lq == lk:
        cu_k = cu_q  # what is one tensor for the caller is one for the provider

    out = torch.empty(
        call.queries, call.heads, call.v_dim, dtype=call.dtype
    )  # as the runtime's calls have one

    def run(name: str) -> Results:
        serve = import_module(f"glimpse_kernels.attention.{name}").attention
        found = serve(q, k, v, cu_q, cu_k, causal=call.causal, max_seqlen_q=lq, out=out, return_lse=lse)
        return tuple(found) if lse else (found,)

    def check(name: str) -> Results:
        out.fill_(float("nan"))
        return tuple(t[rows] for t in run(name))

    if call.segments > 1:
        count = min(CHECKED_SEGMENTS, call.segments)
        rows = torch.arange(count * lq)
    else:
        count = 1
        rows = torch.arange(0, lq, max(1, lq // CHECKED_ROWS))
    picked, keys, values = q[rows], k[: count * lk], v[: count * lk]
    bounds = torch.arange(count + 1, dtype=torch.int32)
    places = (rows % lq + lk - lq).int() if call.causal else None

    def truth() -> Results:
        found = naive_attention(
            picked.float(), keys.float(), values.float(), bounds * (len(rows) // count), bounds * lk,
            causal=call.causal, q_positions=places, return_lse=lse,
        )  # fmt: skip
        return tuple(found) if lse else (found,)  # type: ignore[return-value]

    def plain() -> Results:
        """Every step in the dtype of the call, as the rule for rounding asks (`bench.gate`)."""
        group = call.heads // call.kv_heads
        qs, ks, vs = (t.unflatten(0, (count, -1)).transpose(1, 2) for t in (picked, keys, values))
        logits = call.dim**-0.5 * qs @ ks.repeat_interleave(group, 1).transpose(-1, -2)
        if places is not None:
            hidden = torch.arange(lk) > places.view(count, 1, -1, 1)
            logits = logits.masked_fill(hidden, float("-inf"))
        o = logits.softmax(-1) @ vs.repeat_interleave(group, 1)
        sums = logits.float().logsumexp(-1).transpose(1, 2).flatten(0, 1)
        return (o.transpose(1, 2).flatten(0, 1), *((sums,) if lse else ()))

    work = Work(plain, plain, truth, 0.0, "flop")
    return Contest(
        work,
        {name: partial(check, name) for name in providers},
        {name: partial(run, name) for name in providers},
    )

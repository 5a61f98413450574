# SPDX-License-Identifier: Apache-2.0
"""Times our attention and the libraries' on this GPU, and records who is fastest for which kind of call.

python -m bench.attention_choice                 writes glimpse_kernels/attention/measured.json, which `auto` believes
python -m bench.attention_choice --dry           only prints

Every provider gives the op's own results: rows outside all segments and the lse are put right inside the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench.gpu_timing import CudaWatch
from glimpse_kernels.attention import choice

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
HEADS = ((28, 4), (16, 2))
VISION = (16, 80)
WINDOW = 64
ROUNDS = 9
SECONDS = 0.02


def calls() -> Iterator[tuple[choice.Call, bool]]:
    """The calls of a model, and whether each asks for the lse."""

    def call(
        segments: int, queries: int, keys: int, heads: tuple[int, int], dim: int, *, causal: bool
    ) -> choice.Call:
        return choice.Call(
            dtype=torch.bfloat16, dim=dim, v_dim=dim, heads=heads[0], kv_heads=heads[1], causal=causal, positions=False,
            segments=segments, queries=segments * queries, keys=segments * keys, bounded=True,
        )  # fmt: skip

    for length in LENGTHS:
        yield call(1, length, length, HEADS[0], 128, causal=True), False
        yield call(1, 1, length, HEADS[0], 128, causal=True), True
        yield call(1, length, length, (VISION[0], VISION[0]), VISION[1], causal=False), False
        yield (
            call(length * 4 // WINDOW, WINDOW, WINDOW, (VISION[0], VISION[0]), VISION[1], causal=False),
            False,
        )


def providers(call: choice.Call) -> list[str]:
    return [choice.OURS, *(name for name in choice.OTHERS if not choice.against(name, call))]


def contenders(call: choice.Call, lse: bool) -> dict[str, Callable[[], tuple[torch.Tensor, ...]]]:
    """A function for each provider that serves the call, on equal tensors."""
    device = torch.device("cuda")
    q = torch.randn(call.queries, call.heads, call.dim, device=device).to(call.dtype)
    k = torch.randn(call.keys, call.kv_heads, call.dim, device=device).to(call.dtype)
    v = torch.randn(call.keys, call.kv_heads, call.v_dim, device=device).to(call.dtype)
    each = torch.arange(call.segments + 1, dtype=torch.int32, device=device)
    cu_q = each * (call.queries // call.segments)
    cu_k = cu_q if call.queries == call.keys else each * (call.keys // call.segments)
    out = torch.empty_like(q)

    def of(name: str) -> Callable[[], tuple[torch.Tensor, ...]]:
        serve = import_module(f"glimpse_kernels.attention.{name}").attention

        def run() -> tuple[torch.Tensor, ...]:
            found = serve(
                q,
                k,
                v,
                cu_q,
                cu_k,
                causal=call.causal,
                max_seqlen_q=call.queries // call.segments,
                out=out,
                return_lse=lse,
            )
            return found if lse else (found,)

        return run

    return {name: of(name) for name in providers(call)}


def main(
    dry: Annotated[bool, typer.Option(help="Print, and leave the record alone.")] = False,
) -> None:
    """Needs a CUDA GPU. A call of several segments is kept under its average lengths, whatever their number."""
    watch = CudaWatch()
    device = torch.cuda.get_device_name()
    found = {name: dict(cases) for name, cases in choice.record().items()}
    cases: dict[str, dict[str, float]] = {}
    table = Table("call", *(choice.OURS, *choice.OTHERS))
    for call, lse in calls():
        timed = watch.interleaved(contenders(call, lse), rounds=ROUNDS, seconds=SECONDS)
        seconds = {name: sorted(t.seconds)[len(t.seconds) // 2] for name, t in timed.items() if t.seconds}
        # windows come in many numbers under one key: the most of them decides
        cases[call.key()] = seconds
        table.add_row(
            call.key(),
            *(f"{1e6 * seconds[n]:.1f} us" if n in seconds else "" for n in (choice.OURS, *choice.OTHERS)),
        )
    Console(width=160).print(table)
    if not dry:
        choice.write({**found, device: cases})


if __name__ == "__main__":
    typer.run(main)

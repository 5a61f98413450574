# SPDX-License-Identifier: Apache-2.0
"""Captured with short lengths, replayed with long ones: nothing that a length decides may be frozen into a CUDA graph.

On a GPU the kernels of CUDA C++ and of Triton go into real graphs. Without one, the emulation keeps the launches of the CUDA C++ kernels
with their arguments and runs them again, which is what a graph does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from glimpse_kernels import _cuda, dispatch
from tests.kernels.kernel_cases import Case, cu_seqlens, op_cases


@dataclass
class Scene:
    """One call of an op on buffers that a graph would hold.

    buffers: the inputs, by name. run: the op on them. scenes: what the buffers hold, first when captured, then at each replay.
    """

    buffers: dict[str, Tensor]
    run: Callable[[dict[str, Tensor]], Any]
    scenes: list[dict[str, Tensor]]


def compact_scene(kernel: Case) -> Scene:
    from glimpse_kernels import compact

    rows, capacity, layers = 40, 24, 3
    k = torch.randn(layers, rows, 2, 16)
    hidden = torch.randn(rows, 24)
    index = torch.randperm(rows, device="cpu")[:capacity].to(kernel.device, torch.int32)
    slots = torch.randperm(30, device="cpu")[:capacity].to(kernel.device, torch.int32)

    def run(given: dict[str, Tensor]) -> list[Tensor]:
        compact(
            given["index"], given["slots"], given["k"], given["v"], given["k_out"], given["v_out"],
            [(given["hidden"], given["into"])],
        )  # fmt: skip
        return [given["k_out"], given["v_out"], given["into"]]

    def alive(n: int, order: Tensor) -> Tensor:
        return torch.where(torch.arange(capacity) < n, order, -1).int()

    untouched = torch.full((layers, 30, 2, 16), 7.0)
    first = {
        "index": alive(2, index), "slots": alive(2, slots), "k": k, "v": -k, "hidden": hidden,
        "k_out": untouched, "v_out": untouched, "into": torch.full((capacity, 24), 7.0),
    }  # fmt: skip
    then = [
        {**first, "index": alive(n, index.flip(0)), "slots": alive(n, slots), "k": k + n}
        for n in (capacity, 0, 9)
    ]
    return Scene({name: t.clone() for name, t in first.items()}, run, [first, *then])


def select_tokens_scene(kernel: Case) -> Scene:
    from glimpse_kernels import select_tokens

    tokens, text = 300, 20
    rows = tokens + text

    def run(given: dict[str, Tensor]) -> list[Tensor]:
        results = []
        for name, groups in (("few", 3), ("many", 12)):  # one launch, and several
            found = select_tokens(
                given["logits"], given[name], threshold=0.0, caps=given["caps"][:groups], floors=given["floors"][:groups],
                token_rows=given["token_rows"], row_keep=given["row_keep"], cu_seqlens=given["cu_seqlens"], capacity=rows,
            )  # fmt: skip
            results += [found.keep, found.counts, found.index, found.cu_seqlens]
        return results

    def partitions(sizes: list[int]) -> dict[str, Tensor]:
        quarters = [part for n in sizes for part in (n // 4, n // 4, n // 4, n - n // 4 * 3)]
        return {"few": cu_seqlens(sizes), "many": cu_seqlens(quarters)}

    logits = torch.randn(tokens)
    first = {
        "logits": torch.full((tokens,), -1.0),
        **partitions([1, tokens - 3, 2]),
        "caps": torch.tensor([0, 5, 1] * 4, dtype=torch.int32),
        "floors": torch.tensor([0, 1, 0] * 4, dtype=torch.int32),
        "token_rows": torch.arange(tokens, dtype=torch.int32) + text,
        "row_keep": torch.arange(rows) < text,
        "cu_seqlens": cu_seqlens([rows, 0]),
    }
    then = [
        {
            **first,
            "logits": logits * scale,
            **partitions(groups),
            "caps": torch.tensor(caps * 4, dtype=torch.int32),
            "cu_seqlens": cu_seqlens([50, rows - 50]),
        }
        for scale, groups, caps in (
            (1.0, [100, 120, 80], [300, 30, 7]),
            (float("nan"), [0, 300, 0], [3, 3, 3]),
            (-2.0, [298, 1, 1], [200, 1, 1]),
        )
    ]
    return Scene({name: t.clone() for name, t in first.items()}, run, [first, *then])


def decode_attention_scene(kernel: Case) -> Scene:
    """Runs of a row joined by a cluster and by a second kernel: on a GPU the table decides which, emulated also the chip."""
    from glimpse_kernels import decode_attention

    block, blocks, batch, kv_heads, heads, dim = 16, 32, 3, 2, 4, 16
    most, wide = 10, 130
    dtype = kernel.dtype or torch.float32

    def run(given: dict[str, Tensor]) -> list[Tensor]:
        found = []
        for chip, columns in ((90, 132), 6), ((90, 132), most), ((90, 132), wide), ((80, 108), most):
            if kernel.interpreted:
                _cuda.module().set_chip(*chip)
            table, lengths = given["table"][:, :columns], given["lengths"]
            if columns < most:
                lengths = given["short"]
            found.append(decode_attention(given["q"], given["k"], given["v"], table, lengths))
        if kernel.interpreted:
            _cuda.module().set_chip(90, 3)
        return found

    q = torch.randn(batch, heads, dim, dtype=dtype)
    k, v = (torch.randn(blocks, block, kv_heads, dim, dtype=dtype) for _ in range(2))
    places = torch.randperm(blocks, device="cpu")[: batch * most]
    table = places.view(batch, most).to(kernel.device, torch.int32)

    def scene(lengths: list[int]) -> dict[str, Tensor]:
        poisoned = [k.clone(), v.clone()]
        alive = torch.zeros(blocks, block, dtype=torch.bool)
        for row, length in zip(table.tolist(), lengths, strict=True):
            for key in range(length):
                alive[row[key // block], key % block] = True
        for pool in poisoned:
            pool[~alive] = float("nan")
        # Entries behind a row's last block are nobody's.
        used = (torch.tensor(lengths)[:, None] + block - 1) // block > torch.arange(most)
        entries = torch.full((batch, wide), 2**30, dtype=torch.int32)
        entries[:, :most] = torch.where(used, table, 2**30)
        long = torch.tensor(lengths, dtype=torch.int32)
        return {
            "q": q, "k": poisoned[0], "v": poisoned[1], "table": entries, "lengths": long, "short": long.clamp(max=96),
        }  # fmt: skip

    scenes = [scene(lengths) for lengths in ([1, 0, 2], [160, 17, 129], [0, 0, 0], [5, 130, 64])]
    return Scene({name: t.clone() for name, t in scenes[0].items()}, run, scenes)


def glimpse_scores_scene(kernel: Case) -> Scene:
    from glimpse_kernels import glimpse_scores

    dtype = kernel.dtype or torch.float32
    q, k = torch.randn(3, 4, 32, dtype=dtype), torch.randn(70, 2, 32, dtype=dtype)

    def run(given: dict[str, Tensor]) -> list[Tensor]:
        return [glimpse_scores(given["q"], given["k"], given["index"], given["seq"])]

    def scene(tokens: int) -> dict[str, Tensor]:
        live = torch.arange(50) < tokens
        index = torch.where(live, (torch.arange(50) * 7) % tokens, 0).int()
        poisoned = torch.where((torch.arange(70) < tokens)[:, None, None], k, float("nan"))
        return {"q": q, "k": poisoned, "index": index, "seq": torch.where(live, index % 3, 0).int()}

    scenes = [scene(tokens) for tokens in (2, 70, 33)]
    return Scene({name: t.clone() for name, t in scenes[0].items()}, run, scenes)


def patchify_scene(kernel: Case) -> Scene:
    from glimpse_kernels import patchify

    def run(given: dict[str, Tensor]) -> list[Tensor]:
        return [patchify(given["image"], mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4])]

    scenes = [{"image": torch.full((56, 84, 3), value, dtype=torch.uint8)} for value in (0, 255)]
    scenes.append({"image": torch.randint(0, 256, (56, 84, 3), dtype=torch.uint8)})
    return Scene({"image": scenes[0]["image"].clone()}, run, scenes)


def _matrices(lengths: list[int], room: int, dtype: torch.dtype) -> Tensor:
    """Packed symmetric matrices with ones on their diagonals, and NaN in the room behind them."""
    packed = torch.full((room,), float("nan"), dtype=dtype)
    offset = 0
    for n in lengths:
        x = torch.nn.functional.normalize(torch.randn(n, 8), dim=1)
        packed[offset : offset + n * n] = (x @ x.T).to(dtype).flatten()
        offset += n * n
    return packed


TOKENS = 30
PARTITIONS = ([1, 28, 1], [2, 8, 20], [30, 0, 0], [0, 15, 15])


def farthest_points_scene(kernel: Case) -> Scene:
    from glimpse_kernels import farthest_points

    def run(given: dict[str, Tensor]) -> list[Tensor]:
        return list(
            farthest_points(given["similarity"], given["rows"], given["places"], tokens=TOKENS, capacity=12)
        )

    scenes = [
        {
            "similarity": _matrices(lengths, TOKENS * TOKENS, kernel.dtype or torch.float32),
            "rows": cu_seqlens(lengths),
            "places": cu_seqlens(picks),
        }
        for lengths, picks in zip(PARTITIONS, ([1, 0, 0], [2, 4, 6], [12, 0, 0], [3, 3, 3]), strict=True)
    ]
    return Scene({name: t.clone() for name, t in scenes[0].items()}, run, scenes)


def greedy_dpp_scene(kernel: Case) -> Scene:
    from glimpse_kernels import greedy_dpp

    def run(given: dict[str, Tensor]) -> list[Tensor]:
        return list(
            greedy_dpp(
                given["similarity"], given["relevance"], given["rows"], given["places"], capacity=12, eps=1e-6
            )
        )

    scenes = [
        {
            "similarity": _matrices(lengths, TOKENS * TOKENS, torch.float32),
            "relevance": torch.rand(TOKENS) + 0.5,
            "rows": cu_seqlens(lengths),
            "places": cu_seqlens(picks),
        }
        for lengths, picks in zip(PARTITIONS, ([1, 0, 0], [2, 4, 6], [7, 0, 0], [3, 3, 3]), strict=True)
    ]
    return Scene({name: t.clone() for name, t in scenes[0].items()}, run, scenes)


def drop_duplicates_scene(kernel: Case) -> Scene:
    from glimpse_kernels import drop_duplicates

    def run(given: dict[str, Tensor]) -> list[Tensor]:
        return list(
            drop_duplicates(
                given["similarity"],
                given["rows"],
                given["order"],
                given["places"],
                given["targets"],
                tokens=TOKENS,
                per_round=3,
            )
        )

    scenes = []
    for lengths, targets in zip(PARTITIONS, ([1, 28, 1], [1, 3, 4], [5, 0, 0], [0, 1, 14]), strict=True):
        rows = cu_seqlens(lengths)
        order = torch.cat(
            [
                torch.randperm(n, device="cpu").to(kernel.device) + int(first)
                for n, first in zip(lengths, rows.tolist(), strict=False)
            ]
        )
        scenes.append(
            {
                "similarity": _matrices(lengths, TOKENS * TOKENS, kernel.dtype or torch.float32),
                "rows": rows,
                "order": order.int(),
                "places": rows,
                "targets": torch.tensor(targets, dtype=torch.int32),
            }
        )
    return Scene({name: t.clone() for name, t in scenes[0].items()}, run, scenes)


SCENES = {
    "farthest_points": farthest_points_scene,
    "greedy_dpp": greedy_dpp_scene,
    "drop_duplicates": drop_duplicates_scene,
    "compact": compact_scene,
    "select_tokens": select_tokens_scene,
    "decode_attention": decode_attention_scene,
    "glimpse_scores": glimpse_scores_scene,
    "patchify": patchify_scene,
}


def graph_cases() -> Iterator[object]:
    """Every op with CUDA C++ kernels, with every backend whose launches can be captured here."""
    for op in dict.fromkeys(row.op for row in dispatch.support_table() if row.backend == "cuda"):
        for case in op_cases(op):
            kernel: Case = case.values[0]  # type: ignore[attr-defined]
            if kernel.backend == "cuda" or (kernel.backend == "triton" and not kernel.interpreted):
                yield pytest.param(kernel, id=f"{op}-{kernel}", marks=case.marks)  # type: ignore[attr-defined]


def capture(
    kernel: Case, run: Callable[[], list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Tensor], Callable[[], None]]:
    """What `run` returns, and how to run its launches again."""
    if kernel.interpreted:
        # A CUDA graph has memory of its own; here what was allocated has to be kept.
        kept: list[Tensor] = []
        allocate = torch.empty

        def keeping(*args: Any, **kwargs: Any) -> Tensor:
            kept.append(allocate(*args, **kwargs))
            return kept[-1]

        monkeypatch.setattr(torch, "empty", keeping)
        _cuda.module().capture_begin()
        try:
            found = run()
        finally:
            graph = _cuda.module().capture_end()
        monkeypatch.setattr(torch, "empty", allocate)

        def replay(_: object = kept) -> None:
            graph.replay()

        return found, replay
    run()  # compiles what has to be compiled, and fills caches
    torch.cuda.synchronize()
    real = torch.cuda.CUDAGraph()
    with torch.cuda.graph(real):
        found = run()

    def again() -> None:
        real.replay()
        torch.cuda.synchronize()

    return found, again


@pytest.mark.parametrize("kernel", graph_cases(), indirect=True)
def test_captured_short_replayed_long(kernel: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = SCENES[kernel.op](kernel)
    found, replay = capture(kernel, lambda: scene.run(scene.buffers), monkeypatch)
    for number, values in enumerate(scene.scenes):
        for name, buffer in scene.buffers.items():
            buffer.copy_(values[name])
        replay()
        with dispatch.force_backend("naive"):
            wanted = scene.run({name: t.clone() for name, t in values.items()})
        for ours, right in zip(found, wanted, strict=True):
            if ours.is_floating_point():
                eps = torch.finfo(ours.dtype).eps
                torch.testing.assert_close(
                    ours,
                    right,
                    rtol=4 * eps,
                    atol=8 * eps,
                    equal_nan=True,
                    msg=lambda m, n=number: f"scene {n}: {m}",
                )
            else:
                assert torch.equal(ours, right), f"scene {number}"

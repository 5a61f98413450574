# SPDX-License-Identifier: Apache-2.0
"""Another number of rows, segments or listed tokens takes the same kernel: it is compiled once, not in the middle of serving."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.kernels.kernel_cases import needs_triton

SCRIPT = """
import json
from collections import defaultdict

import torch

from bench.fake_driver import compiling
from glimpse_kernels import _triton
from glimpse_kernels.attention import _flash
from glimpse_kernels.decode_attention.triton import decode_attention
from glimpse_kernels.drop_duplicates.triton import drop_duplicates
from glimpse_kernels.farthest_points.triton import farthest_points
from glimpse_kernels.glimpse_scores.triton import glimpse_scores
from glimpse_kernels.graph_flow.triton import graph_flow
from glimpse_kernels.greedy_dpp.triton import greedy_dpp
from glimpse_kernels.last_row_attention.triton import last_row_attention
from glimpse_kernels.merge_nearest.triton import merge_nearest
from glimpse_kernels.patchify.triton import patchify
from glimpse_kernels.received_attention.triton import received_attention
from glimpse_kernels.window_topk.triton import window_topk

found = defaultdict(set)

def tell(launched):
    found[launched.function.fn.__name__].add(launched.kernel.hash)

def new(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

with compiling(90, tell), _triton.force_chip(_triton.Chip(90, 132)):
    for n, b in ((64, 16), (77, 9), (1001, 13)):
        q, k, row, listed = new(n, 4, 64), new(n, 2, 64), new(b, 4, 64), new(n, dtype=torch.int32)
        bounds, logs = new(b + 1, dtype=torch.int32), new(n, 4, dtype=torch.float32)
        received_attention(q, k, logs, bounds, bounds)
        last_row_attention(row, k, bounds, listed, listed)
        glimpse_scores(row, k, listed, listed)
        _flash.finish(q, new(4, n, dtype=torch.float32), bounds, None, True)
        pool = new(100, 16, 2, 64)
        picture = new(2 * n, 3 * n + 1, 3, dtype=torch.uint8)
        patchify(
            picture, mean=[0.5] * 3, std=[0.5] * 3, size=(28 * b, 56 * b), resample="bicubic", down_first=False,
            patch_size=14, temporal_patch_size=2, merge_size=2, rescale=1 / 255, dtype=torch.float32, out=None,
        )
        similarity, places = new(b * n * n), new(b + 2, dtype=torch.int32)[b % 2 :][: b + 1]
        sizes = {"tokens": b * n, "max_seqlen": n // 4}
        farthest_points(similarity, places, places, capacity=n, repeat=True, **sizes)
        greedy_dpp(similarity.float(), new(b * n, dtype=torch.float32), places, places, capacity=n, eps=1e-5, max_seqlen=n // 4)
        drop_duplicates(similarity, places, new(5 * n, dtype=torch.int32), places, places[1:], per_round=b, **sizes)
        features, marks = new(n, 256), new(n, dtype=torch.bool)
        graph_flow(features, bounds, threshold=0.5, temperature=0.03, steps=5, rounded=True, degree="edges")
        merge_nearest(features, marks, bounds, sources=None, metric=None, how="mean", out=None)
        scores, grids = new(n, dtype=torch.float32), new(b, 2, dtype=torch.int32)
        window_topk(scores, bounds, grids, bounds, window=4, capacity=n, share="up", max_seqlen=n // 4)
        decode_attention(row, pool, pool, new(b, 2 * n, dtype=torch.int32), new(b, dtype=torch.int32))
print(json.dumps({name: len(kinds) for name, kinds in found.items()}))
"""


@needs_triton
def test_lengths_do_not_make_variants() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    variants = json.loads(done.stdout)
    variants.pop("decode_attention_join_kernel")  # few runs and many are two configurations
    assert variants.pop("resize_kernel") == 2  # one for each direction
    assert variants.pop("graph_flow_step_kernel") == 2  # the first step and the others
    assert len(variants) >= 20
    assert set(variants.values()) == {1}, variants

# SPDX-License-Identifier: Apache-2.0
"""Pictures prepared on a GPU: nothing waits, patches are those of the host, and a CUDA graph holds a resize.

python3 -m pytest tests/gpu        after `make gpu-check`
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from glimpse_kernels import dispatch, patchify
from glimpse_runtime.ask import shipped_model
from glimpse_runtime.processor import Processor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

BACKENDS = ["naive", "triton", "cuda"]
SIZES = [(1200, 900), (448, 448), (4000, 3000), (300, 2001), (61, 90)]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@contextmanager
def without_waiting() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def served_by(backend: str) -> Iterator[None]:
    with dispatch.force_backend(backend):
        usable = {name for name, works, _ in dispatch.explain("patchify", "cuda", torch.uint8) if works}
        if backend not in usable:
            pytest.skip(f"no {backend} here")
        yield


@pytest.mark.parametrize("backend", BACKENDS)
def test_patches_of_the_host_and_no_wait(backend: str) -> None:
    processor = Processor.from_pretrained(shipped_model()[0], max_pixels=1280 * 28 * 28)
    images = [noise(*size) for size in SIZES]
    wanted, grid = processor.process_images(images)
    with served_by(backend):
        for _ in range(2):  # tables go up, then they are there
            with without_waiting():
                made, ours = processor.process_images(images, device="cuda")
            assert torch.equal(ours, grid) and torch.equal(made.cpu(), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_streams(backend: str) -> None:
    """Each one has tables of its own, so that none reads them before they have arrived."""
    image = torch.from_numpy(np.array(noise(640, 480)))
    wanted = patchify(image, mean=MEAN, std=STD, size=(448, 616))
    with served_by(backend):
        there = image.cuda()
        torch.cuda.synchronize()
        made = []
        for _ in range(3):
            with torch.cuda.stream(torch.cuda.Stream()):
                made.append(patchify(there, mean=MEAN, std=STD, size=(448, 616)))
        torch.cuda.synchronize()
        assert all(torch.equal(each.cpu(), wanted) for each in made)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_resize_in_a_cuda_graph(backend: str) -> None:
    images = [torch.from_numpy(np.array(noise(333, 222, seed))) for seed in (1, 2, 3)]
    with served_by(backend):
        given = images[0].cuda()

        def run() -> torch.Tensor:
            return patchify(given, mean=MEAN, std=STD, size=(196, 308), resample="lanczos")

        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = run()
        for image in images:
            given.copy_(image)
            graph.replay()
            with dispatch.force_backend("auto"):
                wanted = patchify(image, mean=MEAN, std=STD, size=(196, 308), resample="lanczos")
            assert torch.equal(made.cpu(), wanted)

# SPDX-License-Identifier: Apache-2.0
"""Pictures prepared on a GPU (the stand-in for one): the same patches as on the host, and nobody waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from glimpse_kernels import _cuda, _triton, dispatch
from glimpse_runtime import images as pictures
from glimpse_runtime.ask import Asker, shipped_model
from glimpse_runtime.engine import Engine
from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.images import pixels_of, to_rgb
from glimpse_runtime.processor import Processor
from glimpse_runtime.processor_files import ProcessorError
from tests.runtime.on_stand_in import device as stand_in_device
from tests.stand_in import StandIn, stand_in_gpu

pytestmark = pytest.mark.skipif(not _triton.interpreting(), reason="this needs the stand-in for a GPU")

BACKENDS = ["naive", "triton", "cuda"]
SIZES = [(90, 61), (56, 56), (40, 143), (28, 84)]
"""Width and height: shrinks or grows, fits as it is, is much longer than wide."""


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_pretrained(shipped_model()[0], min_pixels=28 * 28, max_pixels=84 * 84)


@contextmanager
def gpu(backend: str) -> Iterator[StandIn]:
    if backend == "cuda" and not _cuda.emulating():
        pytest.skip("no emulation of CUDA here")
    with stand_in_gpu() as found, dispatch.force_backend(backend):
        yield found


def noise(width: int, height: int, channels: int = 3) -> np.ndarray[Any, np.dtype[np.uint8]]:
    rng = np.random.default_rng(width * height)
    shape = (height, width) if channels == 1 else (height, width, channels)
    return rng.integers(0, 256, shape, dtype=np.uint8)


def assert_equal(made: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Bit for bit; the grid is the host's."""
    pixels, grid = made
    assert pixels.is_cuda and not grid.is_cuda
    assert pixels.dtype == torch.float32 and torch.equal(pixels.cpu(), wanted[0])
    assert torch.equal(grid, wanted[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_pictures_of_several_sizes(processor: Processor, backend: str, tmp_path: Path) -> None:
    Image.fromarray(noise(77, 50)).save(tmp_path / "a.png")
    images = [*(Image.fromarray(noise(*size)) for size in SIZES), tmp_path / "a.png"]
    wanted = processor.process_images(images)
    with gpu(backend) as device:
        made = processor.process_images(images, device="cuda")
        assert not device.reads
        assert_equal(made, wanted)


@pytest.mark.parametrize("resample", [0, 1, 2, 3, 4, 5])
def test_every_filter(processor: Processor, resample: int) -> None:
    """0, nearest, is Pillow's own work."""
    from dataclasses import replace

    changed = Processor(processor.tokenizer, replace(processor.image, resample=resample))
    image = Image.fromarray(noise(90, 61))
    wanted = changed.process_images(image)
    with gpu("triton") as device:
        made = changed.process_images(image, device="cuda")
        assert not device.reads
        assert_equal(made, wanted)


def test_the_vertical_pass_first(processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_PILLOW", 13)
    image = Image.fromarray(noise(30, 400))
    wanted = processor.process_images(image)
    with gpu("triton"):
        assert_equal(processor.process_images(image, device="cuda"), wanted)


LAYOUTS = [(61, 90), (61, 90, 1), (61, 90, 3), (61, 90, 4), (3, 61, 90), (4, 61, 90)]


@pytest.mark.parametrize("shape", LAYOUTS, ids=str)
def test_pictures_that_lie_on_the_gpu(processor: Processor, shape: tuple[int, ...]) -> None:
    """They stay there; nothing of them is looked at."""
    array = np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)
    wanted = processor.process_images(array)
    rgb = np.asarray(to_rgb(array))
    with gpu("triton") as device:
        there = torch.from_numpy(array).to("cuda")
        made = processor.process_images([there], device="cuda")
        found = pixels_of(there)
        assert found.is_cuda and not device.reads
        assert_equal(made, wanted)
        assert np.array_equal(found.cpu().numpy(), rgb)
        with dispatch.force_backend("auto"):
            back, _ = processor.process_images(there)  # to a processor of the host
        assert not back.is_cuda and torch.equal(back, wanted[0])


def test_no_pictures(processor: Processor) -> None:
    with gpu("naive"):
        pixels, grid = processor.process_images([], device="cuda")
        assert pixels.is_cuda and pixels.shape == (0, 1176) and grid.shape == (0, 3)


def test_a_device_for_every_call(processor: Processor) -> None:
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which colour?"}]}]
    images = [Image.fromarray(noise(90, 61))]
    wanted = processor.apply_chat_template(message, images=images, tokenize=True)
    with gpu("naive") as device:
        own = Processor(processor.tokenizer, processor.image, processor.chat_template, device="cuda")
        loaded = Processor.from_pretrained(shipped_model()[0], device="cuda")
        assert own.device == loaded.device == torch.device("cuda", 0)
        for made in (
            own.apply_chat_template(message, images=images, tokenize=True),
            processor.apply_chat_template(message, images=images, tokenize=True, device="cuda"),
            own(own.apply_chat_template(message), images),
            processor(own.apply_chat_template(message), images, device="cuda"),
        ):
            assert made.keys() == wanted.keys() and made["pixel_values"].is_cuda and not device.reads
            for name in wanted:
                assert made[name].is_cuda is (name == "pixel_values")
                assert torch.equal(made[name].cpu(), wanted[name]), name
            device.reads.clear()
        assert not own(own.apply_chat_template(message), images, device="cpu")["pixel_values"].is_cuda
        prompt = own.apply_chat_template(message)
        assert isinstance(own(prompt, images, return_tensors="np")["pixel_values"], np.ndarray)
        with pytest.raises(ProcessorError, match='return_tensors: expected "pt" with device=cuda:0, found'):
            own(prompt, images, return_tensors="np", device="cuda")


def test_a_device_that_is_none(processor: Processor) -> None:
    with pytest.raises(GlimpseError, match="device: expected one that torch can use here, found 'nonsense'"):
        processor.process_images([], device="nonsense")


def test_asking_on_a_gpu() -> None:
    """The command line's way: processor and model on one device, the answer that of the host."""
    base, modules = shipped_model()
    image = Image.fromarray(noise(100, 80))
    host = Asker.load(base, modules, dtype="float32")
    wanted = host.ask(host.inputs([image], "Which colour?"), max_new_tokens=2, max_remain_ratio=0.5)
    with stand_in_device():
        asker = Asker.load(base, modules, dtype="float32", device="cuda")
        asker.model.engine = Engine(asker.model.base.decoder, capture=None)
        inputs = asker.inputs([image], "Which colour?")
        assert inputs["pixel_values"].is_cuda and not inputs["input_ids"].is_cuda
        made = asker.ask(inputs, max_new_tokens=2, max_remain_ratio=0.5)
        on_host = host.inputs([image], "Which colour?")  # the model takes them from either side
        again = asker.ask(on_host, max_new_tokens=2, max_remain_ratio=0.5)
    assert (made.ids, made.kept, made.total) == (wanted.ids, wanted.kept, wanted.total)
    assert (again.ids, again.kept) == (wanted.ids, wanted.kept)

# SPDX-License-Identifier: Apache-2.0
"""patchify against Hugging Face's PIL image processor, its resize against Pillow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from glimpse_kernels import _cuda, _triton, dispatch, patchify
from glimpse_kernels.patchify.naive import patchify as definition
from glimpse_kernels.patchify.naive import resize as defined_resize
from glimpse_kernels.patchify.resident import Resident
from tests.kernels.kernel_cases import Case, needs_triton, op_cases
from tests.stand_in import stand_in_gpu

all_cases = pytest.mark.parametrize("kernel", op_cases("patchify"), indirect=True)
resizing = pytest.mark.parametrize(
    "kernel",
    [case for case in op_cases("patchify") if case.values[0].backend != "cuda"],  # type: ignore[attr-defined]
    indirect=True,
)
"""The backend in CUDA C++ has no resize of its own; what it takes is proven by Triton's cases, that it does by two of all."""
needs_interpreter = pytest.mark.skipif(
    not _triton.interpreting(), reason="GPU kernels run on the GPU; this needs the stand-in"
)


MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def picture(height: int, width: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randint(0, 256, (height, width, 3), generator=g, dtype=torch.uint8)


@all_cases
@pytest.mark.parametrize("size", [(28, 28), (56, 84), (140, 308), (28, 252)])
def test_processor(kernel: Case, size: tuple[int, int]) -> None:
    image = picture(*size)
    processor = Qwen2VLImageProcessorPil(do_resize=False, image_mean=list(MEAN), image_std=list(STD))
    batch = processor(images=[image.cpu().numpy()], return_tensors="np")
    got = patchify(image, mean=MEAN, std=STD)
    assert batch["image_grid_thw"].tolist() == [[1, size[0] // 14, size[1] // 14]]
    np.testing.assert_allclose(got.cpu().numpy(), batch["pixel_values"], rtol=3e-7, atol=2e-7)


@all_cases
@pytest.mark.parametrize("patch, temporal, merge", [(16, 2, 2), (14, 1, 1), (3, 3, 3), (5, 1, 2)])
def test_other_sizes(kernel: Case, patch: int, temporal: int, merge: int) -> None:
    image = picture(2 * patch * merge, 3 * patch * merge)
    processor = Qwen2VLImageProcessorPil(
        do_resize=False,
        patch_size=patch,
        temporal_patch_size=temporal,
        merge_size=merge,
        image_mean=[0.5, 0.25, 0.125],
        image_std=[0.5, 1.0, 2.0],
        rescale_factor=1 / 127,
    )
    want = processor(images=[image.cpu().numpy()], return_tensors="np")["pixel_values"]
    out = torch.full(want.shape, torch.nan)
    got = patchify(
        image,
        mean=(0.5, 0.25, 0.125),
        std=(0.5, 1.0, 2.0),
        patch_size=patch,
        temporal_patch_size=temporal,
        merge_size=merge,
        rescale=1 / 127,
        out=out,
    )
    assert got.data_ptr() == out.data_ptr()
    np.testing.assert_allclose(got.cpu().numpy(), want, rtol=3e-7, atol=2e-7)


@all_cases
def test_cropped_view(kernel: Case) -> None:
    image = picture(60, 40)[3:59]
    whole = picture(56, 70)
    for view in (image[:, :28], whole[:, 14:70]):
        got = patchify(view, mean=MEAN, std=STD)
        assert torch.equal(got, patchify(view.contiguous(), mean=MEAN, std=STD))


@all_cases
def test_every_value_of_every_channel(kernel: Case) -> None:
    """Each of the 256 values, through arithmetic written out here."""
    image = torch.arange(28 * 28 * 3).remainder(256).to(torch.uint8).view(28, 28, 3)
    got = patchify(image, mean=MEAN, std=STD, merge_size=1).view(2, 2, 3, 2, 14, 14)
    x = (image.double() / 255 - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
    for row in range(2):
        for col in range(2):
            patch = x[14 * row : 14 * row + 14, 14 * col : 14 * col + 14].permute(2, 0, 1)
            for frame in range(2):
                assert torch.allclose(got[row, col, :, frame].double(), patch, atol=5e-7)


@all_cases
def test_rounded_dtypes(kernel: Case) -> None:
    """The float32 values, rounded once, with out= and without; a resize before it changes nothing about that."""
    for image, size in ((picture(56, 84), None), (picture(50, 61), (56, 84))):
        exact = patchify(image, mean=MEAN, std=STD, size=size)
        for dtype in (torch.bfloat16, torch.float16):
            got = patchify(image, mean=MEAN, std=STD, size=size, dtype=dtype)
            assert got.dtype is dtype and torch.equal(got, exact.to(dtype))
            out = torch.full_like(got, torch.nan)
            assert patchify(image, mean=MEAN, std=STD, size=size, out=out).data_ptr() == out.data_ptr()
            assert torch.equal(out, got)


@all_cases
@pytest.mark.parametrize(("given", "size"), [((84, 56), (84, 56)), ((90, 41), (56, 84))])
def test_definition_bit_for_bit(kernel: Case, given: tuple[int, int], size: tuple[int, int]) -> None:
    image = picture(*given)
    got = patchify(image, mean=MEAN, std=STD, size=size)
    want = definition(image.cpu(), mean=MEAN, std=STD, size=size)
    assert torch.equal(got.cpu(), want)


@all_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "patch, merge, frames",
    [(14, 2, 2), (14, 2, 1), (16, 2, 2), (14, 1, 3), (14, 3, 1), (3, 3, 2), (5, 2, 3), (2, 1, 1)],
)
def test_shapes_and_dtypes_bit_for_bit(
    kernel: Case, patch: int, merge: int, frames: int, dtype: torch.dtype
) -> None:
    """A picture and the same one as a view that begins and ends anywhere; no picture."""
    side = patch * merge
    whole = picture(2 * side, 3 * side + 1)
    wanted = {
        "mean": MEAN, "std": STD, "patch_size": patch, "merge_size": merge, "temporal_patch_size": frames, "dtype": dtype,
    }  # fmt: skip
    for image in (whole[:, : 3 * side].contiguous(), whole[:, 1:], whole[:0, 1:]):
        want = definition(image.cpu(), **wanted)  # type: ignore[arg-type]
        assert torch.equal(patchify(image, **wanted).cpu(), want)  # type: ignore[arg-type]
        row = 3 * frames * patch * patch
        buffer = torch.full((want.shape[0] * row + 3,), torch.nan, dtype=dtype)
        out = buffer[3:].view(want.shape)  # not as aligned as memory of its own
        patchify(image, **wanted, out=out)  # type: ignore[arg-type]
        assert torch.equal(out.cpu(), want) and buffer[:3].isnan().all()


FILTERS = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
PILLOW_13 = int(PIL.__version__.split(".")[0]) >= 13


def assert_pillow(image: torch.Tensor, size: tuple[int, int], resample: str) -> None:
    """The op with patches of one pixel and no normalising gives the bytes of Pillow."""
    height, width = image.shape[:2]
    down_first = PILLOW_13 and height - size[0] > max(0, 2 * (width - size[1]))
    want = np.asarray(
        Image.fromarray(image.contiguous().cpu().numpy()).resize((size[1], size[0]), FILTERS[resample])
    )
    got = patchify(
        image,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        size=size,
        resample=resample,
        down_first=down_first,
        patch_size=1,
        temporal_patch_size=1,
        merge_size=1,
        rescale=1.0,
    )
    np.testing.assert_array_equal(got.view(*size, 3).cpu().numpy(), want)


@resizing
@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize(
    ("given", "size"),
    [
        ((61, 90), (28, 33)),  # both ways, down and up
        ((33, 28), (65, 77)),
        ((45, 17), (17, 45)),
        ((17, 45), (45, 17)),
        ((200, 40), (30, 35)),  # vertical pass first in Pillow 13
        ((200, 5), (30, 7)),
        ((1, 1), (5, 3)),
        ((1, 70), (4, 16)),
        ((70, 1), (16, 4)),
        ((40, 50), (1, 1)),
        ((300, 3), (2, 19)),
        ((3, 300), (19, 2)),
        ((31, 47), (31, 20)),  # one side stays
        ((31, 47), (12, 47)),
        ((31, 47), (31, 47)),
        ((250, 130), (14, 17)),
    ],
)
def test_resize_equals_pillow(
    kernel: Case, given: tuple[int, int], size: tuple[int, int], resample: str
) -> None:
    assert_pillow(picture(*given), size, resample)


@resizing
@pytest.mark.parametrize(
    ("given", "size"), [((5, 4000), (28, 1148)), ((3000, 5), (868, 28)), ((20, 28), (5, 2800))]
)
def test_resize_of_a_long_side(kernel: Case, given: tuple[int, int], size: tuple[int, int]) -> None:
    """The sides of large pictures, in both directions."""
    assert_pillow(picture(*given), size, "bicubic")


@resizing
@pytest.mark.parametrize("resample", FILTERS)
def test_resize_clips_as_pillow_does(kernel: Case, resample: str) -> None:
    """Black and white only: filters with negative weights overshoot at every edge."""
    image = (picture(53, 64) > 127).to(torch.uint8) * 255
    for size in ((90, 20), (20, 90), (15, 15), (101, 103)):
        assert_pillow(image, size, resample)


@resizing
def test_resize_of_a_cropped_view(kernel: Case) -> None:
    whole = picture(70, 60)
    assert_pillow(whole[5:66], (28, 31), "bicubic")
    wide = torch.empty(70, 200, dtype=torch.uint8)
    view = wide.as_strided((70, 60, 3), (200, 3, 1), 7)
    view.copy_(whole)
    assert_pillow(view, (28, 31), "bicubic")


@resizing
@pytest.mark.parametrize("given", [(100, 150), (333, 222), (29, 41), (61, 600), (400, 60)])
def test_resize_equals_the_processor(kernel: Case, given: tuple[int, int]) -> None:
    image = picture(*given)
    processor = Qwen2VLImageProcessorPil(
        min_pixels=56 * 56, max_pixels=140 * 140, image_mean=list(MEAN), image_std=list(STD)
    )
    batch = processor(images=[image.cpu().numpy()], return_tensors="np")
    _, rows, columns = batch["image_grid_thw"][0].tolist()
    size = (14 * rows, 14 * columns)
    down_first = PILLOW_13 and given[0] - size[0] > max(0, 2 * (given[1] - size[1]))
    got = patchify(image, mean=MEAN, std=STD, size=size, down_first=down_first)
    np.testing.assert_allclose(got.cpu().numpy(), batch["pixel_values"], rtol=3e-7, atol=2e-7)
    half = patchify(image, mean=MEAN, std=STD, size=size, down_first=down_first, dtype=torch.bfloat16)
    assert torch.equal(half, got.bfloat16())


@resizing
@pytest.mark.parametrize("given", [(97, 150), (400, 60)])
def test_resize_does_not_depend_on_the_number_of_threads(kernel: Case, given: tuple[int, int]) -> None:
    image = picture(*given)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(
                patchify(
                    image, mean=MEAN, std=STD, size=(168, 56), down_first=given[1] == 60, resample="lanczos"
                )
            )
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def on_device(image: torch.Tensor) -> torch.Tensor:
    return image.to("cuda", non_blocking=True)


@needs_triton
@needs_interpreter
@pytest.mark.parametrize("resample", ["bicubic", "lanczos"])
@pytest.mark.parametrize(("rows", "values"), [(1, 16), (2, 64), (16, 32), (8, 1024)])
def test_resize_in_pieces_of_any_size(rows: int, values: int, resample: str) -> None:
    from glimpse_kernels.patchify import triton_resize

    image = picture(13, 9)
    with stand_in_gpu(), triton_resize.CONFIGS.forced(triton_resize.Run(4, rows=rows, values=values)):
        for size in ((5, 23), (21, 4), (13, 11), (1, 9)):
            for down_first in (False, True):
                got = triton_resize.resize(on_device(image), size, resample, down_first)
                assert got.shape == (*size, 3) and (size[0] == 1 or got.stride(0) % 16 == 0)
                assert torch.equal(got.cpu(), defined_resize(image, size, resample, down_first))


@contextmanager
def launches() -> Iterator[list[str]]:
    """Names of the Triton kernels that are launched in the block, inside `stand_in_gpu`."""
    from triton.runtime.interpreter import GridExecutor

    found: list[str] = []
    launch = GridExecutor.__call__

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(self.fn.__name__)
        return launch(self, *args, **kwargs)

    with mock.patch.object(GridExecutor, "__call__", noted):
        yield found


@needs_triton
@needs_interpreter
@pytest.mark.parametrize(
    ("size", "resizes"), [((28, 56), 2), ((84, 28), 2), ((56, 84), 1), ((28, 112), 1), ((56, 112), 0)]
)
def test_a_launch_for_each_direction_and_one_for_the_patches(size: tuple[int, int], resizes: int) -> None:
    with stand_in_gpu(), dispatch.force_backend("triton"):
        image = on_device(picture(56, 112))
        with launches() as found:
            patchify(image, mean=MEAN, std=STD, size=size)
    assert found == ["resize_kernel"] * resizes + ["patchify_kernel"]


@needs_interpreter
@pytest.mark.parametrize("backend", ["naive", "triton", "cuda"])
def test_the_host_waits_for_nothing(backend: str) -> None:
    if backend not in {row.backend for row in dispatch.support_table() if row.op == "patchify"} or (
        backend == "cuda" and not _cuda.emulating()
    ):
        pytest.skip(f"no {backend} here")
    image = picture(61, 47)
    with stand_in_gpu() as gpu, dispatch.force_backend(backend):
        given = on_device(image)
        got = patchify(given, mean=MEAN, std=STD, size=(28, 56), resample="lanczos")
        assert not gpu.reads and got.is_cuda
        assert torch.equal(
            got.cpu(), definition(image, mean=MEAN, std=STD, size=(28, 56), resample="lanczos")
        )


class Stream:
    """A stream of `torch.cuda` by its number alone."""

    def __init__(self, number: int) -> None:
        self.cuda_stream = number


def made(*key: int) -> torch.Tensor:
    return torch.tensor(key, dtype=torch.int32)


def test_tables_are_made_once_for_each_stream() -> None:
    with stand_in_gpu() as gpu, mock.patch.object(torch.cuda, "current_stream") as stream:
        make = mock.Mock(side_effect=made)
        tables, device = Resident(make), torch.device("cuda", 0)
        found = []
        for number in (3, 4, 3, 4):
            stream.return_value = Stream(number)
            found.append(tables.on(device, 5, 6))
        assert found[0] is found[2] and found[1] is found[3] and found[0] is not found[1]
        assert make.call_count == 2 and not gpu.reads
        assert all(table.is_cuda and table.cpu().tolist() == [5, 6] for table in found)
        assert tables.on(device, 6, 5).cpu().tolist() == [6, 5]


def test_the_table_used_longest_ago_goes_first() -> None:
    with stand_in_gpu():
        tables, device = Resident(made, most=2), torch.device("cuda", 0)
        first, second = tables.on(device, 1), tables.on(device, 2)
        assert tables.on(device, 1) is first
        tables.on(device, 3)
        assert tables.on(device, 1) is first and tables.on(device, 2) is not second


def test_a_graph_keeps_its_tables() -> None:
    """What a CUDA graph reads at every replay must not be given to somebody else."""
    with (
        stand_in_gpu(),
        mock.patch.object(torch.cuda, "current_stream") as stream,
        mock.patch.object(torch.cuda, "is_current_stream_capturing") as capturing,
    ):
        stream.return_value, capturing.return_value = Stream(1), False
        tables, device = Resident(made, most=1), torch.device("cuda", 0)
        before = tables.on(device, 1)
        stream.return_value, capturing.return_value = Stream(2), True
        assert tables.on(device, 1) is before
        with pytest.raises(RuntimeError, match=r"once before a CUDA graph is captured: a table for \(2,\)"):
            tables.on(device, 2)
        stream.return_value, capturing.return_value = Stream(1), False
        tables.on(device, 2)
        assert tables.on(device, 1) is not before
        capturing.return_value = True
        assert tables.on(device, 1) is before


def test_bad_sizes() -> None:
    image = picture(30, 31)
    with pytest.raises(ValueError, match="size: .* multiples of 28, .* found 28 x 30"):
        patchify(image, mean=MEAN, std=STD, size=(28, 30))
    with pytest.raises(ValueError, match="size: .* found 0 x 28"):
        patchify(image, mean=MEAN, std=STD, size=(0, 28))
    with pytest.raises(ValueError, match=r"size: expected \(height, width\)"):
        patchify(image, mean=MEAN, std=STD, size=(28,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="resample: expected one of .* found 'nearest'"):
        patchify(image, mean=MEAN, std=STD, size=(28, 28), resample="nearest")
    with pytest.raises(ValueError, match="image: .* found 0 x 31"):
        patchify(image[:0], mean=MEAN, std=STD, size=(28, 28))
    with pytest.raises(TypeError, match="dtype: expected float32, bfloat16 or float16"):
        patchify(image, mean=MEAN, std=STD, size=(28, 28), dtype=torch.float64)
    with pytest.raises(TypeError, match="out: expected dtype bfloat16"):
        out = torch.zeros(4, 1176)
        patchify(image, mean=MEAN, std=STD, size=(28, 28), dtype=torch.bfloat16, out=out)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="multiples of 28"):
        patchify(picture(28, 30), mean=MEAN, std=STD)
    with pytest.raises(TypeError, match="uint8"):
        patchify(picture(28, 28).float(), mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="image"):
        patchify(picture(28, 28)[..., :1], mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="std"):
        patchify(picture(28, 28), mean=MEAN, std=(1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="out"):
        patchify(picture(28, 28), mean=MEAN, std=STD, out=torch.zeros(4, 7))

# SPDX-License-Identifier: Apache-2.0
"""patchify against Hugging Face's PIL image processor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from glimpse_kernels import patchify
from tests.kernels.kernel_cases import Case, op_cases

all_cases = pytest.mark.parametrize("kernel", op_cases("patchify"), indirect=True)


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
    batch = processor(images=[image.numpy()], return_tensors="np")
    got = patchify(image, mean=MEAN, std=STD)
    assert batch["image_grid_thw"].tolist() == [[1, size[0] // 14, size[1] // 14]]
    np.testing.assert_allclose(got.numpy(), batch["pixel_values"], rtol=3e-7, atol=2e-7)


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
    want = processor(images=[image.numpy()], return_tensors="np")["pixel_values"]
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
    np.testing.assert_allclose(got.numpy(), want, rtol=3e-7, atol=2e-7)


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

# SPDX-License-Identifier: Apache-2.0
"""The processor against Hugging Face's: pictures against its PIL image processor, prompts against its Qwen2.5-VL
processor (whose type check of the video processor is switched off: that one needs torchvision and takes no part)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as reference

from glimpse_runtime.errors import CheckpointError
from glimpse_runtime.images import ImageError, pixels_of, smart_resize, to_rgb
from glimpse_runtime.processor import Processor
from glimpse_runtime.processor_files import ImageSettings, ProcessorError

MOST = 448 * 448
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SLOT = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A processor folder as Hugging Face writes it, with a byte-level tokenizer made on the spot."""
    root = tmp_path_factory.mktemp("checkpoint")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[*SPECIAL, "<|video_pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["which colour is the circle", "what number is written here"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(root)
    settings = {"min_pixels": 56 * 56, "max_pixels": MOST, "patch_size": 14, "merge_size": 2}
    (root / "preprocessor_config.json").write_text(json.dumps({**settings, "temporal_patch_size": 2}))
    return root


@pytest.fixture(scope="module")
def processor(folder) -> Processor:
    return Processor.from_pretrained(folder)


@pytest.fixture(scope="module")
def pictures_of_hf():
    return reference.Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=MOST)


@pytest.fixture()
def hf(processor, pictures_of_hf, monkeypatch) -> Qwen2_5_VLProcessor:
    monkeypatch.setattr(Qwen2_5_VLProcessor, "check_argument_for_proper_class", lambda *a, **k: None)
    return Qwen2_5_VLProcessor(pictures_of_hf, processor.tokenizer, None, chat_template=TEMPLATE)


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16))
    if mode == "F":
        return Image.fromarray(rng.uniform(0, 300, (height, width)).astype(np.float32))
    channels = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4, "P": 3, "1": 1}[mode]
    data = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    if mode in ("L", "1"):
        image = Image.fromarray(data[..., 0])
        return image.convert("1") if mode == "1" else image
    if mode == "LA":
        return Image.merge("LA", [Image.fromarray(np.ascontiguousarray(data[..., i])) for i in range(2)])
    if mode == "P":
        return Image.fromarray(data).quantize(17)
    bands = [Image.fromarray(np.ascontiguousarray(data[..., i])) for i in range(channels)]
    return Image.merge(mode, bands)


def assert_same(ours, theirs) -> None:
    pixels, grid = ours
    assert grid.tolist() == theirs["image_grid_thw"].tolist()
    assert pixels.dtype == torch.float32 and pixels.shape == theirs["pixel_values"].shape
    # a rounding of float32 at values up to 2.7
    assert torch.allclose(pixels, theirs["pixel_values"], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "size",
    [(168, 168), (100, 150), (14, 14), (14, 600), (29, 41), (448, 448), (447, 449), (1000, 37), (640, 480)]
    + [(1600, 1200), (28, 28), (42, 42), (70, 98), (56, 3000)],
)
def test_sizes_equal_hugging_face(processor, pictures_of_hf, size):
    image = noise(*size)
    assert_same(processor.process_images(image), pictures_of_hf(image, return_tensors="pt"))


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "CMYK", "P", "1", "I;16", "F"])
def test_modes_equal_hugging_face(processor, pictures_of_hf, mode):
    image = noise(90, 61, mode)
    assert_same(processor.process_images(image), pictures_of_hf(image, return_tensors="pt"))


def test_palette_transparency_equals_hugging_face(processor, pictures_of_hf, tmp_path):
    image = noise(90, 61, "P")
    image.save(tmp_path / "p.png", transparency=3)
    with Image.open(tmp_path / "p.png") as opened:
        assert opened.info.get("transparency") is not None
        assert_same(processor.process_images(opened), pictures_of_hf(opened, return_tensors="pt"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("as_path", [True, False])
def test_orientation_equals_hugging_face(processor, pictures_of_hf, tmp_path, orientation, as_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    noise(120, 60).save(path, exif=exif)
    if as_path:
        fetched = pictures_of_hf.fetch_images(str(path))  # what its processor does with a path
        assert_same(processor.process_images(path), pictures_of_hf(fetched, return_tensors="pt"))
    else:
        with Image.open(path) as opened:
            assert_same(processor.process_images(opened), pictures_of_hf(opened, return_tensors="pt"))


@pytest.mark.parametrize("ending", ["png", "jpeg", "webp", "tiff", "bmp", "gif", "jp2", "ico"])
def test_file_formats_equal_hugging_face(processor, pictures_of_hf, tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    try:
        noise(90, 61).save(path)
    except (KeyError, OSError) as missing:
        pytest.skip(f"this Pillow does not write it: {missing}")
    fetched = pictures_of_hf.fetch_images(str(path))
    assert_same(processor.process_images(path), pictures_of_hf(fetched, return_tensors="pt"))
    with Image.open(path) as opened:
        assert_same(processor.process_images(opened), pictures_of_hf(opened, return_tensors="pt"))


def test_pictures_are_left_alone(processor):
    """Nothing is copied that need not be, and nothing of the caller's is written to."""
    image, array = noise(90, 61), np.asarray(noise(90, 61, seed=1)).copy()
    before = image.tobytes(), array.tobytes()
    assert to_rgb(image) is image
    processor.process_images([image, array, torch.from_numpy(array)])
    assert (image.tobytes(), array.tobytes()) == before


def test_pictures_larger_than_a_strip():
    for size in ((3001, 131), (131, 3001), (2000, 1999)):
        image = noise(*size)
        found = pixels_of(image)
        assert found.is_contiguous() and np.array_equal(found.numpy(), np.asarray(image))


@pytest.mark.parametrize("shape", [(61, 90, 3), (3, 61, 90), (61, 90, 4), (61, 90, 1), (1, 61, 90)])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_arrays_equal_hugging_face(processor, pictures_of_hf, shape, kind):
    array = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    given = torch.from_numpy(array) if kind == "torch" else array
    assert_same(processor.process_images(given), pictures_of_hf(given, return_tensors="pt"))


def test_several_pictures_and_nesting(processor, pictures_of_hf):
    images = [noise(90, 61), noise(56, 200, seed=1), noise(333, 222, seed=2)]
    theirs = pictures_of_hf(images, return_tensors="pt")
    assert_same(processor.process_images(images), theirs)
    assert_same(processor.process_images([images[:1], [], images[1:]]), theirs)


def test_call_equals_hugging_face(processor, hf):
    prompts = [f"{SLOT}which colour?", "no picture", f"a{SLOT}b{SLOT}"]
    images = [noise(90, 61), noise(56, 200, seed=1), noise(333, 222, seed=2)]
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    theirs = hf(text=prompts, images=images, **options)
    for given in (images, [images[:1], [], images[1:]], [images[0], None, images[1:]]):
        ours = processor(text=prompts, images=given, **options)
        assert set(ours) == set(theirs)
        for name in ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw"):
            assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name
        assert torch.allclose(ours["pixel_values"], theirs["pixel_values"], rtol=0, atol=2e-6)
    right = processor(prompts, images, padding_side="right")
    assert torch.equal(
        right["input_ids"],
        hf(text=prompts, images=images, **{**options, "padding_side": "right"})["input_ids"],
    )


def test_text_only_equals_hugging_face(processor, hf):
    ours, theirs = processor("which colour"), hf(text=["which colour"], return_tensors="pt")
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_chat_template_equals_hugging_face(processor, hf, tmp_path):
    noise(90, 61).save(tmp_path / "a.png")
    messages = [
        {"role": "system", "content": "be brief"},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": str(tmp_path / "a.png")},
                {"type": "text", "text": "which colour is the circle?"},
            ],
        },
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == hf.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text.endswith("<|im_start|>assistant\n")
    ours = processor.apply_chat_template(messages, tokenize=True)
    theirs = hf.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert set(ours) == set(theirs)
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.allclose(ours["pixel_values"], theirs["pixel_values"], rtol=0, atol=2e-6)
    assert processor.apply_chat_template([messages, messages]) == [text, text]
    bare = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which colour?"}]}]
    placed = processor.apply_chat_template(bare, images=noise(90, 61), tokenize=True)
    assert placed["image_grid_thw"].tolist() == ours["image_grid_thw"].tolist()


def test_openai_image_entries(processor, tmp_path):
    noise(90, 61).save(tmp_path / "a.png")
    address = {"type": "image_url", "image_url": {"url": str(tmp_path / "a.png")}}
    features = processor.apply_chat_template([{"role": "user", "content": [address]}], tokenize=True)
    assert len(features["image_grid_thw"]) == 1


def test_decode_round_trip(processor):
    ids = processor("which colour is it")["input_ids"]
    assert (
        processor.batch_decode(ids) == ["which colour is it"]
        and processor.decode(ids[0]) == "which colour is it"
    )


def test_smart_resize_equals_hugging_face():
    rng = np.random.default_rng(5)
    for height, width in rng.integers(1, 3000, (500, 2)).tolist():
        if max(height, width) > 200 * min(height, width):
            continue
        bounds = {"factor": 28, "min_pixels": 3136, "max_pixels": MOST}
        assert smart_resize(height, width, **bounds) == reference.smart_resize(height, width, **bounds)


def test_area_bounds_can_be_overridden(folder, processor):
    image = noise(448, 448)
    assert processor.process_images(image, max_pixels=112 * 112)[1].tolist() == [[1, 8, 8]]
    assert Processor.from_pretrained(folder, max_pixels=112 * 112).process_images(image)[1].tolist() == [
        [1, 8, 8]
    ]


def test_settings_spellings(tmp_path, folder):
    new = {
        "size": {"shortest_edge": 784, "longest_edge": 7840},
        "image_mean": [0, 0, 0],
        "do_normalize": False,
    }
    settings = ImageSettings.from_dict(new)
    assert (settings.min_pixels, settings.max_pixels, settings.std) == (784, 7840, (1.0, 1.0, 1.0))
    for name in folder.iterdir():
        if name.name != "preprocessor_config.json":
            (tmp_path / name.name).write_bytes(name.read_bytes())
    with pytest.raises(ProcessorError, match="preprocessor_config.json"):
        Processor.from_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": new}))
    assert Processor.from_pretrained(tmp_path).image.max_pixels == 7840


@pytest.mark.parametrize(
    ("size", "message"),
    [((13, 100), "at least 14 px, found 13 x 100"), ((1, 1), "too small"), ((14, 2900), "at most 200")],
)
def test_unusable_sizes(processor, size, message):
    with pytest.raises(ImageError, match=message):
        processor.process_images([noise(56, 56), Image.new("RGB", size)])


def test_unusable_files(processor, tmp_path):
    with pytest.raises(ImageError, match="no such file"):
        processor.process_images(tmp_path / "absent.png")
    (tmp_path / "note.png").write_text("not a picture")
    with pytest.raises(ImageError, match="not a picture"):
        processor.process_images(tmp_path / "note.png")
    noise(200, 200).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=r"images\[1\].*corrupt"):
        processor.process_images([noise(56, 56), tmp_path / "cut.png"])
    noise(200, 200).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    with pytest.raises(ImageError, match="corrupt"):
        processor.process_images(tmp_path / "cut.jpg")
    with pytest.raises(ImageError, match="folder"):
        processor.process_images(tmp_path)
    with pytest.raises(ImageError, match="from disk only"):
        processor.process_images("https://example.com/a.png")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((40, 40, 3), np.float32), "uint8"),
        (np.zeros((40, 40, 2), np.uint8), "channels"),
        (np.zeros((0, 40, 3), np.uint8), "empty"),
        (7, "found int"),
    ],
)
def test_unusable_arrays(given, message):
    with pytest.raises(ImageError, match=message):
        to_rgb(given)


def test_mismatches_are_named(processor):
    image = noise(56, 56)
    with pytest.raises(ProcessorError, match="each of the 1 pictures, found 0"):
        processor("no slot", image)
    with pytest.raises(ProcessorError, match="each of the 0 pictures, found 1"):
        processor(SLOT)
    with pytest.raises(ProcessorError, match=r"text\[0\].*2 pictures, found 1"):
        processor([SLOT, SLOT], [[image, image], []])
    with pytest.raises(ProcessorError, match="string"):
        processor([image], "text")
    with pytest.raises(ProcessorError, match="different length"):
        processor(["a", "which colour is the circle"], padding=False)
    with pytest.raises(ProcessorError, match="at least one"):
        processor()


def test_unusable_messages(processor, folder, tmp_path):
    with pytest.raises(ProcessorError, match="role"):
        processor.apply_chat_template([{"content": "x"}])
    with pytest.raises(ProcessorError, match="text or image, found 'video'"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video", "video": "x"}]}])
    with pytest.raises(ProcessorError, match="no chat template"):
        Processor(processor.tokenizer, processor.image, None).apply_chat_template(
            [{"role": "user", "content": "x"}]
        )
    with pytest.raises(CheckpointError, match="expected a folder"):
        Processor.from_pretrained(tmp_path / "absent")
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer_config.json"):
        Processor.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ProcessorError, match="no usable tokenizer"):
        Processor.from_pretrained(tmp_path)

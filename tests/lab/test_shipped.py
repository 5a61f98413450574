# SPDX-License-Identifier: Apache-2.0
"""The model in the repository: it loads in stock transformers and answers held-out questions, pruned too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from glimpse_kernels.vip.weights import VipWeights
from glimpse_lab.evaluate import evaluate
from glimpse_lab.samples import write_samples
from glimpse_lab.tokens import IMAGE_MEAN, IMAGE_STD, build_tokenizer
from glimpse_lab.world import HELD_OUT_SEED, ask, make_scene, render
from glimpse_runtime import GlimpseModel
from glimpse_runtime.processor import Processor

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"


def _patches(picture: Image.Image) -> torch.Tensor:
    """Qwen2-VL's patch rows, written out: 2 x 2 groups together, channels first, the one frame taken twice."""
    x = (
        torch.tensor(list(picture.tobytes()), dtype=torch.float32).view(picture.height, picture.width, 3)
        / 255
    )
    x = (x - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)
    rows = []
    for top in range(0, picture.height, 28):
        for left in range(0, picture.width, 28):
            for y in (top, top + 14):
                for z in (left, left + 14):
                    patch = x[y : y + 14, z : z + 14].permute(2, 0, 1)
                    rows.append(patch[:, None].expand(-1, 2, -1, -1).reshape(-1))
    return torch.stack(rows)


def test_stock_transformers_answers_held_out_questions() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY / "base", local_files_only=True)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(TINY / "base", dtype=torch.float32).eval()
    right = asked = 0
    for seed in range(HELD_OUT_SEED + 3_000_000_000, HELD_OUT_SEED + 3_000_000_000 + 3):
        scene = make_scene(seed, 224, 280)
        questions = ask(scene)
        patches = _patches(render(scene))
        tokenizer.padding_side = "left"
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q.question}]}],
                tokenize=False,
                add_generation_prompt=True,
            ).replace("<|image_pad|>", "<|image_pad|>" * 80)
            for q in questions
        ]
        inputs = tokenizer(prompts, padding=True, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                mm_token_type_ids=(inputs["input_ids"] == model.config.image_token_id).long(),
                pixel_values=patches.repeat(len(questions), 1),
                image_grid_thw=torch.tensor([[1, 16, 20]] * len(questions)),
                max_new_tokens=20,
                do_sample=False,
            )
        answers = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(a == q.answer for a, q in zip(answers, questions, strict=True))
        asked += len(questions)
    assert asked >= 24
    assert right / asked >= 0.85


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_pruned_answers_hold_and_controls_fall(quantize: str | None) -> None:
    model = GlimpseModel.from_pretrained(
        TINY / "base", glimpse=TINY / "glimpse", dtype=torch.float32, quantize=quantize
    )
    records = evaluate(
        model,
        Processor.from_pretrained(TINY / "base"),
        pictures=2,
        sizes=((224, 224), (336, 336)),
        first_seed=HELD_OUT_SEED + 4_000_000_000,
    )
    share = {
        m: sum(r[m] == r["answer"] for r in records) / len(records)
        for m in ("unpruned", "glimpse", "random", "none")
    }
    assert share["unpruned"] >= 0.85
    assert share["glimpse"] >= share["unpruned"] - 0.06
    assert max(share["random"], share["none"]) <= share["unpruned"] - 0.2
    assert sum(r["kept"] for r in records) / len(records) <= 0.15


def test_modules_and_tokenizer_are_the_lab_s_own() -> None:
    config = json.loads((TINY / "glimpse" / "config.json").read_text())
    new = torch.load(TINY / "glimpse" / "new_modules_gp.pt", weights_only=True)
    weights = VipWeights.from_state_dict(new["attn_fuser"], config)
    assert weights.kind == "v1" and weights.dtype == torch.bfloat16
    assert new["learnable_embeddings"].shape == (config["num_hidden_layers"], 1, config["hidden_size"])
    assert set(new) == {"attn_fuser", "learnable_embeddings", "le_proj", "le_norm"}
    shipped = AutoTokenizer.from_pretrained(TINY / "base", local_files_only=True)
    assert shipped.get_vocab() == build_tokenizer().get_vocab()


def test_sample_pictures_are_the_held_out_scenes(tmp_path: Path) -> None:
    entries = write_samples(tmp_path / "pictures")
    assert json.loads((TINY / "pictures" / "questions.json").read_text()) == entries
    for entry in entries:
        shipped = Image.open(TINY / "pictures" / entry["picture"])
        assert shipped.tobytes() == Image.open(tmp_path / "pictures" / entry["picture"]).tobytes()


def test_size() -> None:
    assert sum(p.stat().st_size for p in TINY.rglob("*") if p.is_file()) <= 24 * 1024 * 1024

# SPDX-License-Identifier: Apache-2.0
"""Training: batches and targets against direct arithmetic, the forward against transformers, learning and resuming."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from glimpse_lab.tokens import build_tokenizer
from glimpse_lab.train import checkpoint
from glimpse_lab.train.base import BaseTrainer, tiny_run, train_base
from glimpse_lab.train.config import ModulesRun
from glimpse_lab.train.data import TAIL, Batch, Encoder, make_batch
from glimpse_lab.train.model import Forward, new_model
from glimpse_lab.train.modules import ModulesTrainer, dice_loss
from glimpse_lab.train.optim import orthogonalise, wsd
from glimpse_lab.world import ask, caption, make_scene

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(build_tokenizer())


@pytest.fixture(scope="module")
def batch(encoder: Encoder) -> Batch:
    return make_batch(encoder, 40, 3, 168, 224, 128)


def test_targets_are_the_cells_of_the_box(batch: Batch, encoder: Encoder) -> None:
    tokenizer = build_tokenizer()
    checked = 0
    for b in range(3):
        scene = make_scene(40 + b, 168, 224)
        known = {q.question: q for q in (*ask(scene), caption(scene))}
        for block in range(int(batch.block[b].max()) + 1):
            inside = batch.block[b] == block
            question, answer = tokenizer.decode(batch.ids[b][inside]).split(TAIL)
            entry = known[question]
            assert answer == entry.answer
            assert tokenizer.decode(batch.labels[b][inside & (batch.labels[b] >= 0)]) == answer + "<|im_end|>"
            expected = torch.zeros(6, 8, dtype=torch.bool)
            for x1, y1, x2, y2 in entry.boxes:
                columns = range(math.floor(x1 / 224 * 8), min(math.floor((x2 - 1) / 224 * 8), 7) + 1)
                for r in range(math.floor(y1 / 168 * 6), min(math.floor((y2 - 1) / 168 * 6), 5) + 1):
                    expected[r, list(columns)] = True
            region = batch.region[b][inside & batch.last[b]]
            assert torch.equal(region.view(6, 8), expected)
            checked += 1
    assert checked > 10


def test_forward_equals_transformers_with_each_question_alone(batch: Batch, encoder: Encoder) -> None:
    shape, _ = tiny_run()
    model = new_model(shape, build_tokenizer(), 3).eval()
    forward = Forward(model, torch.float32)
    with torch.no_grad():
        out = forward(batch, (encoder.prefix, encoder.vision_end_id))
        patches = forward.patches(batch.pixels[1:2])[0][0]
        pixel_values = patches.view(-1, 3, 1, 196).expand(-1, -1, 2, -1).reshape(-1, 1176)
        for block in range(2):
            inside = batch.block[1] == block
            ids = [
                *encoder.prefix,
                *[encoder.image_id] * 48,
                encoder.vision_end_id,
                *batch.ids[1][inside].tolist(),
            ]
            tokens = torch.tensor([ids])
            reference = model(
                input_ids=tokens,
                pixel_values=pixel_values,
                image_grid_thw=torch.tensor([[1, 12, 16]]),
                mm_token_type_ids=(tokens == encoder.image_id).long(),
            ).logits[0, 53:][batch.labels[1][inside] >= 0]
            mine = out.logits[(out.where[0] == 1) & (batch.block[1][out.where[1]] == block)]
            torch.testing.assert_close(mine, reference, atol=2e-5, rtol=0)


def test_loss_falls_and_resume_equals_uninterrupted(tmp_path: Path) -> None:
    shape, run = tiny_run()
    whole = train_base(shape, run, tmp_path / "whole", CPU, workers=0)
    first = BaseTrainer(shape, run, CPU)
    schedule = first.schedule()
    losses = [first.train_step(schedule[i])["answer"] for i in range(2)]
    checkpoint.save(tmp_path / "cut" / "base.pt", first.state_dict())
    resumed = train_base(shape, run, tmp_path / "cut", CPU, workers=0)
    assert resumed.step == whole.step == 4
    for (name, a), b in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert whole.train_step(schedule[0])["answer"] < losses[0]


def test_modules_learn_where_to_look(encoder: Encoder) -> None:
    shape, _ = tiny_run()
    base = new_model(shape, build_tokenizer(), 3).state_dict()
    trainer = ModulesTrainer(shape, ModulesRun(warmup=1, tokens=600), base, CPU)
    one = make_batch(encoder, 7, 2, 168, 168, 64)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    losses = [trainer.train_step(one)["dice"] for _ in range(8)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
    assert all(p.grad is None or p.grad.isfinite().all() for p in trainer.modules.parameters())


def test_dice() -> None:
    target = torch.tensor([[1, 1, 0, 0]])
    assert dice_loss(torch.tensor([[99.0, 99, -99, -99]]), target).item() == pytest.approx(0)
    assert dice_loss(torch.tensor([[-99.0, -99, 99, 99]]), target).item() == pytest.approx(1 - 1 / 5)


def test_orthogonalise_levels_singular_values() -> None:
    torch.manual_seed(0)
    for shape in ((2, 24, 64), (1, 64, 24)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.4 and values.max() < 1.4


def test_schedule_of_the_learning_rate() -> None:
    rates = [wsd(step, 100, 10, 20) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[50] == 1 and rates[80] == 1
    assert rates[90] == pytest.approx(0.5) and rates[99] == pytest.approx(0.05)
    assert F.relu(torch.tensor(rates)).max() == 1

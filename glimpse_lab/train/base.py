# SPDX-License-Identifier: Apache-2.0
"""Base training: a Qwen2.5-VL learns to answer questions about drawn pictures.

Loss: cross-entropy of the answers; plus two training aids that vanish with the run: linear read-outs of each image token (the vision
tower learns from every cell, not only from those asked about), and pointing, the cross-entropy of one attention head at two
layers against the cells that answer (the whole answer's at the glimpse layer, the next token's two layers later).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from glimpse_lab.tokens import build_tokenizer
from glimpse_lab.train.config import BaseRun, ModelShape, Stage
from glimpse_lab.train.data import TASK_NAMES, Batch, Encoder, Schedule, make_batch
from glimpse_lab.train.loop import train_loop
from glimpse_lab.train.model import CellHeads, Forward, Output, new_model, pointing_loss
from glimpse_lab.train.optim import make_optimizers, set_rate, wsd
from glimpse_lab.world import HELD_OUT_SEED

VALIDATION_SEED = HELD_OUT_SEED
"""Held-out seeds looked at during training; the final evaluation uses others."""


class BaseTrainer:
    """State of a base run. Everything that influences the next step is in ``state_dict``."""

    def __init__(self, shape: ModelShape, run: BaseRun, device: torch.device, compiled: bool = False) -> None:
        self.shape, self.run, self.device = shape, run, device
        self.tokenizer = build_tokenizer()
        self.encoder = Encoder(self.tokenizer)
        self.prefix_ids = (self.encoder.prefix, self.encoder.vision_end_id)
        self.model: Qwen2_5_VLForConditionalGeneration = new_model(shape, self.tokenizer, run.seed).to(device)
        self.heads = CellHeads(shape.hidden).to(device)
        self.forward = Forward(self.model, torch.bfloat16, compiled)
        self.optimizers = make_optimizers(
            [self.model, self.heads], run.muon_lr, run.adam_lr, run.weight_decay
        )
        self.step = 0

    @property
    def total(self) -> int:
        return self.run.main_steps + self.run.drop_steps

    def rate(self) -> float:
        """Learning rate of the next step, as a share of the base rate."""
        run = self.run
        if self.step < run.main_steps:
            return wsd(self.step, run.main_steps, run.warmup, run.decay_steps)
        return run.drop_rate * (self.total - self.step) / run.drop_steps

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, float], Output]:
        keep_after = None
        if self.step >= self.run.main_steps:
            keep_after = (
                self.run.drop_layer,
                needless_dropped(batch, self.run.drop_share, self.run.seed + self.step),
            )
        out = self.forward(batch, self.prefix_ids, keep_after=keep_after)
        answer = F.cross_entropy(out.logits, out.labels)
        first, second = (out.qkv[i] for i in self.run.point_layers)
        region = pointing_loss(first[0], first[1], batch.region, 0)
        evidence = pointing_loss(second[0], second[1], batch.evidence, 0)
        cells = self.heads(out.image_embeds, batch.cells)
        if batch.more_pixels is not None and batch.more_cells is not None:
            cells = (cells + self.heads(self.forward.vision(batch.more_pixels)[0], batch.more_cells)) / 2
        loss = answer + self.run.point_weight * (region + evidence) + self.run.cell_weight * cells
        parts = {"answer": answer, "region": region, "evidence": evidence, "cells": cells}
        return loss, {k: v.item() for k, v in parts.items()}, out

    def train_step(self, batch: Batch) -> dict[str, float]:
        set_rate(self.optimizers, self.rate())
        loss, parts, _ = self.losses(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*self.model.parameters(), *self.heads.parameters()], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return parts

    def schedule(self) -> Schedule:
        run = self.run
        stages = [(s.steps, s.sizes) for s in run.stages]
        stages.append((run.drop_steps, run.stages[-1].sizes))
        return Schedule(
            self.tokenizer, run.seed, stages, run.tokens, run.text_length, run.short_until, run.more_patches
        )

    def state_dict(self) -> dict:
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
        }

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def needless_dropped(batch: Batch, share: float, seed: int) -> Tensor:
    """Keep masks [B, T, N], one a question: for ``share`` of them the answer's cells and a random few others, else all."""
    generator = torch.Generator().manual_seed(seed)
    device = batch.ids.device
    keep = torch.ones_like(batch.region)
    for b in range(len(batch.ids)):
        needed = batch.region[b][batch.last[b]]
        density = 0.1 * torch.rand(len(needed), 1, generator=generator) ** 2
        others = torch.rand(needed.shape, generator=generator) < density
        whole = torch.rand(len(needed), 1, generator=generator) >= share
        keep[b] = (needed | (others | whole).to(device))[batch.block[b].clamp(min=0)]
    return keep


def right_blocks(logits: Tensor, labels: Tensor, where: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Which questions are answered exactly, and their tasks.

    All answer tokens and the end right given the right ones before is the same as the greedy answer being right.
    """
    owner = where[0] * 1000 + batch.block[where[0], where[1]]
    groups, inverse = owner.unique(return_inverse=True)
    wrong = torch.zeros(len(groups), dtype=torch.long, device=owner.device)
    wrong.index_add_(0, inverse, (logits.argmax(-1) != labels).long())
    task = torch.zeros_like(wrong)
    task[inverse] = batch.task[where[0], where[1]]
    return wrong == 0, task


@torch.no_grad()
def validate(
    forward: Callable[[Batch], Output],
    encoder: Encoder,
    sizes: list[tuple[int, int]],
    pictures: int,
    device: torch.device,
) -> dict[str, float]:
    """Exact-answer share per task and per size, on held-out pictures, each question alone with its picture."""
    hits: dict[str, list[int]] = {}
    for i, (height, width) in enumerate(sizes):
        for first in range(0, pictures, 16):
            seed = VALIDATION_SEED + i * 100_000 + first
            batch = make_batch(encoder, seed, min(16, pictures - first), height, width, 256).to(device)
            out = forward(batch)
            right, task = right_blocks(out.logits, out.labels, out.where, batch)
            for ok, t in zip(right.tolist(), task.tolist(), strict=True):
                names = [TASK_NAMES[t]]
                if TASK_NAMES[t] != "caption":
                    names += ["all", f"{height}x{width}"]
                for name in names:
                    hits.setdefault(name, []).append(ok)
    return {name: sum(v) / len(v) for name, v in hits.items()}


def train_base(
    shape: ModelShape,
    run: BaseRun,
    folder: Path,
    device: torch.device,
    *,
    compiled: bool = False,
    workers: int = 1,
) -> BaseTrainer:
    """Trains or resumes in ``folder`` (``base.pt``, ``base.log``); returns the trainer at its last step."""
    trainer = BaseTrainer(shape, run, device, compiled)

    def evaluate() -> dict[str, float]:
        sizes = sorted(run.stages[0].sizes if trainer.step < run.stages[0].steps else run.stages[-1].sizes)
        if run.eval_batches and trainer.step != trainer.total:
            sizes = sizes[:: max(1, len(sizes) // run.eval_batches)]
        forward = trainer.forward
        return validate(lambda b: forward(b, trainer.prefix_ids), trainer.encoder, sizes, 16, device)

    train_loop(
        trainer, "base", trainer.total, folder, device, evaluate=evaluate, eval_every=run.eval_every,
        save_every=run.save_every, log_every=20, smoothing=0.97, workers=workers,
    )  # fmt: skip
    return trainer


def tiny_run() -> tuple[ModelShape, BaseRun]:
    """Settings that run in a second or two, for tests; no useful model comes out."""
    shape = ModelShape(hidden=64, layers=4, heads=2, kv_heads=1, mlp=96, vision_hidden=64, vision_layers=4, vision_heads=2,
                       vision_mlp=64, reduce_layer=1, fuse_size=32, cond_size=32)  # fmt: skip
    run = BaseRun(
        tokens=700,
        text_length=64,
        more_patches=400,
        drop_steps=1,
        drop_layer=1,
        point_layers=(1, 2),
        warmup=2,
        decay_steps=2,
        save_every=2,
        eval_every=10**9,
    )
    return shape, replace(run, stages=(Stage(3, {(168, 168): 1.0}),))

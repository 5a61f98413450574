# SPDX-License-Identifier: Apache-2.0
"""Training of GlimpsePrune's modules on a frozen base.

Loss: dice + 0.1 x binary cross-entropy of the importance logits against the cells of the answer's boxes, and the cross-entropy of the
answer where the glimpse token, right before it, predicts its first token (later answer tokens do not see the glimpse token, which is
gone by then, so they have nothing to teach).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glimpse_lab.tokens import build_tokenizer
from glimpse_lab.train.base import right_blocks
from glimpse_lab.train.config import ModelShape, ModulesRun
from glimpse_lab.train.data import TASK_NAMES, Batch, Encoder, Schedule, make_batch
from glimpse_lab.train.glimpse import GlimpseModules, glimpse_rows
from glimpse_lab.train.loop import train_loop
from glimpse_lab.train.model import Forward, new_model
from glimpse_lab.train.optim import make_optimizers, set_rate, wsd
from glimpse_lab.world import HELD_OUT_SEED

VALIDATION_SEED = HELD_OUT_SEED + 50_000_000


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 - 2 |p t| / (|p| + |t|), one picture a row, averaged. logits, target [G, N]."""
    p, t = logits.sigmoid(), target.float()
    return (1 - (2 * (p * t).sum(-1) + 1) / (p.sum(-1) + t.sum(-1) + 1)).mean()


class ModulesTrainer:
    """State of a modules run; the base's weights are given and never change."""

    def __init__(
        self,
        shape: ModelShape,
        run: ModulesRun,
        base: dict[str, Tensor],
        device: torch.device,
        compiled: bool = False,
    ) -> None:
        self.shape, self.run, self.device = shape, run, device
        self.tokenizer = build_tokenizer()
        self.encoder = Encoder(self.tokenizer)
        self.prefix_ids = (self.encoder.prefix, self.encoder.vision_end_id)
        model = new_model(shape, self.tokenizer, 0)
        # The base is shipped in bfloat16, so the modules learn on the rounded weights.
        model.load_state_dict({k: v.bfloat16().float() for k, v in base.items()})
        self.model = model.requires_grad_(False).to(device)
        self.forward = Forward(self.model, torch.bfloat16, compiled)
        self.modules = GlimpseModules(shape, run.seed).to(device)
        self.optimizers = make_optimizers([self.modules], run.muon_lr, run.adam_lr, 0.0)
        self.step = 0

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            out = self.forward(batch, self.prefix_ids)
        scores, first, owner, at = glimpse_rows(self.forward, self.modules, batch, out)
        logits = self.modules.importance(scores, out.taps, batch, owner)
        target = batch.region[owner, at]
        dice = dice_loss(logits, target)
        bce = F.binary_cross_entropy_with_logits(logits, target.float())
        answer = F.cross_entropy(first, batch.labels[owner, at])
        run = self.run
        loss = run.dice_weight * dice + run.bce_weight * bce + run.answer_weight * answer
        keep = logits > 0
        recall = (keep & target).sum() / target.sum()
        parts = {"dice": dice, "bce": bce, "answer": answer, "kept": keep.float().mean(), "recall": recall}
        return loss, {k: v.item() for k, v in parts.items()}

    def train_step(self, batch: Batch) -> dict[str, float]:
        set_rate(self.optimizers, wsd(self.step, self.run.steps, self.run.warmup, self.run.decay_steps))
        loss, parts = self.losses(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return parts

    def schedule(self) -> Schedule:
        run = self.run
        return Schedule(self.tokenizer, run.seed, [(run.steps, run.sizes)], run.tokens, run.text_length)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "modules": self.modules.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.modules.load_state_dict(state["modules"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


@torch.no_grad()
def validate_modules(
    trainer: ModulesTrainer, sizes: list[tuple[int, int]], pictures: int
) -> dict[str, float]:
    """Exact-answer share with everything, with the predicted cells, with as many random cells and with none; kept share."""
    hits: dict[str, list[float]] = {}
    generator = torch.Generator().manual_seed(0)
    device = trainer.device
    for i, (height, width) in enumerate(sizes):
        batch = make_batch(
            trainer.encoder, VALIDATION_SEED + i * 100_000, pictures, height, width, 256, captions=False
        ).to(device)
        full = trainer.forward(batch, trainer.prefix_ids)
        scores, _, owner, at = glimpse_rows(trainer.forward, trainer.modules, batch, full)
        logits = trainer.modules.importance(scores, full.taps, batch, owner)
        best = F.one_hot(logits.argmax(-1), logits.shape[1]).bool()
        glimpse = (logits > 0) | best
        noise = torch.rand(logits.shape, generator=generator).to(device)
        random = noise.argsort(-1).argsort(-1) < glimpse.sum(-1, keepdim=True)
        target = batch.region[owner, at]
        for name, kept in (
            ("glimpse", glimpse),
            ("box", target),
            ("random", random),
            ("none", torch.zeros_like(random)),
        ):
            block = batch.block[owner, at]
            keep = torch.zeros(*batch.ids.shape, kept.shape[1], dtype=torch.bool, device=device)
            for b in range(len(batch.ids)):
                rows = kept[owner == b][batch.block[b].clamp(min=0)] if (owner == b).any() else None
                if rows is not None:
                    keep[b] = rows
            assert bool((block >= 0).all())
            out = trainer.forward(batch, trainer.prefix_ids, keep_after=(trainer.shape.reduce_layer, keep))
            right, task = right_blocks(out.logits, out.labels, out.where, batch)
            hits.setdefault(name, []).extend(right.tolist())
            for ok, t in zip(right.tolist(), task.tolist(), strict=True):
                hits.setdefault(f"{name}.{TASK_NAMES[t]}", []).append(ok)
        right, _ = right_blocks(full.logits, full.labels, full.where, batch)
        hits.setdefault("full", []).extend(right.tolist())
        if height * width >= 224 * 224:
            hits.setdefault("kept>=224", []).extend(glimpse.float().mean(-1).tolist())
    return {k: sum(v) / len(v) for k, v in hits.items()}


def train_modules(
    shape: ModelShape,
    run: ModulesRun,
    base: dict[str, Tensor],
    folder: Path,
    device: torch.device,
    *,
    compiled: bool = False,
    workers: int = 1,
) -> ModulesTrainer:
    """Trains or resumes in ``folder`` (``modules.pt``, ``modules.log``); returns the trainer at its last step."""
    trainer = ModulesTrainer(shape, run, base, device, compiled)

    def evaluate() -> dict[str, float]:
        return validate_modules(trainer, sorted(run.sizes)[:: 1 if trainer.step == run.steps else 3], 8)

    train_loop(
        trainer, "modules", run.steps, folder, device, evaluate=evaluate, eval_every=run.eval_every,
        save_every=run.save_every, log_every=10, smoothing=0.95, workers=workers,
    )  # fmt: skip
    return trainer

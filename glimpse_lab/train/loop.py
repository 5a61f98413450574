# SPDX-License-Identifier: Apache-2.0
"""The loop both trainings share: resume, step, log, save, evaluate."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from glimpse_lab.train import checkpoint
from glimpse_lab.train.data import Batch, Schedule


class Trainer(Protocol):
    """What the loop asks of a trainer; everything that influences the next step is in ``state_dict``."""

    step: int

    def schedule(self) -> Schedule: ...
    def train_step(self, batch: Batch) -> dict[str, float]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def format_scores(scores: dict[str, float]) -> str:
    return " ".join(f"{k}={100 * v:.1f}" for k, v in scores.items())


def train_loop(
    trainer: Trainer,
    name: str,
    total: int,
    folder: Path,
    device: torch.device,
    *,
    evaluate: Callable[[], dict[str, float]],
    eval_every: int,
    save_every: int,
    log_every: int,
    smoothing: float,
    workers: int,
) -> None:
    """Run or resume ``trainer`` up to step ``total`` with ``<name>.pt`` and ``<name>.log`` in ``folder``.

    ``smoothing`` is the weight of the past in the running means that are shown.
    """
    path = folder / f"{name}.pt"
    if (state := checkpoint.load(path)) is not None:
        trainer.load_state_dict(state)
    loader = torch.utils.data.DataLoader(
        trainer.schedule(), batch_size=None, sampler=range(trainer.step, total), num_workers=workers,
        prefetch_factor=4 if workers else None,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    mean: dict[str, float] = {}
    started = time.monotonic()
    with (
        (folder / f"{name}.log").open("a") as log,
        tqdm(total=total, initial=trainer.step, desc=name, mininterval=5) as bar,
    ):
        for batch in loader:
            parts = trainer.train_step(batch.to(device))
            mean = {k: smoothing * mean.get(k, v) + (1 - smoothing) * v for k, v in parts.items()}
            bar.set_postfix({k: f"{v:.3f}" for k, v in mean.items()}, refresh=False)
            bar.update()
            last = trainer.step == total
            if trainer.step % log_every == 0:
                shown = " ".join(f"{k}={v:.3f}" for k, v in mean.items())
                print(f"step {trainer.step} {shown} t={time.monotonic() - started:.0f}", file=log, flush=True)
            if trainer.step % save_every == 0 or last:
                checkpoint.save(path, trainer.state_dict())
            if trainer.step % eval_every == 0 or last:
                print(f"eval {trainer.step} {format_scores(evaluate())}", file=log, flush=True)

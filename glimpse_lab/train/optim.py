# SPDX-License-Identifier: Apache-2.0
"""Muon for hidden matrices, batched over matrices of one shape; AdamW for everything else.

Muon: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024): momentum, then the update matrix is
replaced by its nearest semi-orthogonal matrix through five Newton-Schulz steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrices. g [M, rows, columns]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * (s @ s)) @ x
    return (x.mT if tall else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Muon over 2-D parameters. The step is scaled by ``sqrt(max(1, rows / columns))``; weight decay is decoupled."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[tuple(p.shape)].append(p)
            for (rows, columns), params in shapes.items():
                momenta = []
                for p in params:
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    momenta.append(state["momentum"])
                grads = [p.grad for p in params]
                torch._foreach_mul_(momenta, group["momentum"])
                torch._foreach_add_(momenta, grads)
                nesterov = torch._foreach_add(grads, momenta, alpha=group["momentum"])
                update = orthogonalise(torch.stack(nesterov)) * max(1.0, rows / columns) ** 0.5
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(update.unbind(0)), alpha=-group["lr"])


def make_optimizers(
    modules: Iterable[nn.Module], muon_lr: float, adam_lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon on the blocks' matrices, AdamW on embeddings, heads, convolutions, norms and biases."""
    matrices, rest = [], []
    for module in modules:
        for name, p in module.named_parameters():
            if not p.requires_grad:
                continue
            hidden = p.dim() == 2 and any(part in name for part in ("layers.", "blocks.", "merger."))
            (matrices if hidden else rest).append(p)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.97), weight_decay=0.0, foreach=True)
    ]
    if matrices:
        optimizers.append(Muon(matrices, lr=muon_lr, weight_decay=weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def set_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Scales every learning rate to ``factor`` times its base."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor


def wsd(step: int, total: int, warmup: int, decay: int) -> float:
    """Warm-up, then constant, then linear to zero over the last ``decay`` steps."""
    return min(1.0, (step + 1) / warmup, max(0.0, (total - step) / decay))

# SPDX-License-Identifier: Apache-2.0
"""The measured rows of flow along the similarities of an image; see `bench.op_cases`."""

from __future__ import annotations

import torch
from torch import Tensor

import glimpse_kernels as kernels
from bench.op_registry import REGISTRY, Results, Sizes, Work
from glimpse_kernels.graph_flow.naive import graph_flow as naive_graph_flow

THRESHOLD, STEPS = 0.5, 5  # as published
TEMPERATURE = 0.2
"""It costs what the published 0.03 does, which makes 33 units of a share of one unit of a cosine."""
ALIKE = 8  # tokens


def _flow(s: Sizes, dtype: torch.dtype, pictures: int) -> Work:
    n = s.image
    # Cosines of 0.8 among tokens that are alike, of 0 among others: none so near the threshold that the order of a sum decides.
    centres = torch.randn(pictures * n // ALIKE, s.hidden).repeat_interleave(ALIKE, 0)
    features = (centres + 0.5 * torch.randn(pictures * n, s.hidden)).to(dtype)
    cu = torch.arange(pictures + 1, dtype=torch.int32) * n
    options = {"threshold": THRESHOLD, "temperature": TEMPERATURE, "steps": STEPS}

    def flow(all_steps: bool) -> Results:
        """The model's dtype throughout, as the original; all pictures have one size here."""
        rows = features.view(pictures, n, -1)
        norms = rows.norm(dim=2, keepdim=True)
        unit = rows / norms
        similar = unit @ unit.transpose(1, 2)
        edge = similar >= THRESHOLD
        share = (similar / TEMPERATURE).masked_fill(~edge, float("-inf")).softmax(2)
        if all_steps:
            flow: Tensor = norms.transpose(1, 2) @ torch.linalg.matrix_power(share.float(), STEPS).to(dtype)
        else:
            flow = norms.transpose(1, 2)
            for _ in range(STEPS):
                flow = flow @ share
        degrees = edge.sum(2)
        return (flow[:, 0].float() / degrees).flatten(), degrees.flatten().int()

    return Work(
        lambda: kernels.graph_flow(features, cu, **options),  # type: ignore[arg-type]
        lambda: flow(False),
        lambda: naive_graph_flow(features, cu, rounded=True, degree="edges", **options),  # type: ignore[arg-type]
        # One product of all rows with each other, half of it, as it is symmetric.
        pictures * n * n * s.hidden,
        "flop",
        tolerance=2e-2,
        plain_name="step by step",
        others={"the matrix to the power": lambda: flow(True)},
    )


@REGISTRY.add("graph_flow", "1 picture")
def flow_one(s: Sizes, dtype: torch.dtype) -> Work:
    return _flow(s, dtype, 1)


@REGISTRY.add("graph_flow", "8 pictures", where="gpu")
def flow_many(s: Sizes, dtype: torch.dtype) -> Work:
    return _flow(s, dtype, 8)

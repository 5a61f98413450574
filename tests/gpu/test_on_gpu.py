# SPDX-License-Identifier: Apache-2.0
"""The checks with which `make gpu-e2e` begins, as tests, on a GPU alone: nothing waits, graphs give what single launches give.

python3 -m pytest tests/gpu        after `make gpu-check`, so that it is the proven kernels that serve
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from bench import gpu_e2e_checks
from bench.gpu_e2e_contenders import Keep, Runtime
from bench.gpu_e2e_worker import backend_for
from bench.gpu_e2e_world import SMALL, World
from glimpse_kernels import dispatch
from glimpse_runtime import GlimpseModel
from glimpse_runtime.parity import case_names, load_manifest, run_case
from tests.runtime.conftest import make_batch
from tests.runtime.test_stages_device import METHODS, MORE

GOLDEN = Path(__file__).parents[1] / "golden" / "glimpse"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a GPU; make gpu-e2e runs these checks there"
    ),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    device = torch.device("cuda")
    forced, _, _ = backend_for("auto", device, SMALL.dtype)
    with dispatch.force_backend(forced), gpu_e2e_checks.exact_products():
        yield World(SMALL, device, tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("name", gpu_e2e_checks.ALL)
def test_check(world: World, name: str) -> None:
    gpu_e2e_checks.ALL[name](world)


def test_a_second_request_captures_nothing_new(world: World) -> None:
    runtime, tokens = Runtime(world), world.scale.tokens[1]
    prompt, pixels = world.prompt(tokens), world.patches(tokens, 1)
    runtime.serve(prompt, pixels, Keep(0.22), 8)
    graphs = len(runtime.model.engine.graphs)
    assert graphs > 0
    runtime.serve(world.prompt(tokens, seed=1), world.patches(tokens, 1, 1), Keep(0.22), 8)
    assert len(runtime.model.engine.graphs) == graphs


def test_graphs_that_are_dropped_are_captured_again(world: World) -> None:
    runtime, tokens = Runtime(world), world.scale.tokens[1]
    prompt, pixels = world.prompt(tokens), world.patches(tokens, 1)
    first = runtime.serve(prompt, pixels, Keep(0.22), 8).tokens
    runtime.model.engine.graphs.drop()
    assert torch.equal(runtime.serve(prompt, pixels, Keep(0.22), 8).tokens, first)


@pytest.mark.parametrize("name", case_names(load_manifest(GOLDEN)))
def test_recorded_case(world: World, name: str) -> None:
    result = run_case(GOLDEN, name, device="cuda")
    assert result.ok, result.failures


@contextmanager
def definitions() -> Iterator[set[str]]:
    """Ops that PyTorch definitions serve inside."""
    found: set[str] = set()
    select = dispatch.select

    def noted(op: str, device: Any, dtype: torch.dtype, **options: Any) -> Any:
        serve = select(op, device, dtype, **options)
        if serve.__module__.endswith(".naive"):
            found.add(op)
        return serve

    with mock.patch.object(dispatch, "select", noted):
        yield found


@pytest.mark.parametrize("name", METHODS)
def test_plan(world: World, name: str) -> None:
    """Each method keeps the tokens and says what it does on the CPU: captured, replayed, and with waits as errors."""
    make, _ = METHODS[name]
    (batch, _), (other, _) = make_batch(MORE), make_batch(MORE, seed=1)
    options = {"max_new_tokens": 6, "eos_token_id": None}
    models = [
        GlimpseModel.from_pretrained(GOLDEN / "base", GOLDEN / "gp_v1", dtype=torch.float32, device=device)
        for device in ("cpu", "cuda")
    ]
    wanted, found = (model.prefill(**batch, plan=make(model)) for model in models)
    assert wanted.pruning is not None and found.pruning is not None
    for theirs, ours in zip(wanted.pruning.stages, found.pruning.stages, strict=True):
        assert torch.equal(ours.keep.cpu(), theirs.keep), str(theirs.stage.at)
    torch.testing.assert_close(found.last_logits.cpu(), wanted.last_logits, atol=1e-3, rtol=0)
    cpu, gpu = models
    for inputs in (other, batch):
        assert gpu.generate(**inputs, **options, plan=make(gpu)).tolist() == (
            cpu.generate(**inputs, **options, plan=make(cpu)).tolist()
        )
    with definitions() as plain:
        gpu.generate(**other, **options, plan=make(gpu))
    if not plain:  # they look at lengths on the host
        with gpu_e2e_checks.waits_are_errors(gpu.device):
            gpu.generate(**batch, **options, plan=make(gpu))

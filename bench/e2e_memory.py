# SPDX-License-Identifier: Apache-2.0
"""Resident memory of one contender of `bench.e2e_cpu`, in a process of its own: weights, one request, its peak."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig

from bench import work
from bench.e2e_run import Contender, Setting, load_engine, load_transformers, request
from glimpse_runtime.models.qwen2_5_vl.config import ModelConfig

GIB = 2**30


def peak(contender: Contender, setting: Setting, base: Path, modules: Path, threads: int) -> dict[str, float]:
    """Figures of a child process, in GiB.

    imports: resident before any weight is read: Python, torch, transformers. loaded: with the weights. load_peak: highest
    on the way there. peak: highest in a request. weights, kv: what had to be held.

    Raises:
        RuntimeError: the child failed; the text is its last line.
    """
    task = {
        "contender": [contender.name, contender.engine, contender.pruned],
        "setting": setting.record(),
        "base": str(base),
        "modules": str(modules),
        "threads": threads,
    }
    command = [sys.executable, "-m", "bench.e2e_memory", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"memory of {contender.name}: {last}")
    figures: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def _child(task: dict[str, Any]) -> dict[str, float]:
    setting, contender = Setting(**task["setting"]), Contender(*task["contender"])
    base, modules = Path(task["base"]), Path(task["modules"])
    torch.set_num_threads(task["threads"])
    imports = _resident("VmRSS")
    if contender.engine:
        model: Any = load_engine(contender.engine, setting, base, modules)
        weights = work.nbytes((model.base.vision, model.base.decoder))
        if model.plan is not None:
            weights += work.nbytes(model.plan.stages[0].score)
    else:
        model = load_transformers(setting, base)
        weights = sum(p.nbytes for p in model.parameters())
    gc.collect()
    loaded, load_peak = _resident("VmRSS"), _resident("VmHWM")
    _forget_peak()
    inputs = setting.inputs(0)
    found = request(contender, model, inputs, setting)
    highest = _resident("VmHWM")
    rows = found.get("kv_rows", inputs["input_ids"].shape[1] + setting.new_tokens)
    text = ModelConfig.from_hf(Qwen2_5_VLConfig.from_pretrained(base)).text
    kv = work.kv_bytes(text, rows, setting.torch_dtype)
    return {
        "imports": imports, "loaded": loaded, "load_peak": load_peak, "peak": highest,
        "weights": weights / GIB, "kv": kv / GIB,
    }  # fmt: skip


def _resident(field: str) -> float:
    """GiB of a memory field of /proc/self/status."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 2**20


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not allowed in some containers: then the peak is that of loading, too
        pass


if __name__ == "__main__":
    print(json.dumps(_child(json.loads(sys.argv[1]))))

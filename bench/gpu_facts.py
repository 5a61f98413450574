# SPDX-License-Identifier: Apache-2.0
"""What a reader needs to place figures from a GPU: the device, its clocks, versions, and which code ran."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
GPU_BACKENDS = ("triton", "cuda")
REHEARSAL = "rehearsal on a CPU"
PACKAGES = ("triton", "transformers", "numpy", "flash-attn")
SMI = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw",
    "power.limit", "temperature.gpu", "memory.total",
)  # fmt: skip
KERNELS = ("glimpse_kernels", "csrc", "cmake", "CMakeLists.txt")
"""Where the sources of the kernels lie."""
MOVING = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def run(*command: str, seconds: float = 20.0, cwd: Path = ROOT) -> str:
    """What a command prints, or nothing where it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=cwd, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def nvidia_smi(fields: tuple[str, ...] = SMI) -> dict[str, str]:
    """Field → value of the first GPU in sight, as nvidia-smi has them (MHz, W, °C, MiB); empty without nvidia-smi."""
    text = run("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    values = [value.strip() for value in text.splitlines()[0].split(",")] if text else []
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def nvcc() -> str | None:
    found = re.search(r"release ([\d.]+)", run("nvcc", "--version"))
    return found[1] if found else None


def _digest(root: Path, files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.relative_to(root).as_posix().encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _native(root: Path) -> list[Path]:
    found = [file for folder in ("csrc", "cmake") for file in (root / folder).rglob("*") if file.is_file()]
    return [*found, *root.glob("CMakeLists.txt")]


def native_sources(root: Path = ROOT) -> str:
    """Hash of what the extension is built from."""
    return _digest(root, _native(root))


def sources(root: Path = ROOT) -> str:
    """Hash of the sources of the kernels: what ran, whatever the version control says."""
    return _digest(root, [*(root / "glimpse_kernels").rglob("*.py"), *_native(root)])


def commit(root: Path = ROOT) -> str:
    """From git, "-dirty" if kernels were changed since; else the variable GLIMPSE_COMMIT; else empty."""
    found = run("git", "rev-parse", "--short=12", "HEAD", cwd=root) if (root / ".git").exists() else ""
    if found and run("git", "status", "--porcelain", "--", *KERNELS, cwd=root):
        found += "-dirty"
    return found or os.environ.get("GLIMPSE_COMMIT", "").strip()


def slug(name: str) -> str:
    """ "NVIDIA H200" → "nvidia-h200", for file names."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def gpu() -> dict[str, Any]:
    """Of the current CUDA device; its name alone says that there is none."""
    if not torch.cuda.is_available():
        return {"device": REHEARSAL}
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": torch.cuda.get_device_name(),
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "l2_mib": getattr(found, "L2_cache_size", 0) >> 20,
    }


def collect(root: Path = ROOT) -> dict[str, Any]:
    """Everything above. Nothing here is worth a failed run: what cannot be read is left out, with the reason."""
    now = datetime.now(timezone.utc)
    facts: dict[str, Any] = {"date": now.date().isoformat(), "time": now.isoformat(timespec="seconds")}
    parts = {
        "gpu": gpu,
        "nvidia_smi": nvidia_smi,
        "python": platform.python_version,
        "system": platform.platform,
        "cores": os.cpu_count,
        "torch": lambda: torch.__version__,
        "cuda": lambda: torch.version.cuda,
        "nvcc": nvcc,
        "packages": lambda: {name: found for name in PACKAGES if (found := version(name))},
        "commit": lambda: commit(root),
        "sources": lambda: sources(root),
    }
    for name, look in parts.items():
        try:
            facts[name] = look()
        except Exception as problem:
            facts[name] = {} if name in ("gpu", "nvidia_smi", "packages") else None
            facts.setdefault("problems", []).append(f"{name}: {type(problem).__name__}: {problem}")
    facts["device"] = (
        (facts["gpu"] or {}).get("device") or (facts["nvidia_smi"] or {}).get("name") or "unknown"
    )
    return facts


def origin(facts: dict[str, Any]) -> str:
    """Which code ran, for the record of proofs: the commit where it is known, and always the hash of the sources."""
    return ", ".join(part for part in (facts.get("commit"), f"sources {facts.get('sources')}") if part)


RESULTS = ROOT / "bench" / "results"


def results(kind: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The reports of one kind of run on GPUs ("gpu-check", "gpu-e2e"), the oldest first."""
    found = []
    for file in sorted(folder.glob("*.json")):
        report = json.loads(file.read_text())
        if isinstance(report, dict) and report.get("kind") == kind:
            found.append(report | {"file": file.name})
    return sorted(found, key=lambda report: str(report["facts"].get("time")))

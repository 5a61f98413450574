# SPDX-License-Identifier: Apache-2.0
"""What the compile reports of `bench` say, asked for once a test run."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def compile_report(factory: pytest.TempPathFactory, module: str) -> dict[str, Any]:
    """The JSON that `python -m MODULE` writes, and as "page" its Markdown. In a process of its own, and only one,
    however many run the tests."""
    folder = factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    record, page, lock = (folder / f"{module}.{ending}" for ending in ("json", "md", "lock"))
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if not record.exists():
            environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            command = [sys.executable, "-m", module, "--json", str(record), "--markdown", str(page)]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            assert record.exists(), done.stdout + done.stderr
    return {**json.loads(record.read_text()), "page": page.read_text()}

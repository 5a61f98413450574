# SPDX-License-Identifier: Apache-2.0
"""Which kernels have passed their tests on a real GPU: the record that dispatch believes.

`make gpu-check` writes ``proof.json`` beside this file; docs/gpu-status.md is generated from it. A kernel that is not in it
may be right, but nobody has seen it run, so `dispatch` does not choose it by itself.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

RECORD = Path(__file__).with_name("proof.json")


@dataclass(frozen=True)
class Proof:
    """The last time an op's tests passed on a GPU with this backend.

    op, backend: as in the support table. device: name of the GPU. date: ISO date. commit: of the code that ran.
    tests: how many passed.
    """

    op: str
    backend: str
    device: str
    date: str
    commit: str
    tests: int


@lru_cache(maxsize=1)
def record() -> dict[tuple[str, str], Proof]:
    """All proofs by (op, backend)."""
    rows = json.loads(RECORD.read_text())
    return {(row["op"], row["backend"]): Proof(**row) for row in rows}


def proven(op: str, backend: str) -> bool:
    """Whether this kernel has passed its tests on some GPU."""
    return (op, backend) in record()


def write(proofs: dict[tuple[str, str], Proof], path: Path = RECORD) -> None:
    """Replace the record."""
    rows = [asdict(proofs[key]) for key in sorted(proofs)]
    path.write_text(json.dumps(rows, indent=1) + "\n")
    record.cache_clear()

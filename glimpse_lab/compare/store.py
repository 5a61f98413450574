# SPDX-License-Identifier: Apache-2.0
"""JSON lines that grow while a comparison runs, so that a run that was killed goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glimpse_runtime.errors import GlimpseError


class Store:
    """Records of a run, one a line, each with a ``kind``; the first are the settings that all others depend on.

    Args:
        path: of the file; made if it is not there.
        settings: names and values.
        resume: take what is in the file for done.

    Raises:
        GlimpseError: the file has records and they were not asked for, or were made with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any], *, resume: bool) -> None:
        self._path = path
        self._records = _whole_lines(path)
        if self._records and not resume:
            raise GlimpseError(
                f"output: expected an empty folder, or --resume to go on; found {len(self._records)} records in {path}"
            )
        wanted = {"kind": "settings", **settings}
        if not self._records:
            self.add(wanted)
        elif self._records[0] != json.loads(json.dumps(wanted)):
            raise GlimpseError(
                f"--resume: expected the settings of the run in {path}, {self._records[0]}; found {wanted}"
            )

    def add(self, record: dict[str, Any]) -> None:
        """Write a record through to the disk."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._records.append(record)

    def of(self, kind: str) -> Iterator[dict[str, Any]]:
        """Records of a kind, in the order in which they were made."""
        return (record for record in self._records if record["kind"] == kind)


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file. What a kill left of a last line is cut off."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    try:
        records = [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise GlimpseError(f"output: expected JSON lines in {path}, found {error}") from error
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return records

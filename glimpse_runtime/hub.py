# SPDX-License-Identifier: Apache-2.0
"""Folders and hub ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from glimpse_runtime.errors import CheckpointError


def resolve_folder(name: str | Path, *required: str, patterns: tuple[str, ...] = ()) -> Path:
    """The local folder of a checkpoint: `name` itself, or the snapshot of a hub id (`owner/name`).

    Raises:
        CheckpointError: nothing is there, or one of the `required` files is missing.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        text = str(name)
        if path.exists() or text.count("/") != 1 or text.startswith((".", "/", "~")):
            raise CheckpointError(f"{name}: expected a folder with {', '.join(required)}, found none")
        path = _snapshot(text, (*required, *patterns))
    missing = [file for file in required if not (path / file).is_file()]
    if missing:
        raise CheckpointError(f"{path}: expected {', '.join(required)}, missing {', '.join(missing)}")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a checkpoint's file.

    Raises:
        CheckpointError: it holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: expected a JSON object, found none ({error})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def _snapshot(repo: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{repo}: no such folder, and the hub gave nothing for this id ({error})"
        ) from error

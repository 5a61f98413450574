# SPDX-License-Identifier: Apache-2.0
"""Prompts and chat messages: their checked form, and the pictures they carry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from glimpse_runtime.processor_files import ProcessorError


def normal(messages: Any) -> list[dict[str, Any]]:
    """Messages with OpenAI's ``image_url`` entries turned into image entries; the input is left alone."""
    result = []
    for message in messages:
        if not isinstance(message, dict) or "role" not in message:
            raise ProcessorError(
                f"conversation: expected messages with a role and a content, found {message!r:.80}"
            )
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            content = [_entry(entry) for entry in content]
        result.append(
            {key: value for key, value in {**message, "content": content}.items() if value is not None}
        )
    return result


def _entry(entry: Any) -> dict[str, Any]:
    if isinstance(entry, str):
        return {"type": "text", "text": entry}
    if not isinstance(entry, dict):
        raise ProcessorError(
            f"conversation: expected content entries to be dicts, found {type(entry).__name__}"
        )
    kind = entry.get("type")
    if kind == "image_url" and "image_url" in entry:
        address = entry["image_url"]
        return {"type": "image", "url": address.get("url") if isinstance(address, dict) else address}
    if kind not in ("text", "image"):
        raise ProcessorError(f"conversation: expected entries of type text or image, found {kind!r}")
    return entry


def pictures_of(messages: list[dict[str, Any]]) -> list[Any]:
    """The pictures that messages carry, in reading order."""
    return [
        entry[key]
        for message in messages
        if isinstance(message.get("content"), list)
        for entry in message["content"]
        if entry["type"] == "image"
        for key in ("image", "url", "path")
        if entry.get(key) is not None
    ]


def prompts_of(text: Any) -> list[str]:
    if isinstance(text, str):
        return [text]
    if not isinstance(text, (list, tuple)) or not all(isinstance(prompt, str) for prompt in text):
        raise ProcessorError(
            f"text: expected a string or a list of strings, found {type(text).__name__} (pictures go to images=)"
        )
    if not text:
        raise ProcessorError("text: expected at least one prompt, found an empty list")
    return list(text)


def is_nested(images: Sequence[Any]) -> bool:
    return any(isinstance(item, (list, tuple)) or item is None for item in images)

# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint folder says about its processor: picture settings and chat template."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.hub import read_json, resolve_folder

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_BICUBIC = 3


class ProcessorError(GlimpseError):
    """Text, messages or processor files that cannot be used as they are."""


def _three(value: Any, name: str, source: str) -> tuple[float, float, float]:
    if not isinstance(value, Sequence) or len(value) != 3:
        raise ProcessorError(f"{source}: {name} must be three numbers, found {value!r}")
    return float(value[0]), float(value[1]), float(value[2])


@dataclass(frozen=True)
class ImageSettings:
    """How a checkpoint wants its pictures: the contents of ``preprocessor_config.json``.

    ``min_pixels`` and ``max_pixels`` bound the area after scaling, in pixels; patch sizes are in pixels, merge and
    temporal sizes in patches and frames; mean and std apply to values in 0..1.
    """

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    mean: tuple[float, float, float] = _CLIP_MEAN
    std: tuple[float, float, float] = _CLIP_STD
    rescale: float = 1 / 255
    resample: int = _BICUBIC
    do_resize: bool = True

    @classmethod
    def from_dict(cls, data: dict[str, Any], source: str = "preprocessor_config.json") -> ImageSettings:
        """Reads Hugging Face's spelling, old (``min_pixels``) and new (``size.shortest_edge``); the former wins."""
        size = data.get("size") or {}
        least = (
            data.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels") or cls.min_pixels
        )
        most = data.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels") or cls.max_pixels
        normalise = data.get("do_normalize", True)
        settings = cls(
            min_pixels=int(least),
            max_pixels=int(most),
            patch_size=int(data.get("patch_size", cls.patch_size)),
            temporal_patch_size=int(data.get("temporal_patch_size", cls.temporal_patch_size)),
            merge_size=int(data.get("merge_size", cls.merge_size)),
            mean=_three(data.get("image_mean", cls.mean), "image_mean", source)
            if normalise
            else (0.0, 0.0, 0.0),
            std=_three(data.get("image_std", cls.std), "image_std", source) if normalise else (1.0, 1.0, 1.0),
            rescale=float(data.get("rescale_factor") or cls.rescale) if data.get("do_rescale", True) else 1.0,
            resample=int(data.get("resample", cls.resample)),
            do_resize=bool(data.get("do_resize", True)),
        )
        settings.check(source)
        return settings

    def check(self, source: str) -> None:
        """Raises ProcessorError where the values cannot describe any picture."""
        for name in ("min_pixels", "max_pixels", "patch_size", "temporal_patch_size", "merge_size"):
            if getattr(self, name) < 1:
                raise ProcessorError(f"{source}: {name} must be at least 1, found {getattr(self, name)}")
        if self.min_pixels > self.max_pixels:
            raise ProcessorError(
                f"{source}: min_pixels must not exceed max_pixels, found {self.min_pixels} > {self.max_pixels}"
            )

    def with_bounds(self, min_pixels: int | None, max_pixels: int | None) -> ImageSettings:
        """These settings with other area bounds; None keeps the present one."""
        if min_pixels is None and max_pixels is None:
            return self
        changed = replace(
            self,
            min_pixels=self.min_pixels if min_pixels is None else int(min_pixels),
            max_pixels=self.max_pixels if max_pixels is None else int(max_pixels),
        )
        changed.check("arguments")
        return changed

    @property
    def factor(self) -> int:
        """Side of a merged token in pixels; picture sides are multiples of it."""
        return self.patch_size * self.merge_size


def resolve(folder: str | os.PathLike[str]) -> Path:
    """The local folder with a checkpoint's processor files; a hub name is fetched without its weights."""
    patterns = ("*.json", "*.jinja", "merges.txt", "vocab.txt", "*.model")
    return resolve_folder(os.fspath(folder), "tokenizer_config.json", patterns=patterns)


def load_image_settings(root: Path) -> ImageSettings:
    """From ``preprocessor_config.json``, or from ``processor_config.json`` where newer transformers put it."""
    plain, nested = root / "preprocessor_config.json", root / "processor_config.json"
    if plain.is_file():
        return ImageSettings.from_dict(read_json(plain), plain.name)
    if nested.is_file() and isinstance(found := read_json(nested).get("image_processor"), dict):
        return ImageSettings.from_dict(found, nested.name)
    raise ProcessorError(
        f"no preprocessor_config.json in {str(root)!r}: this folder does not say how to take pictures"
    )


def load_chat_template(root: Path) -> str | None:
    """The processor's own chat template, or None: the tokenizer may still have one."""
    plain, legacy = root / "chat_template.jinja", root / "chat_template.json"
    if plain.is_file():
        return plain.read_text(encoding="utf-8")
    if legacy.is_file() and isinstance(found := read_json(legacy).get("chat_template"), str):
        return found
    return None

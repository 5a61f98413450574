# SPDX-License-Identifier: Apache-2.0
"""What becomes of the features of dropped tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch

from glimpse_kernels import merge_nearest
from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.stages.selection import Chosen
from glimpse_runtime.stages.views import VisionView
from glimpse_runtime.taps import VisionTaps


class Merge(ABC):
    """Changes the features of tokens that stay; one of one's own derives from it."""

    @property
    def taps(self) -> VisionTaps:
        """What it wants to see of the vision tower."""
        return VisionTaps()

    @abstractmethod
    def merged(self, view: VisionView, chosen: Chosen) -> torch.Tensor:
        """`[N, width]` features of all tokens, of which those that stay count."""


def checked_merged(features: object, before: torch.Tensor, merge: Merge) -> torch.Tensor:
    """`[N, width]`, what a merge made of the features `before [N, width]`.

    Raises:
        GlimpseError: it made something else of them.
    """
    if not isinstance(features, torch.Tensor) or features.shape != before.shape:
        found = list(features.shape) if isinstance(features, torch.Tensor) else repr(features)
        raise GlimpseError(f"{type(merge).__name__}: expected features {list(before.shape)}, found {found}")
    return features


@dataclass(frozen=True)
class IntoNearest(Merge):
    """Each source goes into the target that is most like it (`glimpse_kernels.merge_nearest`).

    Attributes:
        how: what a target becomes: "mean" of itself and its sources, or "target_plus_mean", itself plus their mean.
        keys_of: vision block whose keys tell how alike two tokens are; None: their features do.
    """

    how: Literal["mean", "target_plus_mean"] = "mean"
    keys_of: int | None = None

    def __post_init__(self) -> None:
        if self.how not in ("mean", "target_plus_mean"):
            raise GlimpseError(f"how: expected 'mean' or 'target_plus_mean', found {self.how!r}")

    @property
    def taps(self) -> VisionTaps:
        return VisionTaps() if self.keys_of is None else VisionTaps(keys=(self.keys_of,))

    def merged(self, view: VisionView, chosen: Chosen) -> torch.Tensor:
        keep = chosen.selection.keep
        targets = keep if chosen.targets is None else chosen.targets
        sources = ~keep if chosen.sources is None else chosen.sources & ~keep
        merged, _ = merge_nearest(
            view.features,
            targets,
            view.cu_seqlens,
            sources=sources,
            metric=None if self.keys_of is None else view.keys[self.keys_of],
            how=self.how,
        )
        return merged

# SPDX-License-Identifier: Apache-2.0
"""How a stage judges visual tokens: one fp32 score each, higher is better."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.functional import normalize

from glimpse_kernels import graph_flow, last_row_attention
from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.models.qwen2_5_vl.layout import VisionLayout
from glimpse_runtime.stages.ratios import check_flag
from glimpse_runtime.taps import Received, VisionTaps

if TYPE_CHECKING:
    from glimpse_runtime.stages.views import RowView, VisionView


class Scorer:
    """What all have in common; a scorer of one's own derives from one of the three below."""

    @property
    def taps(self) -> VisionTaps:
        """What it wants to see of the vision tower."""
        return VisionTaps()


def checked_scores(scores: object, count: int, scorer: Scorer) -> torch.Tensor:
    """`[count]` fp32, what a scorer gave.

    Raises:
        GlimpseError: it gave something else than a real number for each token.
    """
    name = type(scorer).__name__
    if not isinstance(scores, torch.Tensor):
        raise GlimpseError(f"{name}: expected scores [{count}], one a visual token, found {scores!r}")
    if tuple(scores.shape) != (count,) or scores.is_complex():
        kind = f"{str(scores.dtype).removeprefix('torch.')} {list(scores.shape)}"
        raise GlimpseError(f"{name}: expected scores [{count}], one a visual token, found {kind}")
    return scores.float().contiguous()


class VisionScorer(Scorer, ABC):
    """Judges tokens before the decoder, by the vision tower's features and taps."""

    @abstractmethod
    def score(self, view: VisionView) -> torch.Tensor:
        """`[N]` fp32 in prompt order."""


class RowScorer(Scorer, ABC):
    """Judges tokens in the decoder, by what rows of the prompt see of them in the stage's layer."""

    def prepare(self, view: VisionView) -> Any:
        """What it wants to know of the prompt as it enters the decoder; `RowView.prepared` holds it later."""
        return None

    @abstractmethod
    def score(self, view: RowView) -> torch.Tensor:
        """`[N]` fp32 in prompt order."""


@dataclass(frozen=True)
class Probe:
    """Learned rows appended to each sequence with pictures, so that a layer can be asked what it looks at.

    Attributes:
        length: rows a sequence.
        vectors: layer → `[length, width]`. Layer 0's are the input embeddings of the rows, the others are added to
            the rows' hidden state before their layer.
    """

    length: int
    vectors: Mapping[int, torch.Tensor]


class GlanceScorer(Scorer, ABC):
    """Judges tokens by what the last probe row saw of them in some layers up to the stage's.

    Attributes:
        query_layers: decoder layers in which it reads the last probe row's logits against the visual keys.
        normalized: those logits as log-softmax over the whole row instead of raw.
        probe: rows it needs in the prompt.
    """

    @property
    @abstractmethod
    def query_layers(self) -> tuple[int, ...]: ...
    @property
    @abstractmethod
    def normalized(self) -> bool: ...
    @property
    @abstractmethod
    def probe(self) -> Probe: ...

    @abstractmethod
    def prepare(self, taps: Mapping[int, torch.Tensor], layout: VisionLayout) -> Any:
        """What depends on the pictures alone; `taps[b]` is `[N, vision width]`, rows as in `layout`."""

    @abstractmethod
    def score(self, logits: Sequence[torch.Tensor], prepared: Any) -> torch.Tensor:
        """`[N]` fp32 from `logits`, `[N, heads]` fp32 for each of `query_layers`, rows as in `layout`."""


@dataclass(frozen=True)
class ReceivedAttention(VisionScorer):
    """The attention that a token receives from all tokens of its picture in a vision block; a class token's attention where a
    tower has one."""

    tap: Received = Received()

    @property
    def taps(self) -> VisionTaps:
        return VisionTaps(received=(self.tap,))

    def score(self, view: VisionView) -> torch.Tensor:
        return view.received[self.tap]


@dataclass(frozen=True)
class TextRelevance(VisionScorer):
    """How alike a token and the prompt's text are: the mean of its cosines with the input embeddings of the text tokens, scaled to
    reach from 0 to 1. Where all tokens are equally relevant, they score 1.

    Attributes:
        sign: "plus", or "minus" for embeddings, as CLIP's, in which what is alike points away from each other.
        over: what the scale is taken over: each "picture", or all pictures of a "prompt".
    """

    sign: Literal["plus", "minus"] = "plus"
    over: Literal["picture", "prompt"] = "picture"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("sign", self.sign, ("plus", "minus")),
            ("over", self.over, ("picture", "prompt")),
        ):
            if value not in known:
                raise GlimpseError(f"{name}: expected {' or '.join(map(repr, known))}, found {value!r}")

    def score(self, view: VisionView) -> torch.Tensor:
        said = normalize(view.text(view.batch.ids.index_select(0, view.text_rows)).float(), dim=1)
        means = [part.sum(0) / max(1, len(part)) for part in said.split(view.text_lengths)]
        factor = 1.0 if self.sign == "plus" else -1.0
        groups: dict[int, list[torch.Tensor]] = {}
        # One picture after the other: all features at once in fp32 would be twice the memory that they have.
        for number, p in enumerate(view.pictures):
            seen = normalize(view.features[p.start : p.stop].float(), dim=1)
            group = number if self.over == "picture" else p.row
            groups.setdefault(group, []).append(factor * (seen @ means[p.row]))
        scores = [_from_zero_to_one(torch.cat(group)) for group in groups.values()]
        return torch.cat(scores) if scores else said.new_zeros(0)


def _from_zero_to_one(relevance: torch.Tensor) -> torch.Tensor:
    if not len(relevance):
        return relevance
    low, high = relevance.aminmax()
    return (relevance - low + 1e-6) / (high - low + 1e-6)


@dataclass(frozen=True)
class GraphFlow(VisionScorer):
    """What flows to a token along the similarities of its picture (`glimpse_kernels.graph_flow`, whose options these are)."""

    threshold: float = 0.5
    temperature: float = 0.03
    steps: int = 5
    rounded: bool = True
    degree: str = "edges"

    def __post_init__(self) -> None:
        check_flag("rounded", self.rounded)
        if not isinstance(self.threshold, Real) or not 0.0 < self.threshold < 1.0:
            raise GlimpseError(f"threshold: expected a cosine above 0 and below 1, found {self.threshold!r}")
        if not isinstance(self.temperature, Real) or not 0.0 < self.temperature < float("inf"):
            raise GlimpseError(f"temperature: expected a number above 0, found {self.temperature!r}")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            raise GlimpseError(f"steps: expected a number of at least 0, found {self.steps!r}")
        if self.degree not in ("edges", "float16"):
            raise GlimpseError(f"degree: expected 'edges' or 'float16', found {self.degree!r}")

    def score(self, view: VisionView) -> torch.Tensor:
        scores, _ = graph_flow(
            view.features, view.cu_seqlens, threshold=self.threshold, temperature=self.temperature, steps=self.steps,
            rounded=self.rounded, degree=self.degree,
        )  # fmt: skip
        return scores


@dataclass(frozen=True)
class LastRowAttention(RowScorer):
    """The attention that a token gets from the last prompt row, mean over heads, softmax over the whole row.

    Attributes:
        rotary: whether queries and keys are rotated to their positions.
    """

    rotary: bool = True

    def __post_init__(self) -> None:
        check_flag("rotary", self.rotary)

    def score(self, view: RowView) -> torch.Tensor:
        asked = view.queries(view.last_rows, rotary=self.rotary)
        keys = view.keys(rotary=self.rotary)
        # Between two sequences lies a stretch of rows that belongs to neither of them; a copy of a query looks at it in vain.
        return last_row_attention(
            asked.repeat_interleave(2, 0)[:-1],
            keys.k,
            keys.bounds,
            keys.token_rows,
            view.token_sequences * 2,
        )

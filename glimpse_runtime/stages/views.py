# SPDX-License-Identifier: Apache-2.0
"""What a stage may look at: the visual tokens as earlier stages left them, and what the model knows of them there."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from glimpse_kernels import Selection, rope, select_tokens
from glimpse_runtime.models.qwen2_5_vl.decoder import Decoder, Stream
from glimpse_runtime.packing import PackedBatch, Picture
from glimpse_runtime.restriction import compacted
from glimpse_runtime.taps import Received
from glimpse_runtime.uploads import upload, upload_together


class StageView(ABC):
    """The visual tokens of a batch, N of them in P pictures, in prompt order. Nothing here makes the host wait.

    Args:
        batch: where they are.
        probes: whether probe rows stay at this stage.
    """

    def __init__(self, batch: PackedBatch, *, probes: bool = False) -> None:
        self.batch = batch
        self.probes = probes and bool(batch.probed)

    @cached_property
    def row_keep(self) -> torch.Tensor:
        """`[T]` bool: rows that this stage may not drop."""
        always = self.batch.always_kept
        return always.index_fill(0, self.batch.probe_rows.flatten(), True) if self.probes else always

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return self.batch.pictures

    @property
    def lengths(self) -> list[int]:
        """Tokens of each picture."""
        return [p.tokens for p in self.pictures]

    @property
    def device(self) -> torch.device:
        return self.batch.device

    @property
    def longest(self) -> int:
        """Tokens of the largest picture."""
        return max(self.lengths, default=0)

    @property
    @abstractmethod
    def features(self) -> torch.Tensor:
        """`[N, width]`: what the tokens are at this place, in the model's dtype."""

    @property
    def text_lengths(self) -> list[int]:
        """Text tokens of each sequence: all of its prompt but the pictures' tokens."""
        counts = list(self.batch.prompt_lengths)
        for p in self.pictures:
            counts[p.row] -= p.tokens
        return counts

    @cached_property
    def text_rows(self) -> torch.Tensor:
        """`[R]` int64 rows of all text tokens, sequence by sequence. Text is never dropped: at every stage they are the same ones in
        the same order."""
        return compacted(self.batch.always_kept, sum(self.text_lengths))

    def picture_ends(self, index: torch.Tensor) -> torch.Tensor:
        """`[P]` of `index [N]`: the entry of each picture's last token."""
        return index.index_select(0, (self.cu_seqlens[1:] - 1).clamp(min=0))

    @cached_property
    def _sent(self) -> list[torch.Tensor]:
        grids = torch.tensor([[p.height, p.width] for p in self.pictures], dtype=torch.int32, device="cpu")
        return upload_together([self.batch.picture_bounds, grids], self.device)

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """`[P + 1]` int32 first token of each picture."""
        return self._sent[0]

    @property
    def grids(self) -> torch.Tensor:
        """`[P, 2]` int32 height and width of each picture's merged grid."""
        return self._sent[1]

    @cached_property
    def token_pictures(self) -> torch.Tensor:
        """`[N]` int32 number of the picture that each token is of."""
        tokens = torch.arange(self.batch.num_visual, dtype=torch.int32, device=self.device)
        return torch.bucketize(tokens, self.cu_seqlens[1:], right=True, out_int32=True)

    def upload(self, *rows: Sequence[int], dtype: torch.dtype = torch.int32) -> list[torch.Tensor]:
        """Numbers of the host on the device, together."""
        host = [torch.tensor(list(row), dtype=dtype, device="cpu") for row in rows]
        return upload_together(host, self.device)

    @cached_property
    def _kept_anyway(self) -> torch.Tensor | None:
        ends = self.batch.last_visual
        return upload(torch.tensor(ends, dtype=torch.int64, device="cpu"), self.device) if ends else None

    def top(self, scores: torch.Tensor, counts: Sequence[int]) -> Selection:
        """The best `counts[p]` tokens of each picture by `scores [N]` fp32, the lower index first among equals; a token with which a
        prompt ends is one of them."""
        if self._kept_anyway is not None:
            # Others may score infinity too, and come first in their picture.
            scores = scores.clamp(max=torch.finfo(torch.float32).max)
            scores = scores.index_fill(0, self._kept_anyway, math.inf)
        (caps,) = self.upload(counts)
        return self._selected(scores, caps, caps, None, -math.inf)

    def exactly(self, keep: torch.Tensor) -> Selection:
        """The tokens of a mask `[N]` bool."""
        if self._kept_anyway is not None:
            keep = keep.index_fill(0, self._kept_anyway, True)
        (none,) = self.upload([0] * len(self.pictures))
        return self._selected(torch.zeros_like(keep, dtype=torch.float32), none, none, keep, math.inf)

    def _selected(
        self,
        scores: torch.Tensor,
        caps: torch.Tensor,
        floors: torch.Tensor,
        forced: torch.Tensor | None,
        threshold: float,
    ) -> Selection:
        batch = self.batch
        return select_tokens(
            scores, self.cu_seqlens, threshold=threshold, caps=caps, floors=floors, forced=forced,
            token_rows=batch.token_rows, row_keep=self.row_keep, cu_seqlens=batch.cu_seqlens, capacity=batch.num_rows,
        )  # fmt: skip


class VisionView(StageView):
    """Between the vision tower and the decoder.

    Attributes:
        features: `[N, text width]` visual tokens as the decoder would get them.
        hidden: block → `[N, vision width]`, received: tap → `[N]` fp32, keys: block → `[N, head_dim]`: what taps gave.
        text: embeds token ids `[n]`: `[n, text width]`.
    """

    def __init__(
        self,
        batch: PackedBatch,
        features: torch.Tensor,
        hidden: Mapping[int, torch.Tensor],
        received: Mapping[Received, torch.Tensor],
        keys: Mapping[int, torch.Tensor],
        text: Callable[[torch.Tensor], torch.Tensor],
        *,
        probes: bool = False,
    ) -> None:
        super().__init__(batch, probes=probes)
        self._features = features
        self.hidden, self.received, self.keys, self.text = hidden, received, keys, text

    @property
    def features(self) -> torch.Tensor:
        return self._features


@dataclass(frozen=True)
class RowKeys:
    """Keys of a layer, where prefill keeps them.

    Attributes:
        k: `[rows, kv heads, head_dim]`.
        bounds: `[2B]` int32: the prompt of sequence b has the rows `bounds[2b]` to `bounds[2b + 1]`; what lies between two
            sequences belongs to neither.
        token_rows: `[N]` int32 row of each visual token.
    """

    k: torch.Tensor
    bounds: torch.Tensor
    token_rows: torch.Tensor


class RowView(StageView):
    """In the decoder: before a layer or inside it, with all rows that are still there.

    Args:
        batch: where the rows are.
        decoder, number: the layer that is asked.
        stream: the rows.
        x: `[T, width]` normed input of the layer.
        kept: rotated keys of the layer, if they were written already.
        prepared: what the stage's scorer made of the prompt before the decoder.
    """

    def __init__(
        self,
        batch: PackedBatch,
        decoder: Decoder,
        number: int,
        stream: Stream,
        x: torch.Tensor,
        kept: RowKeys | None = None,
        *,
        probes: bool = False,
        prepared: Any = None,
    ) -> None:
        super().__init__(batch, probes=probes)
        self.prepared = prepared
        self._decoder, self._layer = decoder, decoder.layers[number]
        self._stream, self._x, self._kept = stream, x, kept

    @property
    def features(self) -> torch.Tensor:
        return self._stream.hidden.index_select(0, self.batch.visual_rows)

    @property
    def rotary(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin `[T, head_dim / 2]` fp32 of all rows."""
        return self._stream.cos, self._stream.sin

    @cached_property
    def last_rows(self) -> torch.Tensor:
        """`[B]` int64 row of each prompt's last token."""
        return prompt_ends(self.batch).long() - 1

    @cached_property
    def token_sequences(self) -> torch.Tensor:
        """`[N]` int32 sequence of each visual token."""
        return torch.bucketize(self.batch.token_rows, self.batch.cu_seqlens[1:], right=True, out_int32=True)

    def queries(self, rows: torch.Tensor, *, rotary: bool) -> torch.Tensor:
        """`[n, heads, head_dim]` of some rows `[n]` int64."""
        asked = self._decoder.heads(self._layer.qkv.parts[0](self._x.index_select(0, rows)))
        return self._rotated(asked, rows) if rotary else asked

    def keys(self, *, rotary: bool) -> RowKeys:
        """Of all rows."""
        if rotary and self._kept is not None:
            return self._kept
        keys = self._decoder.heads(self._layer.qkv.parts[1](self._x))
        batch = self.batch
        bounds = torch.stack([batch.cu_seqlens[:-1], prompt_ends(batch)], dim=1).flatten()
        return RowKeys(self._rotated(keys, None) if rotary else keys, bounds, batch.token_rows)

    def _rotated(self, heads: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        cos, sin = (
            t if rows is None else t.index_select(0, rows) for t in (self._stream.cos, self._stream.sin)
        )
        rope(heads, None, cos, sin)
        return heads


def prompt_ends(batch: PackedBatch) -> torch.Tensor:
    """`[B]` int32 row behind each prompt's last token: probe rows may follow it."""
    ends = batch.cu_seqlens[1:]
    probes = [length - prompt for length, prompt in zip(batch.lengths, batch.prompt_lengths, strict=True)]
    if not any(probes):
        return ends
    return ends - upload(torch.tensor(probes, dtype=torch.int32, device="cpu"), batch.device)

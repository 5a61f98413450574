# SPDX-License-Identifier: Apache-2.0
"""SparseVLM's score: the attention of those text tokens that have to do with the picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.stages.ratios import check_flag
from glimpse_runtime.stages.scorers import RowScorer
from glimpse_runtime.stages.views import RowKeys, RowView, VisionView

CHUNK = 1 << 22
"""Attention weights held at once, over all heads: memory grows with the number of tokens, not with that of the text."""


@dataclass(frozen=True)
class RaterAttention(RowScorer):
    """The attention that a token gets from the raters of its picture, mean over raters and heads (arXiv:2410.04417).

    Raters are text tokens behind the picture: with the softmax over these of the products of a visual token's and their input
    embeddings, those whose mean over the picture's tokens is above the average. Where none is, all of them are; where there is
    no text behind the picture, the prompt's last row.

    Attributes:
        heads: so many heads count, those in which raters look at the picture most; None: all.
        corrected: weights are divided by what their rows' positions alone make of a product, that of rotated rows of ones. It
            is a sum of cosines and can be next to zero or below it.
        fewer_heads: what a model with fewer heads than `heads` gets: "refuse", an error; "all", the mean over all of them.
    """

    heads: int | None = 14
    corrected: bool = True
    fewer_heads: Literal["refuse", "all"] = "refuse"

    def __post_init__(self) -> None:
        heads = self.heads
        if heads is not None and (isinstance(heads, bool) or not isinstance(heads, int) or heads < 1):
            raise GlimpseError(f"heads: expected a number of heads, or None, found {heads!r}")
        check_flag("corrected", self.corrected)
        if self.fewer_heads not in ("refuse", "all"):
            raise GlimpseError(f"fewer_heads: expected 'refuse' or 'all', found {self.fewer_heads!r}")

    def prepare(self, view: VisionView) -> list[torch.Tensor]:
        """Of each picture: `[text tokens of its prompt + 1]` bool, which of them are raters, and whether the last row is."""
        rows = view.text_rows
        words = view.text(view.batch.ids.index_select(0, rows)).float().split(view.text_lengths)
        places, ends = rows.split(view.text_lengths), view.picture_ends(view.batch.token_rows)
        found = []
        for number, p in enumerate(view.pictures):
            behind = places[p.row] > ends[number]
            raters = _raters(view.features[p.start : p.stop], words[p.row], behind)
            found.append(torch.cat([raters, ~behind.any(0, keepdim=True)]))
        return found

    def score(self, view: RowView) -> torch.Tensor:
        if view.prepared is None:
            raise GlimpseError(
                "RaterAttention: expected what it prepared of the prompt's embeddings, found none"
            )
        texts, keys, scores = view.text_rows.split(view.text_lengths), view.keys(rotary=True), []
        for row, text in enumerate(texts):
            pictures = [number for number, p in enumerate(view.pictures) if p.row == row]
            if pictures:
                rows = torch.cat([text, view.last_rows[row : row + 1]])
                scores.append(self._of_sequence(view, keys, row, rows, pictures))
        return torch.cat(scores) if scores else view.text_rows.new_zeros(0, dtype=torch.float32)

    def _of_sequence(
        self, view: RowView, keys: RowKeys, row: int, rows: torch.Tensor, pictures: list[int]
    ) -> torch.Tensor:
        """`[n]` fp32 of one sequence's tokens. `rows [R + 1]` may rate, in the order of what was prepared."""
        counts = [view.pictures[number].tokens for number in pictures]
        tokens = slice(view.pictures[pictures[0]].start, view.pictures[pictures[-1]].stop)
        own = view.token_pictures[tokens] - pictures[0]
        raters = torch.stack([view.prepared[number] for number in pictures])  # [pictures, R + 1]
        seen = view.batch.token_rows[tokens].long()
        received = self._received(view, keys, row, rows, seen, raters.T, own)
        heads = received.shape[0]
        if self.heads is not None and self.heads > heads and self.fewer_heads == "refuse":
            raise GlimpseError(
                f"heads: expected at most the {heads} heads of the model, found {self.heads}; fewer_heads='all' takes those"
            )
        used = heads if self.heads is None else min(self.heads, heads)
        if used < heads:
            mass = torch.stack([part.sum(1) for part in received.split(counts, dim=1)])
            order = mass.argsort(dim=1, descending=True, stable=True)[:, :used]
            chosen = torch.zeros_like(mass, dtype=torch.bool).scatter_(1, order, True)
            received = received.where(chosen.T.index_select(1, own), 0.0)
        return received.sum(0) / (used * raters.sum(1).index_select(0, own))

    def _received(
        self,
        view: RowView,
        keys: RowKeys,
        row: int,
        rows: torch.Tensor,
        seen: torch.Tensor,
        raters: torch.Tensor,
        own: torch.Tensor,
    ) -> torch.Tensor:
        """`[heads, n]` fp32: what each head of the rows that rate a token gives it, together.

        Args:
            rows, seen: `[R]`, `[n]` rows that look and rows that are looked at.
            raters: `[R, pictures]` bool. own: `[n]` picture of each token.
        """
        length = view.batch.prompt_lengths[row]
        begin, place = view.batch.cu_seqlens[row], torch.arange(length, device=rows.device)
        k = keys.k.index_select(0, keys.bounds[2 * row] + place).float()  # [L, kv heads, D]
        q = view.queries(rows, rotary=True).float().unflatten(1, (k.shape[1], -1))  # [R, kv heads, group, D]
        cos, sin = view.rotary
        shape = (q.shape[1] * q.shape[2], len(seen))
        received = torch.zeros(shape, device=rows.device)
        scale, step = q.shape[3] ** -0.5, max(1, CHUNK // (shape[0] * length))
        for some, asking, rating in zip(rows.split(step), q.split(step), raters.split(step), strict=True):
            logits = torch.einsum("rkgd,lkd->rkgl", asking, k).flatten(1, 2) * scale
            later = place > (some - begin)[:, None]
            weights = logits.masked_fill(later[:, None], -math.inf).softmax(-1)
            weights = weights.index_select(2, seen - begin)
            if self.corrected:
                alike = cos[some] @ cos[seen].T + sin[some] @ sin[seen].T
                weights = weights / (2 * scale * alike)[:, None]
            rated = rating.index_select(1, own)[:, None]
            received += weights.where(rated, 0.0).sum(0)
        return received


def _raters(seen: torch.Tensor, words: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
    """`[R]` bool from visual tokens `seen [n, width]` and text `words [R, width]`, of which those `behind [R]` count."""
    share = torch.zeros_like(behind, dtype=torch.float32)
    for some in seen.split(max(1, CHUNK // max(1, len(words)))):
        logits = (some.float() @ words.T).masked_fill(~behind, -math.inf)
        share += logits.softmax(-1).nan_to_num(0.0).sum(0)
    raters = behind & (share > share.sum() / behind.sum())
    return raters.where(raters.any(), behind)

# SPDX-License-Identifier: Apache-2.0
"""From logits to tokens without leaving the device: the same tokens are possible as with Hugging Face's warpers.

What is captured depends on which steps there are and on `top_k` (a size); every other number lies in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from glimpse_runtime.lanes import DeviceLanes
from glimpse_runtime.uploads import upload, upload_together

RING = 8
"""Steps whose tokens the device keeps until the host has read them."""
_NEVER = float("-inf")


class Kind(NamedTuple):
    """What one captured choice of tokens can do; the numbers that go with it may differ from call to call.

    Attributes:
        sample: draw, else take the highest.
        top_k: 0 for all.
        top_p, min_p, least, penalty: whether `Choice` has such a thing.
    """

    sample: bool
    top_k: int
    top_p: bool
    min_p: bool
    least: bool
    penalty: bool


@dataclass(frozen=True)
class Choice:
    """How a call chooses its tokens; names and meanings are Hugging Face's.

    Attributes:
        least: so many tokens come before an end token may.
        ends: end tokens.
        pad: what rows get that have ended.
        penalty: on the scores of tokens that the row has already, prompt and answer.
    """

    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float | None = None
    least: int = 0
    ends: frozenset[int] = frozenset()
    pad: int = 0
    penalty: float = 1.0

    @property
    def kind(self) -> Kind:
        least, penalty = self.least > 0 and bool(self.ends), self.penalty != 1.0
        if not self.sample:
            return Kind(False, 0, False, False, least, penalty)
        return Kind(True, self.top_k, self.top_p < 1.0, self.min_p is not None, least, penalty)


def warp(
    scores: torch.Tensor,
    *,
    temperature: torch.Tensor | None = None,
    top_k: int = 0,
    tail: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """`scores [B, V]` fp32 with -inf for what may not be drawn: temperature, top-k, top-p and min-p in this order.

    Args:
        temperature: `[1]` fp32, divides the scores.
        top_k: what is below the k-th highest score goes; 0: nothing does.
        tail: `[1]` fp32, 1 - top-p: the least likely tokens that have no more than this together go.
        min_p: `[1]` fp32, less likely than this share of the likeliest goes.
    """
    if temperature is not None:
        scores = scores / temperature
    if top_k:
        last = torch.topk(scores, min(top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < last, _NEVER)
    if tail is not None:
        ascending, order = torch.sort(scores)
        gone = ascending.softmax(dim=-1).cumsum(dim=-1) <= tail
        gone[:, -1].fill_(False)
        scores = scores.masked_fill(gone.scatter(1, order, gone), _NEVER)
    if min_p is not None:
        share = scores.softmax(dim=-1)
        scores = scores.masked_fill(share < min_p * share.amax(dim=-1, keepdim=True), _NEVER)
    return scores


def draw(scores: torch.Tensor) -> torch.Tensor:
    """`[B]` int64, token t with a probability of softmax(`scores [B, V]`)[t].

    The first arrival of exponential clocks with the tokens' probabilities as rates: what `torch.multinomial` does too, but
    that waits for the device to check what it was given.
    """
    chances = scores.softmax(dim=-1)
    return (chances / torch.empty_like(chances).exponential_()).argmax(dim=-1)


class Picker:
    """Chooses the next token of every lane, from the lanes' logits to their `tokens` and `active`.

    Attributes:
        lanes: whose.
        ring: `[RING, lanes]` int64 tokens of the latest steps; those of step n are in row n % RING.
    """

    def __init__(self, lanes: DeviceLanes) -> None:
        device = lanes.logits.device
        self.lanes = lanes
        self.ring = torch.zeros(RING, lanes.count, dtype=torch.int64, device=device)
        self._ends = torch.zeros(lanes.logits.shape[1], dtype=torch.bool, device=device)
        self._numbers = torch.zeros(3, dtype=torch.int64, device=device)
        self._made, self._least, self._pad = self._numbers.split(1)
        self._factors = torch.ones(4, dtype=torch.float32, device=device)
        self._temperature, self._tail, self._min_p, self._penalty = self._factors.split(1)
        self._seen = self._ends.new_zeros(0, 0)  # [lanes, vocabulary + 1], once it is needed

    def begin(self, choice: Choice, said: torch.Tensor | None = None) -> None:
        """From the next step on: a call's first token, by its numbers.

        Args:
            said: `[B, L]` int64 tokens that the rows have already, for a penalty; the size of the vocabulary stands for none.
        """
        ends = [token for token in sorted(choice.ends) if 0 <= token < self._ends.shape[0]]
        # fp32 only now: the complement of top-p is taken in double, as Hugging Face takes it.
        factors = [choice.temperature, 1.0 - choice.top_p, choice.min_p or 0.0, choice.penalty]
        host = (
            torch.tensor([0, choice.least, choice.pad], dtype=torch.int64, device="cpu"),
            torch.tensor(factors, dtype=torch.float32, device="cpu"),
            torch.tensor(ends, dtype=torch.int64, device="cpu"),
        )
        numbers, sent, at = upload_together(host, self._ends.device)
        self._numbers.copy_(numbers)
        self._factors.copy_(sent)
        self._ends.zero_()
        self._ends.index_fill_(0, at, True)
        if choice.penalty != 1.0 and said is not None:
            self._remember(upload(said, self._ends.device))

    def _remember(self, said: torch.Tensor) -> None:
        if not self._seen.numel():
            with torch.inference_mode(False), torch.no_grad():
                self._seen = self._ends.new_zeros(self.lanes.count, self._ends.shape[0] + 1)
        self._seen.zero_()
        self._seen[: said.shape[0]].scatter_(1, said, True)

    def pick(self, kind: Kind) -> None:
        """One token a lane, into `lanes.tokens` and the ring: work that may be captured.

        Lanes that have ended get the pad token in the ring; what stands in `lanes.tokens` for them is read by nobody.
        """
        lanes, scores = self.lanes, self.lanes.logits
        if kind.penalty:
            scores = scores.float()
            held = torch.where(scores < 0, scores * self._penalty, scores / self._penalty)
            scores = torch.where(self._seen[:, :-1], held, scores)
        if kind.least:
            scores = scores.masked_fill(self._ends & (self._made < self._least), _NEVER)
        if kind.sample:
            warped = warp(
                scores.float(),
                temperature=self._temperature,
                top_k=kind.top_k,
                tail=self._tail if kind.top_p else None,
                min_p=self._min_p if kind.min_p else None,
            )
            tokens = draw(warped)
        else:
            tokens = scores.argmax(dim=-1)
        if kind.penalty:
            self._seen.scatter_(1, tokens[:, None], True)
        lanes.tokens.copy_(tokens)
        shown = torch.where(lanes.active, tokens, self._pad)
        self.ring.index_copy_(0, self._made % RING, shown[None])
        lanes.active.logical_and_(~self._ends.index_select(0, tokens))
        self._made.add_(1)

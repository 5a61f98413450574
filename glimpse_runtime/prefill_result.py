# SPDX-License-Identifier: Apache-2.0
"""What `GlimpseModel.prefill` gives back."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import torch

from glimpse_runtime.device_decode import loop_for
from glimpse_runtime.entry import inference
from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.masks import scores_from_masks
from glimpse_runtime.prefill import Prefill
from glimpse_runtime.report import PruningReport, report_of
from glimpse_runtime.timings import Timings


class PrefillResult:
    """A prompt batch after prefill, or waiting inside the pruning layer for its selection."""

    def __init__(self, state: Prefill, *, waiting: bool) -> None:
        self._state = state
        self._waiting = waiting
        self._decoded = False

    @property
    def scores(self) -> torch.Tensor | None:
        """`[N]` fp32 importance of every visual token, prompt order, in the last stage that has scores, NaN where a token was gone
        before; known before its selection. None if no stage has scores."""
        return self._state.told

    @property
    def glimpse_scores(self) -> list[torch.Tensor]:
        """What the glimpse token saw in each of the plan's layers: `[N, heads]` fp32 each, prompt order, of the tokens that earlier
        stages left."""
        return self._state.seen

    @inference
    def select(self, keep: torch.Tensor | Sequence[torch.Tensor] | None = None) -> PrefillResult:
        """Go on after `prefill(..., select=False)`; nothing is left to do for prompts without pictures.

        Args:
            keep: masks, `[N]` or one a picture, taken as they are; None: the plan's own selection.

        Returns:
            self.

        Raises:
            GlimpseError: nothing waits for a selection, a mask has another size, or the plan cannot be given masks; after the
                latter two it waits still.
        """
        state = self._state
        if not self._waiting:
            raise GlimpseError(
                "select(): expected a prefill made with select=False that was not selected yet"
            )
        if keep is not None:
            scores = scores_from_masks(keep, state.batch)
            if state.batch.pictures:
                state.give(scores)
        if state.last_logits is None:
            with state.engine.call(keep=True):
                state.choose()
        self._waiting = False
        return self

    @property
    def last_logits(self) -> torch.Tensor:
        """`[B, vocabulary]` after the last prompt token, in the model's dtype."""
        self._require_done()
        assert self._state.last_logits is not None
        return self._state.last_logits

    @property
    def pruning(self) -> PruningReport | None:
        """What was kept of each picture; None if nothing was pruned."""
        self._require_done()
        return report_of(self._state)

    @property
    def timings(self) -> Timings:
        return self._state.timings

    @property
    def kept_positions(self) -> list[torch.Tensor]:
        """Rotary positions of each row's prompt tokens that stayed, `[3, kept]` int64 each."""
        self._require_done()
        assert self._state.kept_positions is not None and self._state.kept_rows is not None
        lengths = self._state.kept_rows.tolist()
        # With a cap there may be room behind the last row.
        return list(self._state.kept_positions[:, : sum(lengths)].split(lengths, dim=1))

    def kv(self, row: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (rotated) and values `[kept, kv heads, head_dim]` of one row's prompt in one layer."""
        self._require_done()
        layer = range(self._state.decoder.config.num_layers)[layer]
        lease = next(lease for lease in self._state.leases if layer in lease.layers)
        return lease.rows(row, layer, int(lease.lengths[row]))

    @inference
    def decode(self, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Continue greedily for exactly `steps` tokens, without regard for end tokens; once.

        Returns:
            tokens `[B, steps]` int64 and the logits `[B, steps, vocabulary]` from which they were taken.

        Raises:
            GlimpseError: it was decoded already, or `steps` does not fit what prefill left room for.
        """
        self._require_done()
        state = self._state
        if self._decoded:
            raise GlimpseError("decode(): expected a prefill that was not decoded yet")
        if not 1 <= steps <= state.extra_rows:
            raise GlimpseError(
                f"decode(): expected 1 to {state.extra_rows} steps (max_new_tokens), found {steps}"
            )
        self._decoded = True
        logits = [self.last_logits]
        tokens = [logits[0].argmax(-1)]
        with state.engine.call(keep=True), closing(loop_for(state)) as loop:
            while len(tokens) < steps:
                logits.append(loop.step(tokens[-1]))
                tokens.append(logits[-1].argmax(-1))
        return torch.stack(tokens, 1), torch.stack(logits, 1)

    def _require_done(self) -> None:
        if self._state.last_logits is None:
            raise GlimpseError("expected a finished prefill: it waits for select()")

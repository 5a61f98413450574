# SPDX-License-Identifier: Apache-2.0
"""Time to the first token: all contenders take turns on one picture, round after round, on one thread.

Two clocks: the wall's, and that of the core for this process alone. On one thread a prefill waits for nothing, so that they agree on
an idle machine; on a shared one the second still tells methods apart.
"""

from __future__ import annotations

import random
import time
from typing import Any

import torch

from glimpse_lab.compare.asked import inputs_of, large
from glimpse_lab.compare.contenders import UNPRUNED, Contender
from glimpse_lab.compare.store import Store

THREADS = 1
SMALL = (168, 168)
"""A picture to warm up with."""

PACE = 6
"""So many contenders run between two runs of the unpruned model, with which they are compared."""


class Times:
    """Rounds of prefills of one prompt with one picture, vision tower included, the picture's preparation not.

    A round is one record, in an order of its own. One that was cut short is run again.
    """

    def __init__(self, store: Store, size: tuple[int, int], contenders: list[Contender], rounds: int) -> None:
        self._store, self._contenders = store, contenders
        self._picture, self._rounds = large(*size), rounds

    def _order(self, number: int) -> list[Contender]:
        """Of a round: shuffled, so that nobody always follows the same one, with the unpruned model in between and at both ends."""
        (whole,) = (c for c in self._contenders if c.name == UNPRUNED)
        others = [c for c in self._contenders if c.name != UNPRUNED]
        random.Random(number).shuffle(others)
        found = [whole]
        for at in range(0, len(others), PACE):
            found += [*others[at : at + PACE], whole]
        return found

    def records(self) -> list[dict[str, Any]]:
        """Rounds in which exactly these contenders ran, at most as many as were asked for."""
        mine = {contender.key for contender in self._contenders}
        return [
            record
            for record in self._store.of("round")
            if record["size"] == self._picture.size and {(r[0], r[1]) for r in record["runs"]} == mine
        ][: self._rounds]

    def left(self) -> int:
        """Prefills to come."""
        return (self._rounds - len(self.records())) * len(self._order(0))

    def run(self, model: Any, processor: Any, advance: Any) -> None:
        """Run what is left. `advance` is called behind every prefill."""
        done = len(self.records())
        if done == self._rounds:
            return
        small, inputs = (inputs_of(processor, p, p.questions()[:1]) for p in (large(*SMALL), self._picture))
        before = torch.get_num_threads()
        torch.set_num_threads(THREADS)
        try:
            for contender in self._contenders:  # what first calls cost
                model.prefill(**small, plan=contender.plan, max_new_tokens=1)
            model.prefill(**inputs, plan=None, max_new_tokens=1)
            for number in range(done, self._rounds):
                runs = []
                for run in self._round(model, inputs, number):
                    runs.append(run)
                    advance()
                self._store.add({"kind": "round", "size": self._picture.size, "runs": runs})
        finally:
            torch.set_num_threads(before)

    def _round(self, model: Any, inputs: dict[str, Any], number: int) -> Any:
        """Name, budget, seconds by the wall and of the core of each."""
        for contender in self._order(number):
            began, worked = time.perf_counter(), time.process_time()
            model.prefill(**inputs, plan=contender.plan, max_new_tokens=1)
            took, work = time.perf_counter() - began, time.process_time() - worked
            yield [*contender.key, round(took, 6), round(work, 6)]

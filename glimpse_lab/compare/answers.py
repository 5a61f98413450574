# SPDX-License-Identifier: Apache-2.0
"""Accuracy: every question about a picture at once, answered greedily under one plan."""

from __future__ import annotations

from typing import Any

import torch

from glimpse_lab.compare.asked import Picture, inputs_of
from glimpse_lab.compare.contenders import Contender
from glimpse_lab.compare.store import Store
from glimpse_lab.world import Question
from glimpse_runtime.prefill_result import PrefillResult

UNENDED = " …"
"""Behind an answer that goes on for longer than the right one: it is wrong, however it begins."""


class Asker:
    """Asks all questions about one picture, under any number of plans.

    Args:
        model, processor: of ``glimpse_runtime``.
    """

    def __init__(self, model: Any, processor: Any, picture: Picture) -> None:
        self.picture = picture
        self.questions: list[Question] = picture.questions()
        self._model, self._tokenizer = model, processor.tokenizer
        self._inputs = {
            k: v.to(model.device) for k, v in inputs_of(processor, picture, self.questions).items()
        }
        ends = model.generation_config.eos_token_id
        self._ends = {ends} if isinstance(ends, int) else set(ends)
        lengths = [
            len(self._tokenizer(q.answer, add_special_tokens=False)["input_ids"]) for q in self.questions
        ]
        self._steps = max(lengths) + 1  # the end is a token, too

    def under(self, contender: Contender) -> dict[str, Any]:
        """A record: an answer a question, and which share of its visual tokens is in the cache, mean over layers."""
        result = self._model.prefill(**self._inputs, plan=contender.plan, max_new_tokens=self._steps)
        kept = kept_shares(result, self._inputs["attention_mask"], self.picture.tokens, self._layers)
        tokens, _ = result.decode(self._steps)
        return {
            "kind": "answers",
            **_key(self.picture, contender),
            "answers": [self._text(row) for row in tokens.tolist()],
            "kept": [round(share, 6) for share in kept],
        }

    @property
    def _layers(self) -> int:
        return int(self._model.base.decoder.config.num_layers)

    def _text(self, row: list[int]) -> str:
        end = next((at for at, token in enumerate(row) if token in self._ends), None)
        return self._tokenizer.decode(row[:end], skip_special_tokens=True) + (UNENDED if end is None else "")


def kept_shares(result: PrefillResult, mask: torch.Tensor, tokens: int, layers: int) -> list[float]:
    """Of each row, the share of its picture's tokens whose keys are in the cache, mean over layers.

    Args:
        mask: `[B, L]`, the prompts'. tokens: visual ones of each row.
    """
    found = []
    for row, length in enumerate(mask.sum(1).tolist()):
        rows = sum(result.kv(row, layer)[0].shape[0] for layer in range(layers))
        found.append((rows / layers - (length - tokens)) / tokens)
    return found


def _key(picture: Picture, contender: Contender) -> dict[str, Any]:
    return {
        "size": picture.size, "number": picture.number, "plan": contender.name, "budget": contender.budget
    }  # fmt: skip


class Answers:
    """What of the questions is answered, and what is to do."""

    def __init__(self, store: Store, pictures: list[Picture], contenders: list[Contender]) -> None:
        self._store, self._pictures, self._contenders = store, pictures, contenders

    def _done(self) -> set[tuple[Any, ...]]:
        return {(r["size"], r["number"], r["plan"], r["budget"]) for r in self._store.of("answers")}

    def left(self) -> list[tuple[Picture, list[Contender]]]:
        """Pictures with the contenders that were not asked about them yet."""
        done = self._done()
        found = []
        for picture in self._pictures:
            own = [c for c in self._contenders if (picture.size, picture.number, *c.key) not in done]
            if own:
                found.append((picture, own))
        return found

    def run(self, model: Any, processor: Any, threads: int, advance: Any) -> None:
        """Ask what is left. `advance` is called behind every record."""
        asked = {(r["size"], r["number"]) for r in self._store.of("questions")}
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for picture, own in self.left():
                asker = Asker(model, processor, picture)
                if (picture.size, picture.number) not in asked:
                    said = [
                        {"task": q.task, "question": q.question, "answer": q.answer} for q in asker.questions
                    ]
                    self._store.add(
                        {
                            "kind": "questions",
                            "size": picture.size,
                            "number": picture.number,
                            "questions": said,
                        }
                    )
                for contender in own:
                    self._store.add(asker.under(contender))
                    advance()
        finally:
            torch.set_num_threads(before)

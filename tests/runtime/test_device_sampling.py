# SPDX-License-Identifier: Apache-2.0
"""Tokens that the device chooses: the ones that Hugging Face's warpers leave, as often as they should come."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from glimpse_runtime import sampling
from glimpse_runtime.device_sampling import RING, Choice, Kind, Picker, draw, warp

WARPERS = {
    "temperature": [None, 0.3, 1.7],
    "top_k": [None, 1, 5, 50, 10**6],
    "top_p": [None, 0.01, 0.4, 0.95],
    "min_p": [None, 0.05, 0.6, 1.0],
}
"""What may be asked, in Hugging Face's order."""
KINDS = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}


def hugging_face(scores, given):
    chain = LogitsProcessorList([KINDS[name](value) for name, value in given.items()])
    return chain(None, scores.clone())


def ours(scores, given):
    def number(value):
        return torch.tensor([value], dtype=torch.float64).float()

    return warp(
        scores,
        temperature=number(given["temperature"]) if "temperature" in given else None,
        top_k=given.get("top_k", 0),
        tail=number(1.0 - given["top_p"]) if "top_p" in given else None,
        min_p=number(given["min_p"]) if "min_p" in given else None,
    )


SCORES = {
    "normal": lambda g: torch.randn(3, 300, generator=g) * 3,
    "ties": lambda g: torch.randint(-3, 4, (3, 300), generator=g).float(),  # bf16 logits have many
    "peaked": lambda g: (
        torch.randn(3, 300, generator=g) + torch.nn.functional.one_hot(torch.arange(3), 300) * 40
    ),
    "flat": lambda g: torch.zeros(2, 64),
    "masked": lambda g: torch.randn(2, 300, generator=g).masked_fill(
        torch.rand(2, 300, generator=g) < 0.9, float("-inf")
    ),
    "one word": lambda g: torch.zeros(2, 1),
}


@pytest.mark.parametrize("name", SCORES)
def test_what_may_come_is_what_transformers_leaves(name):
    scores = SCORES[name](torch.Generator().manual_seed(11))
    for values in itertools.product(*WARPERS.values()):
        given = {key: value for key, value in zip(WARPERS, values, strict=True) if value is not None}
        expected, found = hugging_face(scores, given), ours(scores, given)
        assert torch.equal(expected > float("-inf"), found > float("-inf")), given
        assert torch.equal(expected, found), given


def far_off(counts, chances):
    """Chi-square statistic over what is expected, in standard deviations of it; ends with few hits are one."""
    total = counts.sum()
    order = chances.argsort(descending=True)
    counts, expected = counts[order], chances[order] * total
    many = int((expected >= 5).sum())
    parts = [(counts[:many], expected[:many]), (counts[many:].sum()[None], expected[many:].sum()[None])]
    square = sum((((c - e) ** 2) / e)[e > 0].sum() for c, e in parts)
    freedom = max(1, many - 1 + int(expected[many:].sum() > 0))
    return float((square - freedom) / (2 * freedom) ** 0.5)


def test_tokens_come_as_often_as_their_probability_says():
    torch.manual_seed(2)
    chances = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.05, 0.04, 0.01, 0.0])
    tokens = draw(chances.log().expand(40_000, -1))
    assert tokens.dtype is torch.int64
    counts = tokens.bincount(minlength=8).double()
    assert counts[7] == 0 and abs(far_off(counts, chances.double())) < 4


def picker_on(scores, dtype=torch.float32):
    """A picker with so many lanes as there are rows."""

    class Lanes:
        count = scores.shape[0]
        logits = scores.to(dtype)
        tokens = torch.zeros(scores.shape[0], dtype=torch.int64)
        active = torch.ones(scores.shape[0], dtype=torch.bool)

    return Picker(Lanes())


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "top_k": 0},
        {"temperature": 0.7, "top_k": 6},
        {"temperature": 1.5, "top_k": 0, "top_p": 0.7},
        {"temperature": 1.2, "top_k": 0, "min_p": 0.1},
        {"temperature": 0.9, "top_k": 9, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
def test_a_step_draws_from_what_the_options_say(options):
    torch.manual_seed(5)
    row = torch.randn(1, 24) * 2
    picker = picker_on(row.expand(3000, -1))
    config = GenerationConfig(do_sample=True, eos_token_id=None, **options)
    choice = sampling.on_device(config, 7, None)
    picker.begin(choice)
    counts = torch.zeros(24, dtype=torch.float64)
    for _ in range(4):
        picker.pick(choice.kind)
        counts += picker.lanes.tokens.bincount(minlength=24)
    expected = sampling.processors(config, torch.zeros(1, 7, dtype=torch.bool), None)(None, row)
    chances = expected.softmax(-1)[0].double()
    assert (counts[chances == 0] == 0).all()
    assert abs(far_off(counts, chances)) < 4


def test_rows_and_steps_draw_independently():
    torch.manual_seed(9)
    picker = picker_on(torch.zeros(2000, 4))
    choice = Choice(sample=True)
    picker.begin(choice)
    seen = []
    for _ in range(2):
        picker.pick(choice.kind)
        seen.append(picker.lanes.tokens.clone())
    pairs = (seen[0][:-1] * 4 + seen[0][1:]).bincount(minlength=16).double()
    assert abs(far_off(pairs, torch.full((16,), 1 / 16, dtype=torch.float64))) < 4
    pairs = (seen[0] * 4 + seen[1]).bincount(minlength=16).double()
    assert abs(far_off(pairs, torch.full((16,), 1 / 16, dtype=torch.float64))) < 4


def test_the_same_seed_gives_the_same_tokens():
    picker, choice = picker_on(torch.randn(50, 30)), Choice(sample=True, top_k=12)
    found = []
    for seed in (3, 4, 3):
        torch.manual_seed(seed)
        picker.begin(choice)
        picker.pick(choice.kind)
        found.append(picker.lanes.tokens.tolist())
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_first_of_equal_scores(dtype):
    scores = torch.randint(-3, 4, (6, 500), generator=torch.Generator().manual_seed(1)).float()
    picker = picker_on(scores, dtype)
    picker.begin(Choice())
    picker.pick(Choice().kind)
    assert picker.lanes.tokens.tolist() == [row.index(max(row)) for row in scores.tolist()]


def test_rows_end_by_themselves_and_are_padded_from_then_on():
    """Three rows over six steps: one ends at the second token, one never, one at the first."""
    plan = [[4, 5, 9], [7, 5, 1], [4, 2, 7], [9, 9, 4], [4, 4, 4], [1, 5, 2]]
    picker, choice = picker_on(torch.zeros(3, 12)), Choice(ends=frozenset({7, 9, 99}), pad=11)
    expected, running = [], [True] * 3
    picker.begin(choice)
    for step, tokens in enumerate(plan):
        picker.lanes.logits.zero_()
        picker.lanes.logits[torch.arange(3), torch.tensor(tokens)] = 1.0
        picker.pick(choice.kind)
        expected = [token if on else 11 for token, on in zip(tokens, running, strict=True)]
        assert picker.ring[step % RING].tolist() == expected
        running = [on and token not in (7, 9) for token, on in zip(tokens, running, strict=True)]
        assert picker.lanes.active.tolist() == running
    assert running == [False, False, False]


def test_more_steps_than_the_ring_is_long_and_a_second_call():
    picker = picker_on(torch.zeros(1, 2 * RING + 3))
    for _ in range(2):
        picker.begin(Choice())
        for step in range(2 * RING + 3):
            picker.lanes.logits.zero_()
            picker.lanes.logits[0, step] = 1.0
            picker.pick(Choice().kind)
            assert picker.ring[step % RING].tolist() == [step]
            latest = [max(s for s in range(step + 1) if s % RING == r) for r in range(min(step + 1, RING))]
            assert picker.ring[: len(latest), 0].tolist() == latest


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_what_was_said_is_penalised_as_by_transformers(penalty):
    """Prompt and answer count, padding does not; a second call forgets the first."""
    rule = RepetitionPenaltyLogitsProcessor(penalty)
    vocabulary = 12
    picker, choice = picker_on(torch.zeros(2, vocabulary)), Choice(penalty=penalty)
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        rows = [[3, 4, 4, 0], [7]]
        said = torch.tensor([rows[0], [vocabulary] * 3 + rows[1]])
        picker.begin(choice, said)
        for _ in range(10):
            scores = torch.randn(2, vocabulary, generator=generator)
            picker.lanes.logits.copy_(scores)
            picker.pick(choice.kind)
            for row, token in enumerate(picker.lanes.tokens.tolist()):
                expected = rule(torch.tensor([rows[row]]), scores[row : row + 1].clone())
                assert token == expected.argmax()
                rows[row].append(token)


def test_no_end_token_before_its_time():
    scores = torch.zeros(2, 9)
    scores[:, 3], scores[:, 6], scores[:, 5] = 3.0, 2.0, 1.0
    for sample in (False, True):
        picker = picker_on(scores * 100)
        choice = Choice(sample=sample, least=2, ends=frozenset({3, 6}), pad=8)
        picker.begin(choice)
        shown = []
        for step in range(4):
            picker.pick(choice.kind)
            shown.append(picker.ring[step].tolist())
        assert shown == [[5, 5], [5, 5], [3, 3], [8, 8]]


def test_options_that_the_device_knows():
    def of(prompt=10, processors=None, **options):
        return sampling.on_device(GenerationConfig(**options), prompt, processors)

    assert of() == Choice(top_k=50) and of().kind == Kind(False, 0, False, False, False, False)
    assert of(do_sample=True).kind == Kind(True, 50, False, False, False, False)
    assert of(do_sample=True, top_k=0, top_p=0.9, min_p=0.1).kind == Kind(True, 0, True, True, False, False)
    assert of(repetition_penalty=1.1).kind == Kind(False, 0, False, False, False, True)
    assert of(do_sample=True, temperature=0.5, top_k=3, eos_token_id=[4, 5], pad_token_id=4) == Choice(
        True, 0.5, 3, ends=frozenset({4, 5}), pad=4
    )
    assert of(min_new_tokens=3, min_length=12, eos_token_id=4).least == 3
    assert of(min_length=15, eos_token_id=4).least == 5 and of(min_length=5, eos_token_id=4).least <= 0
    assert of(min_length=15).kind.least is False  # nothing to hold back
    assert of(no_repeat_ngram_size=2) is None
    for kept in ({"output_scores": True}, {"output_logits": True}):
        assert of(return_dict_in_generate=True, **kept) is None
    assert of(processors=[object()]) is None
    assert of(repetition_penalty=1.0).kind.penalty is False


def test_values_that_hugging_face_refuses_are_refused():
    for wrong in ({"temperature": -1.0}, {"top_k": -3}, {"min_p": 1.5}):
        config = GenerationConfig(do_sample=True)
        vars(config).update(wrong)
        with pytest.raises(ValueError, match=next(iter(wrong))):
            sampling.on_device(config, 4, None)


def test_calls_that_differ_in_numbers_alone_share_captured_work():
    kinds = {
        Choice(True, t, 20, p, None, ends=ends).kind
        for t in (0.5, 1.0)
        for p in (0.9, 0.8)
        for ends in (frozenset(), frozenset({1}))
    }
    assert len(kinds) == 1

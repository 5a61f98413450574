# SPDX-License-Identifier: Apache-2.0
"""Plans on prompts that few have, and what users' own scorers, selections and merges may give wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from glimpse_runtime import plans
from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.packing import PackedBatch
from glimpse_runtime.plan import PrunePlan, Stage
from glimpse_runtime.stages.budget import Budget
from glimpse_runtime.stages.mergers import Merge
from glimpse_runtime.stages.places import Layer, LayerInput, Vision
from glimpse_runtime.stages.scorers import LastRowAttention, ReceivedAttention, RowScorer, VisionScorer
from glimpse_runtime.stages.selection import Chosen, Selector
from glimpse_runtime.stages.selectors import (
    BestAndDistinct,
    DominantAndContextual,
    FarthestPoints,
    GreedyDpp,
    LocalThenGlobal,
    Share,
    TopK,
)
from glimpse_runtime.stages.views import RowView, StageView, VisionView

from .conftest import make_batch
from .test_plans_model import PUBLISHED, named

ROWS = [[3, (5, 6), 4, (1, 3), 2], [2, (4, 4), 3]]
SIZES = (30, 3, 16)


def without_end(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The prompt ends with its last picture's last token."""
    cut = {name: inputs[name][:, :-1] for name in ("input_ids", "attention_mask")}
    return inputs | cut


# -- prompts that end with a picture -----------------------------------------------------------------------------


@pytest.mark.parametrize("least", [False, True])
@pytest.mark.parametrize("grid", [(5, 6), (4, 4), (6, 7), (1, 1)])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_last_row_stays(model, name, grid, least):
    """The next token is predicted from it."""
    few: dict[str, dict[str, Any]] = {
        "visionzip": {"dominant": 1e-6, "contextual": 1e-6},
        "vscan": {"ratio": 1e-6, "later": (1e-6,)},
        "pyramiddrop": {"ratios": (1e-6,) * 3},
        "sparsevlm": {"shares": (1e-6,) * 3},
    }
    plan = named(name, **(few.get(name, {"ratio": 1e-6}) if least else {}))
    inputs = without_end(make_batch([[3, (2, 3), 1, grid]])[0])
    found = model.prefill(**inputs, plan=plan, max_new_tokens=2)
    assert all(bool(stage.keep[-1]) for stage in found.pruning.stages)
    rows = inputs["input_ids"].shape[1] - found.pruning.total + found.pruning.kept
    assert found.kv(0, -1)[0].shape[0] == rows
    found.decode(2)


# -- masks for a prefill that waits ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "vscan", "sparsevlm"])
def test_refused_masks_lose_nothing(model, name):
    batch, _ = make_batch(ROWS)
    plan, mask = named(name), torch.ones(sum(SIZES), dtype=torch.bool)
    wanted = model.prefill(**batch, plan=plan, max_new_tokens=1).last_logits
    waiting = model.prefill(**batch, plan=plan, max_new_tokens=1, select=False)
    with pytest.raises(GlimpseError, match="keep masks: expected a plan of one stage"):
        waiting.select(mask)
    assert torch.equal(waiting.select().last_logits, wanted)


@pytest.mark.parametrize("name", ["divprune", "visionzip", None])
def test_masks_that_come_too_late(model, name):
    """Nothing waits in the decoder: masks would be ignored."""
    batch, _ = make_batch(ROWS)
    plan = None if name is None else named(name)
    done = model.prefill(**batch, plan=plan, max_new_tokens=1, select=False)
    with pytest.raises(
        GlimpseError, match="keep masks: expected a stage that waits in the decoder, found none"
    ):
        done.select(torch.ones(sum(SIZES), dtype=torch.bool))
    assert done.select() is done


# -- what is told of a stage that waits ----------------------------------------------------------------------------


def test_scores_of_the_stage_that_waits(model):
    """Of all visual tokens, whatever an earlier stage dropped; not the earlier stage's own."""
    batch, _ = make_batch(ROWS)
    for first in (plans.divprune(0.5), plans.fastervlm(0.5)):
        plan = plans.cascade(first, model.plan)
        waiting = model.prefill(**batch, plan=plan, max_new_tokens=1, select=False)
        told = waiting.scores
        assert told.shape == (sum(SIZES),)
        done = waiting.select()
        assert torch.equal(told.isnan(), ~done.pruning.stages[0].keep)
        torch.testing.assert_close(told, done.pruning.stages[1].scores, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(done.scores, told, rtol=0, atol=0, equal_nan=True)


# -- stages with nothing before or behind them -------------------------------------------------------------------


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("evict", [False, True])
def test_before_the_first_layer(model, evict, second):
    """No layer was run that could lose anything: it is the same with and without."""
    batch, _ = make_batch(ROWS)
    stages = [Stage(at=LayerInput(0), score=LastRowAttention(), select=TopK(Share(0.5)), evict_earlier=evict)]
    if second:
        stages.append(Stage(at=Layer(3), score=LastRowAttention(), select=TopK(Share(0.5))))
    found = model.prefill(**batch, plan=PrunePlan("mine", tuple(stages)), max_new_tokens=4)
    if second:
        assert [p.kept for p in found.pruning] == [7, 1, 4]
    else:
        given = PrunePlan("given", (Stage(at=Vision(), select=Budget()),))
        keep = found.pruning.stages[0].keep
        wanted = model.prefill(**batch, plan=given, ref_masks=keep, max_new_tokens=4)
        torch.testing.assert_close(found.last_logits, wanted.last_logits, atol=2e-5, rtol=0)
    assert found.kv(0, 0)[0].shape[0] == found.kv(0, 1)[0].shape[0] == len(batch["input_ids"][0]) - 33 + 16
    found.decode(4)


# -- users' own parts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TopK(0.5), r"share: expected a Share, as Share\(0.5\), found 0.5"),
        (lambda: GreedyDpp(0.5), "share: expected a Share"),
        (lambda: FarthestPoints(0.5), "share: expected a Share"),
        (lambda: BestAndDistinct(0.5), "share: expected a Share"),
        (lambda: LocalThenGlobal(0.5), "share: expected a Share"),
        (lambda: DominantAndContextual(0.5, Share(0.1)), "dominant: expected a Share"),
        (lambda: DominantAndContextual(Share(0.5), 0.1), "contextual: expected a Share"),
        (lambda: Stage(at=Vision(), select=FarthestPoints(Share(0.5)), merge="mean"), "expected a Merge, found 'mean'"),
        (lambda: PrunePlan("mine", plans.fastv().stages[0]), "plan 'mine': expected a tuple of stages, found Stage"),
        (lambda: PrunePlan("mine", (plans.fastv(),)), r"plan 'mine': expected a tuple of stages, found \(PrunePlan"),
        (lambda: PrunePlan(None, plans.fastv().stages), "plan: name: expected a name, found None"),
    ],
)  # fmt: skip
def test_parts_of_the_wrong_kind(make, words):
    with pytest.raises(GlimpseError, match=words):
        make()


class OfTokens(VisionScorer):
    def __init__(self, give: Callable[[int], Any]) -> None:
        self.give = give

    def score(self, view: VisionView) -> Any:
        return self.give(view.batch.num_visual)


class OfRows(RowScorer):
    def __init__(self, give: Callable[[int], Any]) -> None:
        self.give = give

    def score(self, view: RowView) -> Any:
        return self.give(view.batch.num_visual)


PLACES = [(Vision(), OfTokens), (LayerInput(2), OfRows), (Layer(2), OfRows)]


@pytest.mark.parametrize(("at", "scorer"), PLACES)
@pytest.mark.parametrize(
    ("give", "words"),
    [
        (lambda n: torch.zeros(n - 1), r"float32 \[48\]"),
        (lambda n: torch.zeros(n + 1), r"float32 \[50\]"),
        (lambda n: torch.zeros(n, 1), r"float32 \[49, 1\]"),
        (lambda n: torch.zeros(n, dtype=torch.complex64), r"complex64 \[49\]"),
        (lambda n: None, "None"),
        (lambda n: [0.5] * 2, r"\[0.5, 0.5\]"),
    ],
)
def test_scores_that_are_none(model, at, scorer, give, words):
    batch, _ = make_batch(ROWS)
    plan = PrunePlan("mine", (Stage(at=at, score=scorer(give), select=TopK(Share(0.3))),))
    with pytest.raises(
        GlimpseError, match=rf"Of\w+: expected scores \[49\], one a visual token, found {words}"
    ):
        model.prefill(**batch, plan=plan, max_new_tokens=1)


@pytest.mark.parametrize(("at", "scorer"), PLACES)
@pytest.mark.parametrize(
    "give",
    [
        lambda n: torch.arange(n),
        lambda n: torch.arange(n).double(),
        lambda n: torch.arange(2.0 * n)[::2],  # with steps between them
        lambda n: torch.arange(n).where(torch.arange(n) >= 30, math.inf),
    ],
)
def test_scores_of_other_kinds(model, at, scorer, give):
    batch, _ = make_batch(ROWS)
    plan = PrunePlan("mine", (Stage(at=at, score=scorer(give), select=TopK(Share(0.3))),))
    first, *_, last = model.prefill(**batch, plan=plan, max_new_tokens=1).pruning
    assert last.keep.flatten().nonzero().flatten().tolist() == [12, 13, 14, 15]
    assert first.kept == 9


class Own(Selector):
    """Keeps the first `kept` share of each picture, and says so or not."""

    scored = False  # type: ignore[assignment]
    exact = False  # type: ignore[assignment]

    def __init__(self, kept: float, said: Any, exact: bool) -> None:
        self.kept, self.said, self.exact = kept, said, exact  # type: ignore[misc]

    def most(self, batch: PackedBatch) -> Any:
        return self.said(batch)

    def choose(self, view: StageView, scores: torch.Tensor | None) -> Chosen:
        keep = torch.zeros(view.batch.num_visual, dtype=torch.bool)
        for p in view.pictures:
            keep[p.start : p.start + int(p.tokens * self.kept)] = True
        return Chosen(view.exactly(keep))


def half(batch: PackedBatch) -> list[int]:
    return [p.tokens // 2 for p in batch.pictures]


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("at", [Vision(), LayerInput(2), Layer(2)])
@pytest.mark.parametrize(
    ("kept", "exact", "words"),
    [
        (1.0, False, "picture 0: expected at most 15 tokens to stay, as its 'most' says, found 30"),
        (1.0, True, "picture 0: expected 15 tokens to stay, as its 'most' says, found 30"),
        (0.2, True, "picture 0: expected 15 tokens to stay, as its 'most' says, found 6"),
    ],
)
def test_selections_that_do_not_keep_their_word(model, at, kept, exact, words, second):
    """Memory was taken for what they said."""
    batch, _ = make_batch(ROWS)
    stages = (Stage(at=at, select=Own(kept, half, exact)),)
    if second:
        stages += (Stage(at=Layer(4), score=LastRowAttention(), select=TopK(Share(0.5))),)
    with pytest.raises(GlimpseError, match=words):
        model.prefill(**batch, plan=PrunePlan("mine", stages), max_new_tokens=1)


@pytest.mark.parametrize("at", [Vision(), LayerInput(2), Layer(2)])
@pytest.mark.parametrize("said", [lambda b: [1], lambda b: [-1] * 3, lambda b: [1.5] * 3, lambda b: None])
def test_selections_without_a_bound(model, at, said):
    batch, _ = make_batch(ROWS)
    plan = PrunePlan("mine", (Stage(at=at, select=Own(0.5, said, False)),))
    with pytest.raises(GlimpseError, match="Own: most: expected a number for each of 3 pictures, found"):
        model.prefill(**batch, plan=plan, max_new_tokens=1)


class Nothing(Own):
    def choose(self, view: StageView, scores: torch.Tensor | None) -> Any:
        return self.kept


@pytest.mark.parametrize("given", [None, torch.ones(49, dtype=torch.bool)])
def test_choices_that_are_none(model, given):
    batch, _ = make_batch(ROWS)
    plan = PrunePlan("mine", (Stage(at=Vision(), select=Nothing(given, half, False)),))
    with pytest.raises(GlimpseError, match="Nothing: choose: expected a Chosen with a Selection"):
        model.prefill(**batch, plan=plan, max_new_tokens=1)


class OwnMerge(Merge):
    def __init__(self, give: Callable[[torch.Tensor], Any]) -> None:
        self.give = give

    def merged(self, view: VisionView, chosen: Chosen) -> Any:
        return self.give(view.features)


@pytest.mark.parametrize(
    ("give", "words"),
    [
        (lambda features: None, "None"),
        (lambda features: features[:-1], r"\[48, 128\]"),
        (lambda features: torch.cat([features, features]), r"\[98, 128\]"),
        (lambda features: features[:, 1:], r"\[49, 127\]"),
    ],
)
def test_merges_that_are_none(model, give, words):
    batch, _ = make_batch(ROWS)
    stage = Stage(at=Vision(), score=ReceivedAttention(), select=TopK(Share(0.3)), merge=OwnMerge(give))
    with pytest.raises(GlimpseError, match=rf"OwnMerge: expected features \[49, 128\], found {words}"):
        model.prefill(**batch, plan=PrunePlan("mine", (stage,)), max_new_tokens=1)


class Ratio:
    """Compares by value, so it has no hash."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ratio)

    def __call__(self, prompt: Any) -> float:
        return 0.3


def test_a_ratio_without_a_hash(model):
    batch, _ = make_batch(ROWS)
    found = model.prefill(**batch, plan=plans.divprune(Ratio()), max_new_tokens=1)
    assert [picture.kept for picture in found.pruning] == [round(0.3 * size) for size in SIZES]


@pytest.mark.parametrize("layers", [0, -1, 2.5, "28", None, True])
def test_decoders_that_are_none(layers):
    for call in (
        lambda: plans.at_budget("divprune", 0.5, layers),
        lambda: plans.kept_share(plans.fastv(), layers),
    ):
        with pytest.raises(
            GlimpseError, match="layers: expected the number of a decoder's layers, at least 1"
        ):
            call()
    with pytest.raises(GlimpseError, match="plan: expected a PrunePlan, found 'fastv'"):
        plans.kept_share("fastv", 28)  # type: ignore[arg-type]


def test_a_file_that_names_modules(tmp_path):
    """They come with the model."""
    (tmp_path / "own.yaml").write_text("plan: glimpse\noptions: {modules: folder}\n")
    with pytest.raises(GlimpseError, match="own.yaml: plan 'glimpse': options: modules: expected none"):
        plans.from_file(tmp_path / "own.yaml")


def test_a_plan_for_a_deeper_decoder():
    """The error names the layers that were asked for, not only those that they come to."""
    with pytest.raises(
        GlimpseError,
        match=r"LayerInput\(5\) cannot come behind LayerInput\(5\).*in a decoder of 6 layers, found LayerInput\(8\), "
        r"LayerInput\(16\), LayerInput\(24\)",
    ):
        plans.pyramiddrop(layers=(8, 16, 24)).resolved(6)


def test_a_prefill_that_nothing_judges_still_waits(model):
    """A selection that is refused for want of scores: masks may come afterwards."""
    batch, _ = make_batch([[4, (3, 5), 6]])
    blind = PrunePlan("blind", (Stage(Layer(2), Budget(), evict_earlier=True),))
    waiting = model.prefill(**batch, plan=blind, select=False)
    with pytest.raises(GlimpseError, match="keep masks must come with the call"):
        waiting.select()
    keep = torch.arange(15) % 2 == 0
    assert waiting.select(keep).pruning.kept == 8


def test_the_name_of_the_models_own_plan_is_taken():
    with pytest.raises(GlimpseError, match="means the model's own plan"):
        plans.register("default", plans.fastv)


def test_masks_may_keep_more_than_the_plan_would(model):
    """A stage that leaves earlier layers alone has leased room by its cap, when masks come that keep everything."""
    batch, _ = make_batch([[4, (3, 5), 6], [2, (4, 4), 3]])
    stage = Stage(Layer(2), Budget(threshold=0.0, max_remain_ratio=0.1), LastRowAttention())
    plan = PrunePlan("capped", (stage,))
    waiting = model.prefill(**batch, plan=plan, select=False, max_new_tokens=4)
    keep = torch.arange(31) % 3 > 0
    found = waiting.select(keep)
    given = model.prefill(
        **batch, plan=plan, ref_masks=keep, max_new_tokens=4, max_remain_ratio=None, min_remain_num=0
    )
    torch.testing.assert_close(found.last_logits, given.last_logits, atol=2e-5, rtol=0)
    assert found.decode(4)[0].tolist() == given.decode(4)[0].tolist()


def test_a_row_of_pictures_leases_by_its_common_cap(model):
    """Room behind a stage whose cap several pictures share is that of the cap, not of the cap for each."""
    batch, _ = make_batch([[4, (4, 4), 2, (4, 4), 2, (4, 4), 6]])
    stage = Stage(Layer(2), Budget(threshold=0.0, max_remain_ratio=0.25), LastRowAttention())
    result = model.prefill(**batch, plan=PrunePlan("shared", (stage,)), max_new_tokens=1)
    text = batch["input_ids"].shape[1] - 48
    assert result._state.leases[-1].capacities == (-(-(text + 12 + 1) // 32) * 32,)


def test_what_looks_at_the_tower_stays_before_the_decoder():
    with pytest.raises(
        GlimpseError, match=r"LocalThenGlobal looks at what the vision tower gave: expected it at Vision"
    ):
        Stage(Layer(2), LocalThenGlobal(Share(0.5)), LastRowAttention())


def test_cdpruner_behind_a_stage_that_leaves_nothing_of_a_picture(model):
    batch, _ = make_batch([[4, (3, 5), 6, (2, 2), 3]])
    nothing = Stage(Vision(), Budget(threshold=1.0, min_remain_num=0), ReceivedAttention())
    for name in ("cdpruner", "divprune", "vispruner", "gprune", "visionzip", "fastv", "pyramiddrop"):
        plan = plans.cascade(PrunePlan("nothing", (nothing,)), plans.make(name))
        assert model.prefill(**batch, plan=plan).pruning.kept == 0

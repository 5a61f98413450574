# SPDX-License-Identifier: Apache-2.0
"""Plans by name, one behind the other, from files, at a common budget; and what their scorers and selections make of odd input."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from glimpse_runtime import plans
from glimpse_runtime.errors import GlimpseError, UnsupportedOptionError
from glimpse_runtime.model import GlimpseModel
from glimpse_runtime.models.qwen2_5_vl.config import ModelConfig
from glimpse_runtime.modules import GlimpseModules
from glimpse_runtime.packing import PackedBatch, Prompt
from glimpse_runtime.plan import PrunePlan, Stage
from glimpse_runtime.plans import registry
from glimpse_runtime.stages import rater_attention
from glimpse_runtime.stages.places import Layer, LayerInput, Vision
from glimpse_runtime.stages.rater_attention import RaterAttention
from glimpse_runtime.stages.scorers import LastRowAttention, TextRelevance
from glimpse_runtime.stages.selectors import Share, TopK
from glimpse_runtime.stages.views import VisionView
from glimpse_runtime.taps import Received

from .conftest import make_batch
from .stage_views import batch_of, row_view, run_stage, vision_view

ROOT = Path(__file__).parents[2]
PUBLISHED = [name for name in plans.names() if name != "glimpse"]


@pytest.fixture(autouse=True)
def own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that a test gives are gone behind it."""
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))


@pytest.fixture(scope="module")
def modules(golden: Path) -> GlimpseModules:
    config = ModelConfig.from_hf(AutoConfig.from_pretrained(golden / "base"))
    return GlimpseModules.from_pretrained(
        golden / "gp_v1", config, dtype=torch.float32, device=torch.device("cpu")
    )


def some_plan(ratio: float = 0.5) -> PrunePlan:
    return PrunePlan("mine", (Stage(at=LayerInput(3), score=LastRowAttention(), select=TopK(Share(ratio))),))


# -- names -----------------------------------------------------------------------------------------------------


def test_names() -> None:
    assert plans.names() == sorted(
        "cdpruner divprune fastervlm fastv glimpse gprune pyramiddrop sparsevlm visionzip vispruner vscan".split()
    )
    for name in PUBLISHED:
        assert plans.make(name).name == name
        assert plans.make(name) == getattr(plans, name)()


def test_register_both_ways() -> None:
    assert plans.register("by call", some_plan) is some_plan

    @plans.register("by decorator")
    def decorated(ratio: float = 0.25) -> PrunePlan:
        return some_plan(ratio)

    assert {"by call", "by decorator"} <= set(plans.names())
    assert plans.make("by call") == some_plan() and plans.make("by decorator") == some_plan(0.25)
    assert decorated(0.1) == plans.make("by decorator", ratio=0.1)
    plans.register("by call", some_plan)  # the same once more is no clash
    with pytest.raises(GlimpseError, match="expected one that is free, found 'vispruner'"):
        plans.register("vispruner", some_plan)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: plans.make("vispruna"), "expected one of cdpruner, divprune, .*; found 'vispruna'"),
        (
            lambda: plans.make("divprune", ratoi=0.5),
            "plan 'divprune': options: expected some of ratio, .*found ratoi",
        ),
        (lambda: plans.make("glimpse"), "plan 'glimpse': options: expected modules, found none"),
        (lambda: plans.register("", some_plan), "name: expected a name, found ''"),
        (lambda: plans.register("x", 3), "factory: expected a function"),
        (lambda: plans.make(plans.register("odd", lambda: 7) and "odd"), "expected its factory to return"),
        (lambda: plans.resolve(3), "expected a PrunePlan, one of cdpruner, .*, or None; found 3"),
    ],
)
def test_names_that_are_refused(call: Any, words: str) -> None:
    with pytest.raises(GlimpseError, match=words):
        call()


def test_resolve(modules: GlimpseModules) -> None:
    plan = some_plan()
    assert plans.resolve(plan) is plan and plans.resolve(None) is None
    assert plans.resolve("fastv") == plans.resolve("fastv", modules) == plans.fastv()
    assert plans.resolve("glimpse", modules) == plans.glimpse(modules)
    with pytest.raises(GlimpseError, match="plan 'glimpse': modules: expected learned modules, found none"):
        plans.resolve("glimpse")


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        *((name, {"ratio": ratio}, r"ratio: expected a share in \(0, 1\], found")
          for name in ("vispruner", "fastervlm", "gprune", "divprune", "cdpruner", "vscan", "fastv")
          for ratio in (0, 0.0, -0.1, 1.01, True, "half", math.nan)),
        ("visionzip", {"dominant": 0}, "ratio: expected a share"),
        ("visionzip", {"contextual": 2}, "ratio: expected a share"),
        ("visionzip", {"how": "max"}, "how: expected 'mean' or 'target_plus_mean', found 'max'"),
        ("pyramiddrop", {"ratios": (0.5, 0.0, 0.1)}, "ratio: expected a share"),
        ("pyramiddrop", {"ratios": (0.5,)}, "ratios: expected one for each of 3 layers, found 1"),
        ("pyramiddrop", {"ratios": (), "layers": ()}, "ratios: expected a tuple"),
        ("pyramiddrop", {"ratios": 0.5}, "ratios: expected a tuple"),
        ("pyramiddrop", {"layers": (0.5, 0.25, 0.75)}, "the tokens have passed it already"),
        ("pyramiddrop", {"layers": (0.5, 1.5, 0.75)}, "expected the number of a layer, or a share"),
        ("pyramiddrop", {"of": "all"}, "of: expected 'original' or 'current', found 'all'"),
        ("pyramiddrop", {"positions": "shift"}, "positions: expected 'keep' or 'renumber', found 'shift'"),
        ("sparsevlm", {"shares": (0.5, 0.2)}, "shares: expected one for each of 3 layers, found 2"),
        ("sparsevlm", {"heads": 0}, "heads: expected a number of heads, or None, found 0"),
        ("sparsevlm", {"fewer_heads": "some"}, "fewer_heads: expected 'refuse' or 'all', found 'some'"),
        ("vscan", {"later": (0.3, 0.2)}, "later: expected one for each of 1 layers, found 2"),
        ("vscan", {"window": 0}, "window: expected a number of tokens, at least 1, found 0"),
        ("vscan", {"windows": "even"}, "windows: expected 'up' or 'down', found 'even'"),
        ("fastv", {"layer": 0}, "layer: expected the number of a layer, at least 1, found 0"),
        ("fastv", {"rounding": "up"}, "rounding: expected 'floor' or 'nearest', found 'up'"),
        ("gprune", {"threshold": 1.0}, "threshold: expected a cosine above 0 and below 1, found 1.0"),
        ("gprune", {"temperature": 0}, "temperature: expected a number above 0, found 0"),
        ("gprune", {"steps": 1.5}, "steps: expected a number of at least 0, found 1.5"),
        ("gprune", {"degree": "bfloat16"}, "degree: expected 'edges' or 'float16', found 'bfloat16'"),
        ("cdpruner", {"sign": -1}, "sign: expected 'plus' or 'minus', found -1"),
        ("cdpruner", {"over": "batch"}, "over: expected 'picture' or 'prompt', found 'batch'"),
        ("vispruner", {"important": 1.1}, r"important: expected a share in \[0, 1\], found 1.1"),
        ("vispruner", {"important": "half"}, r"important: expected a share in \[0, 1\], found 'half'"),
        ("vispruner", {"important": None}, r"important: expected a share in \[0, 1\], found None"),
        ("vispruner", {"per_round": 0}, "per_round: expected a number of tokens, at least 1, found 0"),
        ("vispruner", {"per_round": "two"}, "per_round: expected a number of tokens, at least 1, found 'two'"),
        ("gprune", {"threshold": "x"}, "threshold: expected a cosine above 0 and below 1, found 'x'"),
        ("gprune", {"temperature": "x"}, "temperature: expected a number above 0, found 'x'"),
        ("gprune", {"rounded": "no"}, "rounded: expected True or False, found 'no'"),
        ("divprune", {"repeat": "no"}, "repeat: expected True or False, found 'no'"),
        ("pyramiddrop", {"rotary": "no"}, "rotary: expected True or False, found 'no'"),
        ("vscan", {"rotary": 1}, "rotary: expected True or False, found 1"),
        ("sparsevlm", {"corrected": None}, "corrected: expected True or False, found None"),
    ],
)  # fmt: skip
def test_options_that_are_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(GlimpseError, match=words):
        plans.make(name, **options)


# -- one behind the other --------------------------------------------------------------------------------------


def test_cascade(modules: GlimpseModules) -> None:
    glimpse = plans.glimpse(modules)
    plan = plans.cascade(plans.divprune(0.5), plans.pyramiddrop(positions="keep", of="current"), glimpse)
    assert plan.name == "divprune+pyramiddrop+glimpse"
    assert [str(stage.at) for stage in plan.stages] == [
        "Vision()",
        "LayerInput(0.25)",
        "LayerInput(0.5)",
        "LayerInput(0.75)",
        f"Layer({modules.settings.reduce_layer})",
    ]
    assert plans.cascade(plan) == plan


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (
            ("fastv", "divprune"),
            r"Vision\(\) cannot come behind Layer\(1\): tokens have left the vision tower",
        ),
        (
            ("divprune", "vscan"),
            r"Vision\(\) cannot come behind Vision\(\): it cuts whole pictures into windows",
        ),
        (("sparsevlm", "fastv"), r"Layer\(1\) cannot come behind Layer\(15\): the tokens have passed it"),
        (("fastv", "fastv"), r"Layer\(1\) cannot come behind Layer\(1\)"),
        (("glimpse", "glimpse"), r"cannot come behind"),
        (("pyramiddrop", "glimpse"), "positions at .*: expected 'keep' before a stage that evicts"),
    ],
)
def test_orders_that_make_no_sense(parts: tuple[str, ...], words: str, modules: GlimpseModules) -> None:
    made = [plans.glimpse(modules) if part == "glimpse" else plans.make(part) for part in parts]
    with pytest.raises(GlimpseError, match=words):
        plans.cascade(*made)


def test_orders_that_only_a_depth_tells(modules: GlimpseModules) -> None:
    """Shares and numbers of layers are compared when the decoder is known."""
    plan = plans.cascade(plans.fastv(8), plans.pyramiddrop(layers=(0.25, 0.5, 0.75)))
    assert [int(stage.at.index) for stage in plan.resolved(32).stages] == [7, 8, 16, 24]  # type: ignore[union-attr]
    with pytest.raises(GlimpseError, match=r"LayerInput\(7\) cannot come behind Layer\(7\)"):
        plan.resolved(28)


def test_cascades_that_are_none() -> None:
    with pytest.raises(GlimpseError, match="expected at least one plan, found none"):
        plans.cascade()
    with pytest.raises(GlimpseError, match="expected plans, found 'divprune'"):
        plans.cascade("divprune")  # type: ignore[arg-type]


# -- files -----------------------------------------------------------------------------------------------------

FILES = {
    "one.yaml": ("plan: vispruner\noptions: {ratio: 0.2, important: 0.75}\n", lambda m: plans.vispruner(0.2, 0.75)),
    "bare.yml": ("plan: gprune\n", lambda m: plans.gprune()),
    "one.toml": (
        'plan = "pyramiddrop"\n[options]\nratios = [0.5, 0.1]\nlayers = [0.25, 14]\nrotary = false\n',
        lambda m: plans.pyramiddrop((0.5, 0.1), (0.25, 14), rotary=False),
    ),
    "two.yaml": (
        "cascade:\n  - plan: divprune\n    options: {ratio: 0.5}\n  - {plan: glimpse}\n",
        lambda m: plans.cascade(plans.divprune(0.5), plans.glimpse(m)),
    ),
    "two.toml": (
        '[[cascade]]\nplan = "divprune"\noptions = {ratio = 0.5}\n[[cascade]]\nplan = "fastv"\n',
        lambda m: plans.cascade(plans.divprune(0.5), plans.fastv()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_from_file(name: str, tmp_path: Path, modules: GlimpseModules) -> None:
    text, wanted = FILES[name]
    (tmp_path / name).write_text(text)
    found = plans.from_file(tmp_path / name, modules)
    assert found == wanted(modules) and found.name == wanted(modules).name
    assert plans.from_file(str(tmp_path / name), modules) == found


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", "{}", r"expected one that ends with .yaml, .yml, .toml; found 'a.json'"),
        ("a.yaml", "", "a.yaml: expected 'plan' with 'options', or 'cascade'; found None"),
        ("a.yaml", "- plan: fastv", "expected 'plan' with 'options', or 'cascade'; found \\["),
        ("a.yaml", "plan: [", "a.yaml: expected YAML, found"),
        ("a.toml", "plan = ", "a.toml: expected TOML, found"),
        ("a.toml", "", "expected 'plan' with 'options', or 'cascade'; found nothing"),
        ("a.yaml", "plan: fastv\nratio: 0.5", "expected 'plan' with 'options', or 'cascade'; found 'ratio'"),
        ("a.yaml", "options: {ratio: 0.5}", "expected 'plan' with 'options', .* found 'options'"),
        ("a.yaml", "cascade: []\nplan: fastv", "or 'cascade'; found 'plan'"),
        ("a.yaml", "cascade: fastv", "cascade: expected a list of plans, found 'fastv'"),
        ("a.yaml", "cascade: []", r"cascade: expected a list of plans, found \[\]"),
        ("a.yaml", "cascade: [fastv]", "expected 'plan' with 'options', found 'fastv'"),
        ("a.yaml", "cascade: [{plan: fastv}, {plan: divprune}]", r"a.yaml: .*Vision\(\) cannot come behind"),
        ("a.yaml", "plan: slow", "a.yaml: plan: expected one of cdpruner, .*; found 'slow'"),
        ("a.yaml", "plan: {fastv: 1}", "plan: expected one of cdpruner, .*; found {'fastv': 1}"),
        ("a.yaml", "plan: fastv\noptions: [0.5]", "options: expected names with values, found \\[0.5\\]"),
        ("a.yaml", "plan: fastv\noptions: {rate: 1}", "expected some of layer, ratio, rounding; found rate"),
        (
            "a.yaml",
            "plan: fastv\noptions: {ratio: 5}",
            r"a.yaml: ratio: expected a share in \(0, 1\], found 5",
        ),
        ("a.yaml", "plan: glimpse", "plan 'glimpse': modules: expected learned modules, found none"),
    ],
)
def test_files_that_are_refused(name: str, text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(GlimpseError, match=words):
        plans.from_file(tmp_path / name)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(GlimpseError, match="plan file: expected one to read, found .*No such file"):
        plans.from_file(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"plan: fast\xff")
    with pytest.raises(GlimpseError, match="latin.yaml: expected UTF-8"):
        plans.from_file(tmp_path / "latin.yaml")


# -- budgets ---------------------------------------------------------------------------------------------------


def in_the_cache(plan: PrunePlan, layers: int, tokens: int = 10**9) -> float:
    """Layer by layer, which of the stages its keys have been through; in whole tokens."""
    cached = 0
    for layer in range(layers):
        left = now = tokens
        for stage in plan.resolved(layers).stages:
            select: Any = stage.select
            for share in [select.share] if hasattr(select, "share") else [select.dominant]:
                now = min(now, round(share.ratio * (tokens if share.of == "original" else now)))
            behind = stage.evict_earlier or stage.at.order < (layer, 0)
            left = now if behind else left
        cached += left
    return cached / layers / tokens


@pytest.mark.parametrize("layers", [6, 28, 36])
@pytest.mark.parametrize(
    "plan",
    [
        plans.divprune(0.3),
        plans.fastv(),
        plans.fastv(5, 0.1),
        plans.vscan(),
        plans.vscan(0.6, (0.5, 0.1), (0.3, 0.9)),
        plans.pyramiddrop(),
        plans.pyramiddrop((0.5, 0.9, 0.2), of="current", positions="keep"),
        plans.sparsevlm(layers=(1 / 16, 3 / 16, 15 / 32)),
        plans.cascade(plans.gprune(), plans.fastv(1), plans.pyramiddrop()),
        PrunePlan("evicts", (
            Stage(at=LayerInput(2), score=LastRowAttention(), select=TopK(Share(0.7))),
            Stage(at=Layer(4), score=LastRowAttention(), select=TopK(Share(0.5)), evict_earlier=True),
            Stage(at=LayerInput(-1), score=LastRowAttention(), select=TopK(Share(0.5))),
        )),
    ],
    ids=lambda plan: plan.name,
)  # fmt: skip
def test_kept_share(plan: PrunePlan, layers: int) -> None:
    assert plans.kept_share(plan, layers) == pytest.approx(in_the_cache(plan, layers), abs=1e-8)


def test_kept_share_by_hand() -> None:
    """Numbers of the papers: 270 of 576 tokens, (K N + (L - K) k) / L, a ninth; and 192 of 576 for the shares of 300, 200 and 118."""
    assert plans.kept_share(plans.pyramiddrop(), 32) == pytest.approx(270 / 576)
    assert plans.kept_share(plans.fastv(), 32) == pytest.approx((2 * 576 + 30 * 288) / 32 / 576)
    assert plans.kept_share(plans.vscan(), 28) == pytest.approx(0.1113, abs=1e-4)
    assert plans.kept_share(plans.visionzip(0.061, 0.05), 28) == pytest.approx(0.111)
    shares = (3 * 576 + 4 * 300 + 9 * 200 + 16 * 118) / 32 / 576
    assert plans.kept_share(plans.sparsevlm(), 32) == pytest.approx(shares)


def test_kept_shares_that_are_not_known(modules: GlimpseModules) -> None:
    for plan in (plans.glimpse(modules), plans.divprune(lambda prompt: 0.5)):
        with pytest.raises(UnsupportedOptionError, match="a kept share: expected a budget that is known"):
            plans.kept_share(plan, 6)


@pytest.mark.parametrize("layers", [10, 28])
@pytest.mark.parametrize("budget", [0.05, 0.11, 0.22, 0.33, 0.5])
@pytest.mark.parametrize("name", PUBLISHED)
def test_at_budget(name: str, budget: float, layers: int) -> None:
    options = {"layers": (0.1, 0.3, 0.5)} if name == "sparsevlm" else {}
    before = {"fastv": 2, "sparsevlm": int(0.1 * layers) + 1, "pyramiddrop": int(0.25 * layers)}
    if budget < before.get(name, 0) / layers:
        with pytest.raises(
            GlimpseError, match=f"plan '{name}': budget: expected a share from .*, found {budget}"
        ):
            plans.at_budget(name, budget, layers, **options)
        return
    plan = plans.at_budget(name, budget, layers, **options)
    assert plan.name == name
    assert plans.kept_share(plan, layers) == pytest.approx(budget, abs=1e-8)


def test_at_budget_is_round_where_it_can_be() -> None:
    """A share a hair below 0.11 would leave 10 of 100 tokens."""
    (stage,) = plans.at_budget("gprune", 0.11, 28).stages
    assert stage.select == TopK(Share(0.11))
    assert plans.at_budget("vispruner", 1.0, 28, important=0.25) == plans.vispruner(1.0, 0.25)


@pytest.mark.parametrize(
    ("name", "budget", "options", "words"),
    [
        ("gprune", 0, {}, r"budget: expected a share in \(0, 1\], found 0"),
        ("gprune", 1.5, {}, r"budget: expected a share in \(0, 1\], found 1.5"),
        ("gprune", True, {}, r"budget: expected a share in \(0, 1\], found True"),
        ("gprune", "5%", {}, r"budget: expected a share in \(0, 1\], found '5%'"),
        (
            "fastv",
            0.05,
            {},
            "from 0.200 to 1.000 in a decoder of 10 layers .layers before its stages hold all",
        ),
        ("vscan", 0.9, {}, "from 0.000 to 0.667 in a decoder of 10 layers .more than its schedule"),
        ("fastv", 0.5, {"ratio": 0.3}, "options: expected none that the budget decides, found ratio"),
        ("glimpse", 0.5, {}, "a common budget: expected a method with an option 'ratio'"),
        ("nothing", 0.5, {}, "expected one of"),
    ],
)
def test_budgets_that_are_refused(name: str, budget: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(GlimpseError, match=words):
        plans.at_budget(name, budget, 10, **options)


def test_own_scale() -> None:
    @plans.register("two", scaled=lambda scale: {"first": scale, "second": scale / 2})
    def two(first: float = 0.5, second: float = 0.5) -> PrunePlan:
        stages = (
            Stage(at=Vision(), select=TopK(Share(first)), score=TextRelevance()),
            Stage(at=LayerInput(0.5), select=TopK(Share(second)), score=LastRowAttention()),
        )
        return PrunePlan("two", stages)

    # x / 2 + x * x / 4 is 0.3 at the positive root.
    root = -1 + math.sqrt(1 + 4 * 0.3)
    found = plans.at_budget("two", 0.3, 10)
    assert found.stages[0].select.share.ratio == pytest.approx(root, abs=1e-8)  # type: ignore[attr-defined]


# -- what stays ------------------------------------------------------------------------------------------------

ROWS: list[list[Any]] = [[3, (6, 5), 2, (1, 1), 4], [2, (9, 4), (2, 2), 3], [5], [1, (1, 3), 6, (8, 8), 1]]


def everything(batch: PackedBatch, width: int = 12, seed: int = 0) -> VisionView:
    """A view with every tap that a plan of this package asks for."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    words = rand(1000, width)
    taps = [Received(block, turns) for block in (-1, "first_full") for turns in (1, 2)]  # type: ignore[arg-type]
    return vision_view(
        batch,
        rand(batch.num_visual, width),
        received={tap: rand(batch.num_visual).exp() for tap in taps},
        keys={-1: rand(batch.num_visual, 8)},
        text=lambda ids: words.index_select(0, ids),
    )


def in_vision() -> Iterator[str]:
    for name in PUBLISHED:
        if isinstance(plans.make(name).stages[0].at, Vision):
            yield name


def choose_ratio(prompt: Prompt) -> float:
    return 0.2 if len(prompt.grids) == 2 else 0.9


@pytest.mark.parametrize("name", in_vision())
@pytest.mark.parametrize("kind", ["small", "half", "all", "callable"])
def test_counts(name: str, kind: str) -> None:
    """Exactly the budget of every picture, at least one token, whatever the grid: smaller than a window, one token, odd remainders."""
    ratio: Any = {"small": 0.01, "half": 0.5, "all": 1.0, "callable": choose_ratio}[kind]
    options = {"repeat": False} if name == "divprune" else {}
    if name == "visionzip":
        plan = plans.visionzip(ratio, 0.01)
    else:
        plan = plans.make(name, ratio=ratio, **options)
    batch = batch_of(ROWS)
    view, stage = everything(batch), plan.stages[0]
    _, chosen = run_stage(stage, view)
    nearest = name in ("divprune", "cdpruner")
    for p in batch.pictures:
        share = choose_ratio(batch.prompt(p.row)) if kind == "callable" else ratio
        wanted = max(1, round(share * p.size) if nearest else int(share * p.size))
        if name == "visionzip":
            wanted = min(p.size, wanted + 1)
        assert int(chosen.selection.keep[p.start : p.stop].sum()) == wanted
    assert chosen.selection.keep.sum() == sum(stage.select.most(batch))
    if stage.merge is not None:
        merged = stage.merge.merged(view, chosen)
        assert merged.shape == view.features.shape and merged.isfinite().all()


@pytest.mark.parametrize("name", in_vision())
def test_pictures_by_themselves(name: str) -> None:
    """What is chosen of a prompt does not depend on the others of its batch."""
    stage = plans.make(name).stages[0]
    batch = batch_of(ROWS)
    view = everything(batch)
    scores, chosen = run_stage(stage, view)
    merged = view.features if stage.merge is None else stage.merge.merged(view, chosen)
    for row, segments in enumerate(ROWS):
        own = [p for p in batch.pictures if p.row == row]
        if not own:
            continue
        some, text = slice(own[0].start, own[-1].stop), int(batch.ids[batch.cu_seqlens[row]])
        alone = vision_view(
            batch_of([segments]),
            view.features[some],
            received={tap: found[some] for tap, found in view.received.items()},
            keys={block: keys[some] for block, keys in view.keys.items()},
            text=lambda ids, text=text: view.text(ids + text),  # type: ignore[misc]
        )
        found, picked = run_stage(stage, alone)
        assert torch.equal(picked.selection.keep, chosen.selection.keep[some])
        if found is not None and scores is not None:
            torch.testing.assert_close(found, scores[some])
        if stage.merge is not None:
            torch.testing.assert_close(stage.merge.merged(alone, picked), merged[some])


@pytest.mark.parametrize("name", in_vision())
@pytest.mark.parametrize("kind", ["equal", "zero"])
def test_features_without_a_difference(name: str, kind: str) -> None:
    """Duplicates and rows of zeros: as many as wanted stay, unless the original's repeated picks are asked for."""
    batch = batch_of([[3, (4, 6), 2]])
    features = torch.zeros(24, 5) if kind == "zero" else torch.randn(5).expand(24, 5).contiguous()
    view = everything(batch, width=5)
    view._features = features
    stage = plans.make(name).stages[0]
    _, chosen = run_stage(stage, view)
    count = int(chosen.selection.keep.sum())
    if name == "divprune":
        assert 1 <= count <= 2
        _, chosen = run_stage(plans.divprune(repeat=False).stages[0], view)
        count, stage = int(chosen.selection.keep.sum()), plans.divprune(repeat=False).stages[0]
    assert [count] == stage.select.most(batch)


def test_ratio_of_a_prompt() -> None:
    """It is asked once for each prompt; what it gives is checked as any other."""
    asked = []

    def ratio(prompt: Prompt) -> float:
        asked.append(prompt)
        return 0.5 if len(prompt.ids) > 40 else 0.25

    batch = batch_of([[3, (4, 4), 2], [30, (4, 4), 2]])
    stage = plans.gprune(ratio).stages[0]
    assert stage.select.most(batch) == stage.select.most(batch) == [4, 8]
    assert [prompt.grids for prompt in asked] == [((4, 4),), ((4, 4),)]
    assert [len(prompt.ids) for prompt in asked] == [21, 48]
    for value in (0.0, 2.0, "half", lambda prompt: 0.5):
        stage = plans.gprune(lambda prompt, value=value: value).stages[0]  # type: ignore[misc]
        with pytest.raises(
            GlimpseError,
            match="ratio(, for the prompt of row 0)?: expected a share (in|for the prompt of row 0)",
        ):
            stage.select.most(batch_of([[3, (4, 4), 2]]))


# -- scorers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", ["plus", "minus"])
@pytest.mark.parametrize("over", ["picture", "prompt"])
def test_relevance(sign: Any, over: Any) -> None:
    batch = batch_of(ROWS)
    view = everything(batch)
    found = TextRelevance(sign, over).score(view)
    wanted = torch.empty(0)
    rows = [[p for p in batch.pictures if p.row == row] for row in range(4)]
    for groups in [[[p] for p in own] if over == "picture" else [own] for own in rows]:
        for group in [g for g in groups if g]:
            ids = torch.tensor([i for i in batch.prompts[group[0].row] if i >= 0])
            relevance = torch.tensor([
                (1 if sign == "plus" else -1)
                * sum(torch.cosine_similarity(view.features[i], word, dim=0) for word in view.text(ids)) / len(ids)
                for p in group for i in range(p.start, p.stop)
            ])  # fmt: skip
            low, high = relevance.min(), relevance.max()
            scaled = (relevance - low) / (high - low) if high > low else torch.ones_like(relevance)
            wanted = torch.cat([wanted, scaled])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def rater_rows(seen: torch.Tensor, words: torch.Tensor) -> list[int]:
    share = torch.softmax(seen @ words.T, -1).mean(0)
    return [i for i in range(len(words)) if share[i] > share.mean()] or list(range(len(words)))


RATED: list[list[Any]] = [[3, (3, 5), 2, (1, 1), 6], [2, (4, 4), (2, 2)], [5], [1, (2, 3), 1]]


@pytest.mark.parametrize("chunk", [1, 1 << 22])
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("heads", [2, None])
def test_raters(heads: int | None, corrected: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pictures, some with one word or none behind them, grouped key heads; against whole matrices."""
    monkeypatch.setattr(rater_attention, "CHUNK", chunk)
    head_dim, width = 8, 16
    batch = batch_of(RATED)
    view = everything(batch, width)
    scorer = RaterAttention(heads, corrected)
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(batch.num_rows, width, generator=generator)
    weights = {
        "norm_weight": torch.ones(width),
        "q_weight": torch.randn(32, width, generator=generator),
        "k_weight": torch.randn(16, width, generator=generator),
    }
    decoder = row_view(batch, hidden, weights, head_dim=head_dim, prepared=scorer.prepare(view))
    found = scorer.score(decoder)
    wanted = []
    every = torch.arange(batch.num_rows)
    q, k = decoder.queries(every, rotary=True), decoder.keys(rotary=True).k.repeat_interleave(2, 1)
    cos, sin = (t.repeat(1, 2) for t in decoder.rotary)
    half = head_dim // 2
    ones = cos + torch.cat([-sin[:, :half], sin[:, half:]], 1)
    for p in batch.pictures:
        begin, end = batch.cu_seqlens[p.row : p.row + 2].tolist()
        own = batch.token_rows[p.start : p.stop].long()
        behind = [r for r in range(int(own[-1]) + 1, end) if batch.ids[r] >= 0]
        raters = [end - 1]
        if behind:
            raters = [
                behind[i] for i in rater_rows(view.features[p.start : p.stop], view.text(batch.ids[behind]))
            ]
        per_head = torch.zeros(4, p.tokens)
        for r in raters:
            weight = torch.softmax(torch.einsum("hd,lhd->hl", q[r], k[begin : r + 1]) * head_dim**-0.5, -1)
            weight = torch.cat([weight, torch.zeros(4, end - r - 1)], 1)[:, own - begin]
            alike = (ones[own] @ ones[r]) * head_dim**-0.5
            per_head += weight / alike if corrected else weight
        used = per_head.sum(1).argsort(descending=True)[: heads or 4]
        wanted.append(per_head[used].mean(0) / len(raters))
    close = torch.cat(wanted)
    assert (found - close).abs().max() <= 1e-4 * close.abs().max()


def test_more_heads_than_there_are() -> None:
    batch = batch_of([[2, (2, 3), 4]])
    view = everything(batch, 16)
    weights = {name: torch.randn(16, 16) for name in ("q_weight", "k_weight")} | {
        "norm_weight": torch.ones(16)
    }

    def score(scorer: RaterAttention) -> torch.Tensor:
        prepared = scorer.prepare(view)
        return scorer.score(row_view(batch, hidden, weights, head_dim=8, prepared=prepared))

    hidden = torch.randn(batch.num_rows, 16)
    with pytest.raises(GlimpseError, match="heads: expected at most the 2 heads of the model, found 14"):
        score(RaterAttention())
    assert torch.equal(score(RaterAttention(fewer_heads="all")), score(RaterAttention(heads=None)))
    with pytest.raises(
        GlimpseError, match="expected what it prepared of the prompt's embeddings, found none"
    ):
        RaterAttention().score(row_view(batch, hidden, weights, head_dim=8))


# -- the example of CONTRIBUTING.md ----------------------------------------------------------------------------


def test_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: GlimpseModel) -> None:
    """As it stands on the page: it registers a plan that chooses what its text says."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    section = page.split("## How to add a pruning method")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.S)
    assert len(code.splitlines()) <= 35
    (tmp_path / "unlikeness_example.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(plans.names())
    importlib.import_module("unlikeness_example")
    assert set(plans.names()) - before == {"unlike"}
    plan = plans.make("unlike", ratio=0.5)
    assert plans.kept_share(plan, 28) == 0.5
    assert plans.at_budget("unlike", 0.1, 28) == plans.make("unlike", ratio=0.1)
    features = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 0.1], [0.0, 9.0], [1.0, 1.0], [0.0, 1.0]])
    view = vision_view(batch_of([[1, (2, 2), 1, (1, 2), 2]]), features)
    _, chosen = run_stage(plan.stages[0], view)
    assert chosen.selection.keep.tolist() == [False, True, False, True, True, False]
    batch, _ = make_batch([[3, (4, 4), 5]])
    out = model.generate(**batch, plan="unlike", max_new_tokens=3, return_dict_in_generate=True)
    assert [int(picture.keep.sum()) for picture in out.pruning] == [4]


@pytest.mark.parametrize("name", PUBLISHED)
def test_pages(name: str) -> None:
    """Every method's page says where it comes from, and fits on a screen."""
    page = importlib.import_module(registry.entry(name).factory.__module__)
    assert page.__doc__ and re.search(r"arXiv:\d{4}\.\d{5}", page.__doc__)
    assert registry.entry(name).factory.__doc__
    assert len(Path(str(page.__file__)).read_text().splitlines()) <= 75

# SPDX-License-Identifier: Apache-2.0
"""``glimpse compare``: what it counts, that a killed run goes on, what it refuses, and the page that it writes."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from glimpse_lab.compare import answers, page, run
from glimpse_lab.compare.asked import large, pictures
from glimpse_lab.compare.command import compare
from glimpse_lab.compare.contenders import contenders
from glimpse_lab.compare.memory import measure
from glimpse_lab.compare.plot import draw
from glimpse_lab.compare.store import Store
from glimpse_lab.compare.summary import _times, chance, interval
from glimpse_lab.compare.timing import Times
from glimpse_lab.compare.verdicts import verdicts
from glimpse_lab.evaluate import evaluate
from glimpse_lab.world import HELD_OUT_SEED, SIZES
from glimpse_runtime import GlimpseModel, cli
from glimpse_runtime.errors import GlimpseError
from glimpse_runtime.plans import registry
from glimpse_runtime.processor import Processor

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "models" / "tiny"
SIZE = (168, 168)  # 6 x 6 visual tokens


def wanted(**changes: Any) -> run.Wanted:
    options: dict[str, Any] = dict(
        plans="divprune,fastv", budgets="11,33", pictures=1, sizes="168x168", rounds=2, base=None, glimpse=None,
        threads=1, dtype="float32", seed=0, timed=(SIZE,),
    )  # fmt: skip
    return run.Wanted.parse(**{**options, **changes})


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A run of two plans at two budgets, with a page."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "methods.md").write_text(f"before\n\n{page.BEGIN}\nstale numbers\n{page.END}\n\nbehind\n")
    summary = run.run(wanted(), output=folder / "run", markdown=folder / "methods.md", resume=False)
    return folder, summary


@pytest.fixture(scope="module")
def model() -> GlimpseModel:
    return GlimpseModel.from_pretrained(TINY / "base", glimpse=TINY / "glimpse", dtype=torch.float32)


def point(summary: dict[str, Any], plan: str, budget: float | None) -> dict[str, Any]:
    (found,) = [p for p in summary["points"] if (p["plan"], p["budget"]) == (plan, budget)]
    return found


# -- what is counted -------------------------------------------------------------------------------------------


def test_kept_shares_are_those_of_the_cache(finished):
    _, summary = finished
    assert point(summary, "unpruned", None)["kept"] == 1.0
    # 0.11 and 0.33 of 36 tokens, to the nearest.
    assert point(summary, "divprune", 0.11)["kept"] == pytest.approx(4 / 36, abs=1e-5)
    assert point(summary, "divprune", 0.33)["kept"] == pytest.approx(12 / 36, abs=1e-5)
    # Two layers of ten hold all, so that the others have 0.1625 of 36 tokens.
    assert point(summary, "fastv", 0.33)["kept"] == pytest.approx((2 + 8 * 6 / 36) / 10, abs=1e-5)


def test_a_budget_out_of_reach_is_a_footnote(finished):
    folder, summary = finished
    assert [(m["plan"], m["budget"]) for m in summary["missing"]] == [("fastv", 0.11)]
    text = (folder / "methods.md").read_text()
    assert (
        "`fastv` has no point at 11 %: expected a share from 0.200 to 1.000 in a decoder of 10 layers" in text
    )
    assert not any(p["plan"] == "fastv" and p["budget"] == 0.11 for p in summary["points"])


def test_answers_are_those_of_the_evaluation(finished, model):
    folder, summary = finished
    theirs = evaluate(
        model,
        Processor.from_pretrained(TINY / "base"),
        pictures=1,
        sizes=(SIZE,),
        modes=("unpruned", "glimpse"),
    )
    ours = {(r["plan"], r["budget"]): r for r in records(folder / "run") if r["kind"] == "answers"}
    for name in ("unpruned", "glimpse"):
        assert ours[name, None]["answers"] == [r[name] for r in theirs]
    assert ours["glimpse", None]["kept"] == pytest.approx([r["kept"] for r in theirs], abs=1e-6)
    found = point(summary, "glimpse", None)
    assert found["questions"] == len(theirs)
    assert found["right"] == sum(r["glimpse"] == r["answer"] for r in theirs)
    assert found["agree"] == sum(r["glimpse"] == r["unpruned"] for r in theirs)
    assert sum(total for _, total in found["tasks"].values()) == len(theirs)
    assert found["sizes"] == {"168x168": [found["right"], len(theirs)]}


def test_an_answer_that_does_not_end_is_wrong(model):
    asker = answers.Asker(model, Processor.from_pretrained(TINY / "base"), next(pictures((SIZE,), 1)))
    digits = asker._tokenizer("12", add_special_tokens=False)["input_ids"]
    (end,) = asker._ends
    assert asker._text([*digits, end, digits[0]]) == "12"
    assert asker._text(digits) == "12" + answers.UNENDED


def test_pictures_do_not_depend_on_what_else_is_asked():
    every = {(p.size, p.number): p.seed for p in pictures(SIZES, 3)}
    assert len(set(every.values())) == len(every) == 39
    assert all(seed >= HELD_OUT_SEED for seed in every.values())
    some = {(p.size, p.number): p.seed for p in pictures(SIZES[3:5], 2)}
    assert some.items() <= every.items()
    assert not {p.seed for p in pictures(SIZES, 3, seed=1)} & set(every.values())
    assert large(896, 896).tokens == 1024 and large(896, 896).seed not in every.values()


def test_memory(model, finished):
    _, summary = finished
    processor = Processor.from_pretrained(TINY / "base")
    inputs = answers.inputs_of(processor, large(*SIZE), large(*SIZE).questions()[:1])
    (whole, free, half), _ = contenders(["divprune"], [0.5], model.plan, 10)
    found = {c.name: measure(model, inputs, c) for c in (whole, half)}
    rows = inputs["input_ids"].shape[1]
    a_row = 10 * 2 * 2 * 32 * 4  # layers, keys and values, heads, width of a head, bytes
    assert found["unpruned"]["kv"] == rows * a_row == point(summary, "unpruned", None)["memory"]["kv"]
    assert found["divprune"]["kv"] == (rows - 18) * a_row
    assert measure(model, inputs, half) == found["divprune"]
    # 144 patches of the tower's width are alive at least, and what is left in the cache.
    assert found["unpruned"]["tower"] >= 144 * 128 * 4
    assert found["unpruned"]["behind"] >= found["unpruned"]["kv"]


def test_rounds_count_only_with_the_same_contenders(model, tmp_path):
    both, _ = contenders(["divprune"], [0.5], model.plan, 10)
    store = Store(tmp_path / "r.jsonl", {}, resume=False)
    processor = Processor.from_pretrained(TINY / "base")
    times = Times(store, SIZE, both, 2)
    assert times.left() == 8  # the unpruned model is at both ends of a round
    steps: list[int] = []
    times.run(model, processor, lambda: steps.append(1))
    assert len(steps) == 8 and times.left() == 0
    for record in times.records():
        names = [run[0] for run in record["runs"]]
        assert names[0] == names[-1] == "unpruned" and sorted(names[1:-1]) == ["divprune", "glimpse"]
        assert all(wall > 0 and core > 0 for *_, wall, core in record["runs"])
    times.run(model, processor, lambda: steps.append(1))
    assert len(steps) == 8
    assert Times(store, SIZE, both[:2], 2).left() == 6
    assert Times(store, SIZE, both, 3).left() == 4
    assert {tuple(c.name for c in Times(store, SIZE, both, 9)._order(n)) for n in range(9)} == {
        ("unpruned", "glimpse", "divprune", "unpruned"),
        ("unpruned", "divprune", "glimpse", "unpruned"),
    }


def test_times_are_compared_with_the_nearest_unpruned_runs():
    def record(*runs: tuple[str, float]) -> dict[str, Any]:
        return {"runs": [[name, None, 2 * core, core] for name, core in runs]}

    found = _times(
        [
            record(("unpruned", 1.0), ("a", 3.0), ("unpruned", 2.0), ("b", 2.0), ("unpruned", 2.0)),
            record(("unpruned", 4.0), ("b", 6.0), ("unpruned", 2.0), ("a", 2.0), ("unpruned", 2.0)),
        ]
    )
    assert found["a", None] == {"wall": 5.0, "core": 2.5, "ratio": 1.5, "low": 1.25, "high": 1.75}
    assert found["b", None]["ratio"] == (1.0 + 2.0) / 2
    assert found["unpruned", None]["ratio"] == 1.0


def test_cascades(model):
    found, missing = contenders(["divprune+glimpse", "fastv+glimpse"], [0.2, 0.6], model.plan, 10)
    (cascade,) = [c for c in found if c.budget is not None]
    first, second = cascade.plan.stages
    assert first.select.share.ratio == 0.4 and second.select.max_remain_ratio == 0.5
    assert [(m.name, m.budget) for m in missing] == [
        ("divprune+glimpse", 0.6), ("fastv+glimpse", 0.2), ("fastv+glimpse", 0.6)
    ]  # fmt: skip


def test_random_is_by_lot(model):
    """As many as the budget says, others for each question, the same in every run."""
    found, missing = contenders(["random"], [0.25, 1.0], model.plan, 10)
    assert not missing
    asker = answers.Asker(model, Processor.from_pretrained(TINY / "base"), next(pictures((SIZE,), 1)))
    kept = []
    for _ in range(2):
        report = model.prefill(**asker._inputs, plan=found[2].plan, max_new_tokens=1).pruning
        kept.append([tuple(p.keep.flatten().tolist()) for p in report])
    assert kept[0] == kept[1]
    assert all(sum(mask) == 9 for mask in kept[0])
    assert len(set(kept[0])) == len(kept[0]) == len(asker.questions)
    assert asker.under(found[3])["answers"] == asker.under(found[0])["answers"]


def test_options_of_methods(model):
    found, missing = contenders(
        ["cdpruner:sign=minus", "fastv:layer=4:rounding=floor"], [0.5], model.plan, 10
    )
    (minus, fastv), no = [c.plan.stages[0] for c in found[2:]], missing
    assert minus.score.sign == "minus" and not no
    assert fastv.at.index == 3 and fastv.select.share.rounding == "floor"


@pytest.mark.parametrize(("right", "total"), [(0, 20), (7, 20), (20, 20), (599, 600)])
def test_interval(right, total):
    """Its ends are the shares that are 1.96 of their own standard errors away from what was seen."""
    low, high = interval(right, total)
    for end in (low, high):
        if 0.0 < end < 1.0:
            assert abs(right / total - end) == pytest.approx(1.959964 * (end * (1 - end) / total) ** 0.5)
    assert low <= right / total <= high and high - low > 0.001


def test_chance():
    assert chance(0, 0) == chance(3, 3) == chance(1, 0) == 1.0
    assert chance(5, 0) == 2 / 32
    assert chance(1, 8) == 2 * (1 + 9) / 2**9


# -- a run that was stopped ------------------------------------------------------------------------------------


def test_a_killed_run_goes_on(finished, tmp_path, monkeypatch):
    whole = records(finished[0] / "run")
    asked: list[tuple[str, float | None]] = []
    original = answers.Asker.under

    def under(self, contender):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(contender.key)
        return original(self, contender)

    monkeypatch.setattr(answers.Asker, "under", under)
    with pytest.raises(KeyboardInterrupt):
        run.run(wanted(), output=tmp_path, markdown=None, resume=False)
    path = tmp_path / "records.jsonl"
    before = path.read_bytes()
    path.write_bytes(before + b'{"kind": "answers", "size": "16')  # killed in the middle of a line
    monkeypatch.setattr(answers.Asker, "under", lambda self, c: (asked.append(c.key), original(self, c))[1])
    summary = run.run(wanted(), output=tmp_path, markdown=None, resume=True)
    assert path.read_bytes().startswith(before)
    assert len(asked) == len(set(asked)) == sum(r["kind"] == "answers" for r in whole)
    steady = [r for r in whole if r["kind"] != "round"]
    assert [r for r in records(tmp_path) if r["kind"] != "round"] == steady
    assert sum(r["kind"] == "round" for r in records(tmp_path)) == 2
    done = len(asked)
    again = run.run(wanted(), output=tmp_path, markdown=None, resume=True)
    assert len(asked) == done and again == summary
    # More of the same: only what is new is asked.
    run.run(wanted(budgets="11,22,33", rounds=0), output=tmp_path, markdown=None, resume=True)
    assert set(asked[done:]) == {("divprune", 0.22), ("fastv", 0.22)}


def test_a_run_is_not_mixed_with_another(finished):
    folder, _ = finished
    before = records(folder / "run")
    with pytest.raises(GlimpseError, match="--resume to go on"):
        run.run(wanted(), output=folder / "run", markdown=None, resume=False)
    with pytest.raises(GlimpseError, match="expected the settings of the run"):
        run.run(wanted(dtype="bfloat16"), output=folder / "run", markdown=None, resume=True)
    assert records(folder / "run") == before


# -- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": "0"}, "--budgets: expected percent"),
        ({"budgets": "101"}, "found '101'"),
        ({"budgets": "nan"}, "found 'nan'"),
        ({"budgets": "ten"}, "found 'ten'"),
        ({"budgets": ","}, "--budgets: expected some"),
        ({"plans": "nothing"}, "plans: expected some of cdpruner, .*found 'nothing'"),
        ({"plans": "fastv+divprune"}, r"found 'fastv\+divprune'"),
        ({"plans": "divprune:colour=red"}, "options: expected some of ratio, .*found colour"),
        ({"plans": "divprune:ratio=0.5"}, "that the budget decides, ratio; found 'divprune:ratio=0.5'"),
        ({"plans": "fastv:layer=0"}, "layer: expected the number of a layer"),
        ({"plans": "glimpse+glimpse"}, r"found 'glimpse\+glimpse'"),
        ({"sizes": "100x100"}, "--sizes: expected some of 168x168.*found '100x100'"),
        ({"dtype": "float16"}, "--dtype: expected float32 or bfloat16, found 'float16'"),
        ({"base": TINY / "base"}, "expected both or none"),
        ({"base": TINY / "nothing", "glimpse": TINY / "nothing"}, "nothing"),
    ],
)
def test_bad_options(options, message, tmp_path):
    with pytest.raises(GlimpseError, match=message):
        run.run(wanted(**options), output=tmp_path, markdown=None, resume=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", [None, "no markers\n", f"{page.END}\n{page.BEGIN}\n", f"{page.BEGIN}\n" * 2 + page.END]
)
def test_pages_without_markers(text, tmp_path):
    target = tmp_path / "page.md"
    if text is not None:
        target.write_text(text)
    with pytest.raises(GlimpseError, match="--markdown: expected"):
        run.run(wanted(), output=tmp_path / "run", markdown=target, resume=False)
    assert not (tmp_path / "run").exists()
    assert text is None or target.read_text() == text


def test_no_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        GlimpseError, match=r"plots: expected matplotlib \(pip install 'glimpse-engine\[compare\]'\)"
    ):
        run.run(wanted(), output=tmp_path, markdown=None, resume=False)


def test_a_bad_record_file(tmp_path):
    (tmp_path / "records.jsonl").write_text("{}\nnot json\n")
    with pytest.raises(GlimpseError, match="output: expected JSON lines"):
        run.run(wanted(), output=tmp_path, markdown=None, resume=True)


# -- the page --------------------------------------------------------------------------------------------------


def test_page(finished):
    folder, summary = finished
    text = (folder / "methods.md").read_text()
    assert text.startswith("before\n\n") and text.endswith("\n\nbehind\n") and "stale" not in text
    assert page.part_of(text) == page.generated(summary)
    assert json.loads((folder / "methods.json").read_text()) == summary
    assert page.part_of(text) == page.generated(json.loads((folder / "methods.json").read_text()))
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    assert {"`divprune`", "`fastv`", "`glimpse`, no cap", "unpruned"} <= set(rows)


def test_the_committed_page_is_that_of_its_numbers():
    summary = json.loads((ROOT / "docs" / "methods.json").read_text())
    text = (ROOT / "docs" / "methods.md").read_text()
    assert page.part_of(text) == page.generated(summary)
    for shown in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (ROOT / "docs" / shown).is_file()
    assert {p["plan"] for p in summary["points"]} >= {"glimpse", "fastv", "visionzip", "divprune+glimpse"}


def test_plots(finished, tmp_path):
    folder, summary = finished
    svg, png = folder / "images" / "methods.svg", folder / "images" / "methods.png"
    root = xml.etree.ElementTree.parse(svg).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    words = {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"divprune", "fastv", "glimpse, no cap", "right answers, %", "same answer as unpruned, %"} <= words
    with Image.open(png) as image:
        assert image.format == "PNG"
        image.load()
        assert image.width > 800
    draw(summary, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == svg.read_bytes()
    assert svg.stat().st_size < 200_000 and png.stat().st_size < 400_000


def told(summary: dict[str, Any], title: str) -> list[str]:
    """Cells of divprune's row in the table of this title."""
    lines = page.generated(summary).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f"| {title} |"))
    row = next(line for line in lines[at:] if line.startswith("| `divprune` |"))
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def test_the_page_says_who_is_ahead(finished):
    """In both directions, by the numbers: those of the two methods are made up, then exchanged."""
    summary = copy.deepcopy(finished[1])
    ahead = {"questions": 100, "right": 90, "agree": 90, "better": 20, "worse": 1}
    behind = {"questions": 100, "right": 71, "agree": 71, "better": 0, "worse": 0}
    fast = {"168x168": {"wall": 1.0, "core": 1.0, "ratio": 0.5, "low": 0.4, "high": 0.6}}
    slow = {"168x168": {"wall": 1.0, "core": 1.0, "ratio": 0.9, "low": 0.8, "high": 1.0}}
    small = {"size": "168x168", "kv": 1, "tower": 2, "behind": 3}
    big = {"size": "168x168", "kv": 2, "tower": 4, "behind": 3}
    theirs = point(summary, "divprune", 0.33)
    ours = copy.deepcopy(point(summary, "glimpse", None)) | {"budget": 0.33}
    summary["points"].append(ours)
    theirs |= {**ahead, "times": fast, "memory": small}
    ours |= {**behind, "times": slow, "memory": big}
    assert told(summary, "The method is ahead") == ["33 %"] * 4
    assert told(summary, "`glimpse` is ahead") == ["–"] * 4
    assert "- 33 %: `divprune` 90.0, `glimpse` 71.0" in page.generated(summary)
    theirs |= {**behind, "better": 1, "worse": 20, "times": slow, "memory": big}
    ours |= {**ahead, "times": fast, "memory": small}
    assert told(summary, "The method is ahead") == ["–"] * 4
    assert told(summary, "`glimpse` is ahead") == ["33 %"] * 4
    # What could be chance is marked.
    theirs |= {"right": 91, "better": 3, "worse": 2, "times": {"168x168": {**fast["168x168"], "ratio": 0.49}}}
    assert verdicts(summary)["divprune"]["answers"] == {"theirs": [(0.33, True)], "glimpse's": []}
    assert told(summary, "The method is ahead") == ["(33 %)", "(33 %)", "–", "–"]


def test_no_better_than_random_is_said(finished):
    summary = copy.deepcopy(finished[1])
    theirs, other = point(summary, "divprune", 0.33), point(summary, "fastv", 0.33)
    other["right"] = other["questions"]
    theirs["right"] = 4
    summary["points"].append(theirs | {"plan": "random"})
    said = "no better than {:.1f} at random: `divprune`"
    assert said.format(100 * theirs["right"] / theirs["questions"]) in page.generated(summary)
    summary["points"][-1] = theirs | {"plan": "random", "right": theirs["right"] - 1}
    assert "no better than" not in page.generated(summary)
    assert "random" not in verdicts(summary)


def test_slower_than_no_pruning_is_said(finished):
    summary = copy.deepcopy(finished[1])
    own = point(summary, "glimpse", None)["times"]["168x168"]
    own |= {"ratio": 1.2, "low": 1.1, "high": 1.3}
    assert "At 168x168 `glimpse` is slower than no pruning at all: no cap." in page.generated(summary)
    own |= {"ratio": 1.2, "low": 0.9, "high": 1.3}
    assert "slower than no pruning" not in page.generated(summary)


# -- the command -----------------------------------------------------------------------------------------------


@pytest.fixture
def app(monkeypatch):
    """The command line as it is without installed packages."""
    monkeypatch.setattr(cli, "_add_installed", lambda: None)
    commands = [c for c in cli.app.registered_commands if c.name in ("run", "info", "parity")]
    monkeypatch.setattr(cli.app, "registered_commands", commands)
    return cli


def entry(name: str, value: str) -> EntryPoint:
    return EntryPoint(name=name, value=value, group=cli.COMMANDS)


def test_installed_commands_are_added(app, capsys):
    text = (ROOT / "pyproject.toml").read_text()
    (line,) = re.findall(r'\[project.entry-points."glimpse.commands"\]\n(.*)\n', text)
    name, value = line.split(" = ")
    app.add_from([entry(name, value.strip('"'))])
    assert app.run(["--help"]) == 0
    assert "compare" in capsys.readouterr().out
    assert app.run(["compare", "--help"]) == 0
    shown = capsys.readouterr()
    assert "--budgets" in shown.out and "Examples" in shown.out and not shown.err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("other", "no_such_package.at_all:f"),
        ("other", "glimpse_lab.compare.command:nothing"),
        ("run", "glimpse_lab.compare.command:compare"),
    ],
)
def test_a_broken_command_does_not_break_the_others(name, value, app, capsys):
    app.add_from([entry(name, value), entry("compare", "glimpse_lab.compare.command:compare")])
    assert app.run(["--version"]) == 0
    assert app.run(["compare", "--help"]) == 0
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and f"{name!r} ({value}) is left out" in said[0]


def test_bad_options_are_one_line(app, capsys, tmp_path):
    app.add("compare", compare)
    for arguments in (
        ["--budgets", "0"],
        ["--pictures", "0"],
        ["--nothing"],
        ["--plans", "x", "--rounds", "0"],
    ):
        assert app.run(["compare", *arguments, "--output", str(tmp_path)]) == 2
        said = capsys.readouterr()
        assert not said.out and len(said.err.strip().splitlines()) == 1 and "glimpse: error" in said.err


def test_plans_from_outside_take_part(app, tmp_path, monkeypatch):
    (tmp_path / "of_mine.py").write_text(
        "from glimpse_runtime import plans\nplans.register('mine', lambda ratio=0.5: plans.divprune(ratio))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    app.add("compare", compare)
    options = (
        "compare --import of_mine --plans mine --budgets 50 --pictures 1 --sizes 168x168 --quick --rounds 0"
    )
    assert app.run([*options.split(), "--output", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "compare.json").read_text())
    assert point(summary, "mine", 0.5)["kept"] == 0.5
    assert summary["core"] is None and "Time to the first token" not in page.generated(summary)
    with pytest.raises(
        GlimpseError, match="--import: expected a module that can be imported, found 'not_there'"
    ):
        run.load(["not_there"])


def test_help_is_light_and_runs_as_a_module():
    code = "import sys, glimpse_lab.compare.command; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=ROOT)
    shown = subprocess.run(
        [sys.executable, "-m", "glimpse_lab.compare", "--help"],
        check=True, env=environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert "--resume" in shown.stdout

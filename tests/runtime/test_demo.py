# SPDX-License-Identifier: Apache-2.0
"""The demo program on a checkout-like folder: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glimpse_lab import demo

from .test_cli import GOLDEN, base  # noqa: F401  (a fixture)


@pytest.fixture()
def checkout(base, tmp_path, monkeypatch) -> Path:  # noqa: F811
    """A folder with models/tiny: the golden model, its modules, and two pictures with questions."""
    tiny = tmp_path / "models" / "tiny"
    (tiny / "pictures").mkdir(parents=True)
    (tiny / "base").symlink_to(base)
    (tiny / "glimpse").symlink_to(GOLDEN / "gp_v1")
    for name, (width, height) in {"a.png": (140, 196), "b.png": (168, 112)}.items():
        noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tiny / "pictures" / name)
    entries = [
        {"picture": "a.png", "question": "w1 w2", "answer": "w3"},
        {"picture": "b.png", "question": "w4"},
    ]
    (tiny / "pictures" / "questions.json").write_text(json.dumps(entries))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_prints_and_draws_every_sample(checkout, capsys):
    assert demo.main(["--out", "lit"]) == 0
    out = capsys.readouterr().out
    assert "a.png" in out and "w1 w2" in out and "b.png" in out
    for line in ("unpruned", "pruned"):
        assert len(re.findall(rf"^  {line} .*first token: \d+ ms", out, re.M)) == 2
    assert len(re.findall(r"tokens kept +\d+ of (35|24) \(\d+ %\)", out)) == 2
    assert (
        out.count("wrong, expected w3") == 2
    )  # a random model, and only the first sample has a right answer
    for name, ratio in (("01-a.png", 2 * 140 / 196), ("02-b.png", 2 * 168 / 112)):
        with Image.open(checkout / "lit" / name) as drawn:
            assert drawn.width / drawn.height == pytest.approx(ratio, rel=0.05)


@pytest.mark.parametrize("content", ["", "[]", "{}", '[{"picture": "a.png"}]', "[1]"])
def test_a_bad_list_of_samples_is_one_line(checkout, capsys, content):
    (checkout / "models" / "tiny" / "pictures" / "questions.json").write_text(content)
    assert demo.main([]) == 2
    assert re.fullmatch(r"demo: error: samples: .*questions\.json.*\n", capsys.readouterr().err)


def test_missing_samples_are_one_line(checkout, capsys):
    shutil.rmtree(checkout / "models" / "tiny" / "pictures")
    assert demo.main([]) == 2
    assert "no such file" in capsys.readouterr().err

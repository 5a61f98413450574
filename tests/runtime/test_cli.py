# SPDX-License-Identifier: Apache-2.0
"""The ``glimpse`` command: output, exit codes, and errors that are one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from glimpse_runtime import cli, parity

GOLDEN = Path(__file__).parents[1] / "golden" / "glimpse"
TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}{% if part.type == 'image' %}"
    " <|vision_start|> <|image_pad|> <|vision_end|> {% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)
SPECIAL = {600: "<|endoftext|>", 601: "<|im_end|>", 603: "<|vision_start|>", 604: "<|vision_end|>"}
SPECIAL |= {606: "<|image_pad|>", 607: "<|video_pad|>"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The golden base model with a processor around it: one word a token."""
    root = tmp_path_factory.mktemp("cli") / "base"
    shutil.copytree(GOLDEN / "base", root)
    vocabulary = {SPECIAL.get(number, f"w{number}"): number for number in range(640)}
    core = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="w0",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL.values()),
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(root)
    (root / "preprocessor_config.json").write_text('{"min_pixels": 784, "max_pixels": 50176}')
    return root


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (140, 196, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture()
def call(base, picture, capfd):
    """Runs a subcommand in this process; returns exit code, stdout, stderr."""

    def run(*arguments: object, model: bool = True) -> tuple[int, str, str]:
        words = [str(argument) for argument in arguments]
        if words[0] == "run" and model:
            model_words = ["--base", str(base), "--glimpse", str(GOLDEN / "gp_v1"), "--dtype", "float32"]
            words[1:1] = model_words  # first, so that a test's own options win
        code = cli.run(words)
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


def one_line_error(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.startswith("glimpse: error:")]
    assert len(lines) == 1 and "Traceback" not in stderr, stderr
    return lines[0]


def test_answer_goes_to_stdout_and_costs_to_stderr(call, picture):
    code, out, err = call("run", "w1 w2 w3", "--image", picture, "--max-new-tokens", 5)
    assert code == 0
    assert len(out.splitlines()) == 1
    assert "of 35 (" in err and "first token after" in err


def test_json_is_one_object_with_the_masks(call, picture):
    code, out, err = call("run", "w1 w2", "-i", picture, "--json", "--max-new-tokens", 4, "--compare")
    data = json.loads(out)
    assert code == 0 and "error" not in err
    (image,) = data["pruning"]
    keep = torch.tensor(image["keep"])
    assert image["grid"] == list(keep.shape) == [5, 7]
    assert data["visual_tokens"] == {"kept": int(keep.sum()), "total": 35} and image["kept"] == int(
        keep.sum()
    )
    assert data["seconds"]["ttft"] > 0 and data["unpruned"]["seconds"]["ttft"] > 0
    assert isinstance(data["answer"], str) and isinstance(data["unpruned"]["answer"], str)


def test_limits_are_passed_on(call, picture):
    options = ("-i", picture, "--json", "--max-new-tokens", 2)
    kept = []
    for limit in (("--max-remain-ratio", 0.1), ("--min-remain-num", 35), ("--threshold", 1.0)):
        code, out, _ = call("run", "w1", *options, *limit)
        assert code == 0
        kept.append(json.loads(out)["visual_tokens"]["kept"])
    assert kept[0] <= 3 and kept[1:] == [35, 1]


def test_unpruned_keeps_everything(call, picture):
    code, out, _ = call("run", "w1", "-i", picture, "--unpruned", "--json", "--max-new-tokens", 2)
    assert code == 0 and json.loads(out)["visual_tokens"] == {"kept": 35, "total": 35}


def test_stream_prints_the_same_answer(call, picture):
    options = ("run", "w1 w9", "-i", picture, "--max-new-tokens", 6)
    plain, streamed = call(*options), call(*options, "--stream")
    assert plain[0] == streamed[0] == 0 and plain[1].split() == streamed[1].split()


def test_sampling_is_seeded(call, picture):
    options = (
        "run",
        "w1",
        "-i",
        picture,
        "--max-new-tokens",
        8,
        "--temperature",
        3.0,
        "--top-k",
        50,
        "--top-p",
        0.95,
    )
    first, again = call(*options, "--seed", 5), call(*options, "--seed", 5)
    assert first[0] == 0 and first[1] == again[1]


def test_overlays_of_two_pictures(call, picture, tmp_path):
    target = tmp_path / "kept.png"
    code, _, err = call(
        "run", "w1", "-i", picture, "-i", picture, "--save-overlay", target, "--max-new-tokens", 2
    )
    assert code == 0 and str(target) in err
    for path in (target, tmp_path / "kept-2.png"):
        with Image.open(path) as written:
            assert written.width / written.height == pytest.approx(196 / 140, rel=0.01)


def test_compare_with_a_plan_needs_no_modules(call, picture, base):
    options = ("-b", base, "--compare", "--plan", "fastv", "--max-new-tokens", 2)
    code, out, _ = call("run", "w1", "-i", picture, *options, model=False)
    assert code == 0 and "18 of 35" in out


def test_compare_prints_a_table(call, picture):
    code, out, _ = call("run", "w1", "-i", picture, "--compare", "--max-new-tokens", 2)
    assert code == 0 and "unpruned" in out and "first token after" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "w1", "-i", "/absent.png"), "no such file"),
        (("run", "w1", "-i", "PICTURE", "--max-remain-ratio", 1.5), "max_remain_ratio"),
        (("run", "w1", "-i", "PICTURE", "--max-remain-ratio", 0), "max_remain_ratio"),
        (("run", "w1", "-i", "PICTURE", "--threshold", 2), "threshold"),
        (("run", "w1", "-i", "PICTURE", "--dtype", "int8"), "auto, float32, bfloat16"),
        (("run", "w1", "-i", "PICTURE", "--temperature", 0), "--temperature"),
        (("run", "w1", "-i", "PICTURE", "--top-p", 2), "--top-p"),
        (("run", "w1", "-i", "PICTURE", "--stream", "--json"), "--stream"),
        (("run", "w1", "-i", "PICTURE", "--unpruned", "--compare"), "--unpruned"),
        (("run", "w1", "-i", "PICTURE", "--unpruned", "--threshold", 0.5), "--unpruned"),
        (("run", "w1", "--save-overlay", "x.png"), "--image"),
        (("run", "w1", "-i", "PICTURE", "--max-new-tokens", 1, "--save-overlay", "x.nonsense"), "extension"),
        (("run", "w1", "-i", "PICTURE", "--max-new-tokens", 0), "max-new-tokens"),
        (("run",), "QUESTION"),
        (("run", "w1", "--nonsense"), "--nonsense"),
        (("nonsense",), "nonsense"),
        (("parity", "/absent"), "manifest.json"),
        (("parity", GOLDEN, "--case", "absent"), "absent"),
    ],
)
def test_bad_input_exits_with_2_and_one_line(call, picture, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*(picture if word == "PICTURE" else word for word in arguments))
    assert code == 2 and out == ""
    assert message.lower() in one_line_error(err).lower()


def test_bad_folders_exit_with_2(call, picture, base, tmp_path):
    code, _, err = call("run", "w1", "-i", picture, "--base", tmp_path / "absent", model=False)
    assert code == 2 and "absent" in one_line_error(err)
    code, _, err = call("run", "w1", "-i", picture, "-b", base, "-g", tmp_path, model=False)
    assert code == 2 and "config.json" in one_line_error(err)
    code, _, err = call("run", "w1", "-i", picture, "-b", base, "--compare", model=False)
    assert code == 2 and "--glimpse" in one_line_error(err)
    corrupt = tmp_path / "corrupt.png"
    corrupt.write_bytes(picture.read_bytes()[:300])
    code, _, err = call("run", "w1", "-i", corrupt)
    assert code == 2 and "corrupt" in one_line_error(err)


def test_parity_agrees_and_says_so(call):
    code, out, _ = call("parity", GOLDEN, "--case", "v1_square", "--case", "plain/square_8x8")
    assert code == 0 and "2 of 2 cases agree" in out and "20/64" in out


def test_parity_exits_with_1_when_a_recording_differs(call, tmp_path):
    shutil.copytree(GOLDEN / "base", tmp_path / "base")
    shutil.copytree(GOLDEN / "gp_v1", tmp_path / "gp_v1")
    manifest = parity.load_manifest(GOLDEN)
    case = manifest["cases"]["v1_square"]
    for name in ("manifest.json", case["file"], manifest["inputs"][case["input"]]["file"]):
        shutil.copy(GOLDEN / name, tmp_path / name)
    with np.load(GOLDEN / case["file"]) as stored:
        arrays = {name: stored[name] for name in stored.files}
    arrays["vip_logits"] = arrays["vip_logits"] + np.float32(2e-4)
    arrays["greedy_ids"] = arrays["greedy_ids"] + 1
    np.savez(tmp_path / case["file"], **arrays)
    code, out, err = call("parity", tmp_path, "--case", "v1_square")
    assert code == 1 and "0 of 1 cases agree" in out
    assert "vip: error" in err and "greedy: not equal" in err
    code, out, _ = call("parity", tmp_path, "--case", "v1_square", "--json")
    data = json.loads(out)
    assert code == 1 and not data["ok"] and data["cases"][0]["equal"]["mask"]


def test_info_names_every_op(call):
    from glimpse_kernels import support_table

    code, out, _ = call("info")
    assert code == 0 and "threads" in out and "compiled CUDA kernels" in out
    code, listed, _ = call("info", "--json")
    data = json.loads(listed)
    ops = {row.op for row in support_table()}
    assert {row["op"] for row in data["ops"]} == ops and all(op in out for op in ops)
    assert all(row["backend"] in ("cpu", "naive") for row in data["ops"])
    assert data["machine"]["torch"] == torch.__version__


@pytest.mark.parametrize("command", ["run", "info", "parity"])
def test_help_has_examples(call, command):
    code, out, _ = call(command, "--help")
    assert code == 0 and "Examples" in out and f"glimpse {command}" in out


def test_without_arguments_the_help_is_shown(capfd):
    assert cli.run([]) == 0
    out = capfd.readouterr().out
    assert all(command in out for command in ("run", "info", "parity"))


def test_as_a_process(base, picture, tmp_path):
    """Exit codes and streams as a shell sees them."""
    command = [sys.executable, "-m", "glimpse_runtime.cli"]
    environment = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run([*command, "run", "w1", "-i", "/absent.png", "-b", base], capture_output=True, text=True,
                          env=environment)  # fmt: skip
    assert done.returncode == 2 and done.stdout == "" and "no such file" in one_line_error(done.stderr)
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.startswith("glimpse")

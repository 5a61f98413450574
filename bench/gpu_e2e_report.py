# SPDX-License-Identifier: Apache-2.0
"""What the rows of `bench.gpu_e2e` say: targets, and tables for the terminal and for docs/gpu-status.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.gpu_e2e_seams import PHASES
from bench.gpu_targets import Target, figure

KIND = "gpu-e2e"
MIDDLE, MANY, FEW = 4096, 64, 0.074
RowOf = Mapping[tuple[Any, ...], Mapping[str, Any]]
Look = Callable[[RowOf, Mapping[str, Any]], float]


def key(
    kind: str,
    contender: str,
    tokens: int,
    batch: int = 1,
    ratio: float | None = None,
    by: str = "cap",
    how: str = "",
) -> tuple[Any, ...]:
    return kind, contender, tokens, batch, ratio, by, how


def _asked(ratio: float | None, contender: str = "runtime") -> tuple[Any, ...]:
    return key("request", contender, MIDDLE, 1, ratio)


def decoder_seconds(row: Mapping[str, Any]) -> float:
    """From the vision tower's end to the first token."""
    return float(sum(row["phases"].get(phase, 0.0) for phase in ("before", "select", "after")))


def decoder_share(row: Mapping[str, Any], ceilings: Mapping[str, Any]) -> float:
    """Of the measured product, that the decoder's prefill reaches; per cent."""
    work = sum(row["flop"].get(phase, 0.0) for phase in ("before", "select", "after"))
    return 100 * float(work / decoder_seconds(row) / ceilings["gemm_flop_s"]["bf16"])


def step_share(row: Mapping[str, Any], ceilings: Mapping[str, Any]) -> float:
    return 100 * float(row["step_bytes"] / row["step_s"] / ceilings["copy_bytes_s"])


def _room(how: str = "") -> Look:
    def look(rows: RowOf, _: Mapping[str, Any]) -> float:
        few, all_ = (rows[key("room", "runtime", MIDDLE, 1, ratio, "cap", how)] for ratio in (FEW, None))
        return float(few["peak_gib"] / all_["peak_gib"])

    return look


def _over(row: tuple[Any, ...], other: tuple[Any, ...], what: Callable[[Mapping[str, Any]], float]) -> Look:
    return lambda rows, _: what(rows[row]) / what(rows[other])


def _many(ratio: float | None) -> tuple[Any, ...]:
    return key("batch", "runtime", MIDDLE, MANY, ratio)


TARGETS: tuple[Target, ...] = (
    Target("first token, over the transcription of the original", 3, True, "x",
           _over(_asked(FEW, "original"), _asked(FEW), lambda r: r["first_s"])),
    Target("decoder's prefill, over the same unpruned", 1.45, True, "x",
           _over(_asked(None), _asked(FEW), decoder_seconds)),
    Target("decoder's prefill, unpruned, of the measured product", 70, True, "%",
           lambda rows, c: decoder_share(rows[_asked(None)], c)),
    Target("decoder's prefill, pruned, of the measured product", 70, True, "%",
           lambda rows, c: decoder_share(rows[_asked(FEW)], c)),
    Target("decoding, pruned, of copy bandwidth", 85, True, "%",
           lambda rows, c: step_share(rows[_asked(FEW)], c)),
    Target("decoding, 64 rows, pruned, of copy bandwidth", 85, True, "%",
           lambda rows, c: step_share(rows[_many(FEW)], c)),
    Target("decoding, 64 rows, unpruned, of copy bandwidth", 85, True, "%",
           lambda rows, c: step_share(rows[_many(None)], c)),
    Target("tokens a second, 64 rows, over the same unpruned", 1.8, True, "x",
           _over(_many(FEW), _many(None), lambda r: r["tokens_s"])),
    Target("sequences in the same memory, 32 new tokens each", 10, True, "x",
           _over(key("room", "runtime", MIDDLE), key("room", "runtime", MIDDLE, 1, FEW), lambda r: r["kv_bytes"])),
    Target("peak memory of the prefill, over the same unpruned", 1, False, "x", _room()),
    Target("peak memory of the prefill, four pictures, over the same unpruned", 1, False, "x", _room("pictures")),
)  # fmt: skip
"""7.4 % of 4096 visual tokens kept, where nothing else is said."""


def check(
    rows: Sequence[Mapping[str, Any]], ceilings: Mapping[str, Any], middle: int = MIDDLE, many: int = MANY
) -> list[dict[str, Any]]:
    """asked, measured and met of every target; measured None where the run has no figure.

    middle, many: tokens and rows that stand for `MIDDLE` and `MANY`, in a rehearsal.
    """
    tokens, batches = {middle: MIDDLE}, {many: MANY}
    by_key: dict[tuple[Any, ...], Mapping[str, Any]] = {
        key(
            r["kind"],
            r["contender"],
            tokens.get(r["tokens"], r["tokens"]),
            batches.get(r["batch"], r["batch"]),
            r["ratio"],
            r["by"],
            r["how"],
        ): r
        for r in rows
        if done(r)
    }
    return [target.judged(by_key, ceilings) for target in TARGETS]


def done(row: Mapping[str, Any]) -> bool:
    return not row.get("fault") and not row.get("skipped")


def line(row: Mapping[str, Any], ceilings: Mapping[str, Any]) -> str:
    """A row in one line, for the terminal."""
    if not done(row):
        return (
            f"{row['name']}: {'FAILED ' + row['fault'] if row.get('fault') else 'skipped: ' + row['skipped']}"
        )
    said = [row["name"] + ":"]
    if "first_s" in row:
        split = ", ".join(
            f"{phase} {1e3 * row['phases'][phase]:.1f}" for phase in PHASES if phase in row["phases"]
        )
        said.append(f"first token {1e3 * row['first_s']:.1f} ms ({split});")
    if "step_s" in row:
        said.append(f"{1e3 * row['step_s']:.2f} ms a step, {row['tokens_s']:.0f} tokens/s")
        if ceilings.get("copy_bytes_s"):
            said.append(f"({step_share(row, ceilings):.0f} % of copying),")
    if "peak_gib" in row:
        said.append(f"peak {row['peak_gib']:.2f} GiB")
    if "kv_bytes" in row:
        said.append(f"{row['rows']} rows of keys and values, {row['kv_bytes'] / 2**20:.1f} MiB")
    if row["kind"] in ("check", "start"):
        known = ("kind", "name", "contender", "tokens", "batch", "ratio", "by", "how", "number", "took_s")
        said.append("ok " + json.dumps({k: v for k, v in row.items() if k not in known}))
    return " ".join([*said, *(f"[{note}]" for note in row.get("notes", ()))])


def section(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of docs/gpu-status.md: targets, the figures of the last run, and what it left undone."""
    lines = [
        "## Whole requests",
        "",
        "Qwen2.5-VL-7B's shapes with random weights in bf16 on an H200; 7.4 % of 4096 visual tokens kept where nothing else is said.",
        "The original is a transcription of its path in eager PyTorch (`bench/original_path.py`, held against its recorded runs), its",
        "vision tower with torch's FlashAttention-2.",
        "",
        "| target | asked | measured | met | run |",
        "| --- | ---: | ---: | --- | --- |",
    ]
    last: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {}
    for report in reports:
        for target in report.get("targets") or []:
            if target["measured"] is not None:
                last[target["name"]] = target, report
    for wanted in TARGETS:
        cells = ["not measured", "", ""]
        if wanted.name in last:
            found, report = last[wanted.name]
            cells = [figure(found), "yes" if wanted.met(found["measured"]) else "no", f"`{report['file']}`"]
        lines.append(f"| {wanted.name} | {wanted.asked} | {' | '.join(cells)} |")
    lines.append("")
    if not reports:
        return [*lines, *UNDONE, ""]
    whole = [report for report in reports if not report.get("quick") and not report.get("only")]
    report = (whole or reports)[-1]
    rows, ceilings = report.get("rows") or [], report.get("ceilings") or {}
    lines += [
        f"The last run, `bench/results/{report['file']}`, {report['facts']['device']}, torch {report['facts'].get('torch')}:",
        "",
    ]
    checks = [row for row in rows if row["kind"] == "check"]
    lines += [
        f"- check {row['name']}: {'passed' if done(row) else row.get('fault') or row.get('skipped')}"
        for row in checks
    ]
    lines += ["", *_table([row for row in rows if done(row) and "step_s" in row], ceilings), ""]
    left = [row for row in rows if not done(row) and row["kind"] != "check"]
    if left:
        lines += ["Without figures:", "", *(f"- {line(row, ceilings)}" for row in left), ""]
    return lines


def _table(rows: Sequence[Mapping[str, Any]], ceilings: Mapping[str, Any]) -> list[str]:
    head = (
        "row",
        "kept",
        "first token, ms",
        *(f"{phase}, ms" for phase in PHASES),
        "ms a step",
        "tokens/s",
        "of copying",
        "peak, GiB",
    )
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for row in rows:
        phases = row.get("phases", {})
        split = [f"{1e3 * phases[phase]:.1f}" if phase in phases else "" for phase in PHASES]
        first = f"{1e3 * row['first_s']:.1f}" if "first_s" in row else ""
        share = f"{step_share(row, ceilings):.0f} %" if ceilings.get("copy_bytes_s") else ""
        cells = [
            row["name"], str(row["kept"]), first, *split, f"{1e3 * row['step_s']:.2f}", f"{row['tokens_s']:.0f}", share,
            f"{row['peak_gib']:.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


UNDONE = """Nothing of this has run on a GPU yet. `make gpu-e2e` (under nine minutes, behind `make gpu-check`) does it all, and writes each
row to `bench/results/<gpu>-e2e-<date>.json` as soon as it is there:

- checks first: prefill and whole requests with torch's synchronisations as errors; answers of captured graphs against single launches
  token for token; graphs captured by short requests serving long ones; the same choice as the transcription from the same scores, the
  same answers as transformers and the transcription in fp32;
- the first token of pictures of 1024, 4096 and 16384 visual tokens, unpruned, at 7.4 % and 22 %, split into preprocessing, vision tower,
  layers up to K, predictor with selection and copies, and the rest, for the runtime, transformers and the transcription;
- decoding of 1 to 64 rows against the measured copy bandwidth; peak memory, also of several pictures; warm-up; a threshold without a cap;
  transformers with a static cache and compiled decoding.""".splitlines()

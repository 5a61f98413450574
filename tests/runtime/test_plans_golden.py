# SPDX-License-Identifier: Apache-2.0
"""Every recorded case of other methods, through the scorer, the selection and the merging of its plan.

Of originals on LLaVA, what is theirs alone is left out: class tokens, newlines, the order of tiles.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from glimpse_kernels import received_attention
from glimpse_runtime import plans
from glimpse_runtime.packing import PackedBatch
from glimpse_runtime.plan import Stage
from glimpse_runtime.restriction import Restriction, renumbered, restricted
from glimpse_runtime.stages.selection import Chosen
from glimpse_runtime.stages.views import StageView, VisionView
from glimpse_runtime.taps import Received

from .stage_views import batch_of, row_view, run_stage, vision_view

METHODS = Path(__file__).parents[1] / "golden" / "methods"
MANIFEST: dict[str, Any] = json.loads((METHODS / "manifest.json").read_text())
SEEN: set[str] = set()


def cases(method: str) -> pytest.MarkDecorator:
    """The recorded cases of a method."""
    names = sorted(name for name, case in MANIFEST.items() if case["method"] == method)
    SEEN.update(names)
    return pytest.mark.parametrize("name", names)


def load(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(METHODS / f"{name}.safetensors"), MANIFEST[name]["params"]


def exactly(count: int, of: int) -> float:
    """A share that comes to `count` whether it is rounded down or to the nearest."""
    return min(1.0, (count + 0.25) / of)


def square(tokens: int) -> tuple[int, int]:
    side = round(tokens**0.5)
    return (side, side) if side * side == tokens else (1, tokens)


def pictures(count: int, tokens: int) -> PackedBatch:
    """A prompt with so many pictures."""
    return batch_of([[2, *[square(tokens)] * count, 3]])


def close(found: Tensor | None, wanted: Tensor, tolerance: float = 1e-4) -> None:
    assert found is not None and found.shape == wanted.shape
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def kept(chosen: Chosen) -> list[int]:
    return chosen.selection.keep.nonzero()[:, 0].tolist()


def dropped(view: StageView, stage: Stage, chosen: Chosen) -> Restriction:
    """The batch behind a stage; how many stay was known beforehand."""
    left = stage.select.most(view.batch)
    assert sum(left) == int(chosen.selection.keep.sum())
    return restricted(view.batch, chosen.selection, left, probes=False)


def test_all_are_here() -> None:
    """Each recorded file belongs to a test below."""
    files = {path.stem for path in METHODS.glob("*.safetensors")}
    assert len(files) == 33 and files == set(MANIFEST) == SEEN


# -- before the decoder ----------------------------------------------------------------------------------------


@cases("vispruner")
def test_vispruner(name: str) -> None:
    data, params = load(name)
    features, attention = data["in.features"], data["in.cls_attn"].mean(1)
    ratio = exactly(params["T"], params["N"])
    plan = plans.fastervlm(ratio) if params["r"] == 1 else plans.vispruner(ratio, params["r"])
    view = vision_view(
        pictures(params["B"], params["N"]),
        features.flatten(0, 1),
        received={Received(-1): attention.flatten()},
    )
    scores, chosen = run_stage(plan.stages[0], view)
    assert torch.equal(chosen.selection.keep, data["out.kept_mask"].flatten())
    assert scores is not None and torch.equal(scores, attention.flatten())


@cases("gprune")
def test_gprune(name: str) -> None:
    data, params = load(name)
    half = params["dtype"] != "float32"
    degree = "float16" if params["dtype"] == "float16" else "edges"
    plan = plans.gprune(
        params["keep"],
        threshold=params["tau"],
        temperature=params["temperature"],
        steps=params["iterations"],
        degree=degree,
    )
    batch = batch_of([[4, (24, 24), 1, (params["rows"], params["cols"]), 5]])
    view = vision_view(batch, torch.cat([data["in.X1"], data["in.X2"]]))
    scores, chosen = run_stage(plan.stages[0], view)
    assert scores is not None
    for which, p in zip("12", batch.pictures, strict=True):
        wanted = data[f"out.score{which}"]
        close(scores[p.start : p.stop], wanted, 2e-2 if half else 1e-4)
        found = set(chosen.selection.keep[p.start : p.stop].nonzero()[:, 0].tolist())
        theirs = set(data[f"out.kept{which}"].tolist())
        assert len(found) == len(theirs)
        cut = float(wanted[sorted(theirs)].min())
        ulps = {"float32": 0.0, "float16": 2.0**-10, "bfloat16": 2.0**-7}[params["dtype"]]
        assert all(abs(float(wanted[i]) - cut) <= 2 * ulps * cut for i in found ^ theirs)


@cases("visionzip")
def test_visionzip_on_llava(name: str) -> None:
    """Without the class token, which is the first dominant one there."""
    data, params = load(name)
    hidden, metric = (data[f"in.{part}"][:, 1:] for part in ("hidden", "metric"))
    tokens, first, second = params["N"], params["dominant_with_cls"] - 1, params["contextual"]
    plan = plans.visionzip(exactly(first, tokens), exactly(second, tokens))
    view = vision_view(
        pictures(params["B"], tokens),
        hidden.flatten(0, 1),
        received={Received(-1): data["in.cls_attn"].sum(1).flatten()},
        keys={-1: metric.flatten(0, 1)},
    )
    scores, chosen = run_stage(plan.stages[0], view)
    close(scores, data["out.score"].flatten())
    merge = plan.stages[0].merge
    assert merge is not None
    merged = merge.merged(view, chosen)
    for number, p in enumerate(view.pictures):
        keep = chosen.selection.keep[p.start : p.stop]
        dominant = data["out.dominant_indices_sorted"][number, 1:] - 1
        rest = torch.ones(tokens, dtype=torch.bool).index_fill(0, dominant, False).nonzero()[:, 0]
        contextual = rest[data["out.contextual_targets"]]
        assert keep.nonzero()[:, 0].tolist() == sorted([*dominant.tolist(), *contextual.tolist()])
        own = merged[p.start : p.stop]
        close(torch.cat([own[dominant], own[contextual]]), data["out.tokens"][number, 1:])


@cases("divprune")
def test_divprune(name: str) -> None:
    data, params = load(name)
    view = vision_view(batch_of([[3, (params["n"] // 4, 4), 2]]), data["in.features"])
    scores, chosen = run_stage(plans.divprune(params["ratio"]).stages[0], view)
    assert scores is None and kept(chosen) == data["out.kept_indices"].tolist()


@cases("cdpruner")
def test_cdpruner(name: str) -> None:
    """Relevance in CLIP's space, where it has the sign of what is unlike, and diversity in the decoder's."""
    data, params = load(name)
    batch = batch_of([[*[square(params["N"])] * params["B"], params["M"]]])
    (stage,) = plans.cdpruner(exactly(params["T"], params["N"]), sign="minus", over="prompt").stages
    words = data["in.text_embeds"]
    scores, _ = run_stage(
        stage,
        vision_view(
            batch, data["in.image_embeds"].flatten(0, 1), text=lambda ids: words.index_select(0, ids)
        ),
    )
    close(scores, data["out.relevance"].flatten())
    chosen = stage.select.choose(vision_view(batch, data["in.projected_features"].flatten(0, 1)), scores)
    assert torch.equal(chosen.selection.keep, data["out.kept_mask"].flatten())


@cases("vscan_stage1")
def test_vscan_on_llava(name: str) -> None:
    data, params = load(name)
    plan = plans.vscan(exactly(params["T"], params["N"]), window=params["window"], windows="down")
    shallow, deep = (data[f"in.cls_attn_{which}"].mean(1).flatten() for which in ("shallow", "deep"))
    view = vision_view(
        pictures(params["B"], params["N"]),
        data["in.projected_features"].flatten(0, 1),
        received={Received("first_full", 2): shallow, Received(-1, 2): deep},
    )
    _check_scan(plan.stages[0], view, data)


def _check_scan(stage: Stage, view: VisionView, data: dict[str, Tensor]) -> Restriction:
    _, chosen = run_stage(stage, view)
    assert torch.equal(chosen.selection.keep, data["out.kept_mask"].flatten())
    assert stage.merge is not None
    merged = stage.merge.merged(view, chosen)[chosen.selection.keep]
    close(merged, data["out.tokens"].flatten(0, -2))
    return dropped(view, stage, chosen)


def _from_tower(data: dict[str, Tensor], which: str, *, again: bool = False) -> tuple[Tensor, Tensor]:
    """What tokens receive in a recorded block, and the mean over heads and patches of their keys, in raster order."""
    q, k = data[f"in.{which}q_rot"], data[f"in.{which}k_rot"]
    if again:
        cos, sin = data["in.cos"][:, None], data["in.sin"][:, None]
        q, k = (x * cos + torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1) * sin for x in (q, k))
    lse = torch.logsumexp(torch.einsum("ihd,jhd->ihj", q, k) * q.shape[2] ** -0.5, -1)
    cu, order = torch.tensor([0, len(q)], dtype=torch.int32), data["in.window_index"]
    pooled = k.unflatten(0, (-1, 4)).mean((1, 2))
    return (
        received_attention(q, k, lse, cu, cu, group=4, order=order.int()),
        torch.empty_like(pooled).index_copy_(0, order, pooled),
    )


def _prompt(data: dict[str, Tensor], params: dict[str, Any]) -> PackedBatch:
    """The prompt of a case on Qwen2.5-VL."""
    grid = (params["grid_h_patches"] // 2, params["grid_w_patches"] // 2)
    start, rows = params["image_start"], data["in.position_ids"].shape[1]
    return batch_of([[start, grid, rows - start - grid[0] * grid[1]]], data["in.position_ids"])


@cases("visionzip_qwen")
def test_visionzip(name: str) -> None:
    data, params = load(name)
    plan = plans.visionzip(params["dominant_ratio"], params["contextual_ratio"])
    (stage,) = plan.stages
    received, metric = _from_tower(data, "")
    close(metric, data["out.metric"])
    view = vision_view(
        _prompt(data, params),
        data["in.merged_embeds"],
        received={Received(-1): received},
        keys={-1: metric},
    )
    scores, chosen = run_stage(stage, view)
    close(scores, data["out.score"])
    small = _check_scan(stage, view, data)
    assert chosen.targets is not None
    assert chosen.targets.nonzero()[:, 0].tolist() == data["out.contextual_indices"].tolist()
    assert torch.equal(small.batch.positions, data["out.position_ids_after"])
    assert small.rows.tolist() == data["out.kept_seq_mask"].nonzero()[:, 0].tolist()


@cases("vscan_qwen")
def test_vscan(name: str) -> None:
    """Both scans with merging, and then the decoder's stages on what they left."""
    data, params = load(name)
    twice = params["double_rotation"]
    plan = plans.vscan(
        params["ratio"],
        tuple(params["stage_ratios"]),
        tuple(params["stage_layers"]),
        rotations=1 + twice,
    )
    if twice:  # the other case is recorded from its scores on
        local, everywhere = (_from_tower(data, f"{which}_", again=True)[0] for which in ("local", "global"))
        patches = 4 * len(local)
        close(local * params["vit_heads"] / patches, data["out.score_local"])
        close(everywhere * params["vit_heads"] / patches, data["out.score_global"])
    else:
        local, everywhere = data["out.score_local"], data["out.score_global"]
    view = vision_view(
        _prompt(data, params),
        data["in.merged_embeds"],
        received={Received("first_full", 1 + twice): local, Received(-1, 1 + twice): everywhere},
    )
    small = _check_scan(plan.stages[0], view, data)
    assert torch.equal(small.batch.positions, data["out.position_ids_after_stage1"])
    _check_stages(plan.stages[1:], small.batch, data, params["llm_head_dim"])


# -- in the decoder --------------------------------------------------------------------------------------------


def _weights(data: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    names = ("norm_weight", "q_weight", "k_weight", "q_bias", "k_bias")
    return {name: data[f"in.{prefix}{name}"] for name in names if f"in.{prefix}{name}" in data}


def _check_stages(
    stages: tuple[Stage, ...], batch: PackedBatch, data: dict[str, Tensor], head_dim: int
) -> None:
    """One stage after the other, each on the hidden states that were recorded for it, or on the rows that the one before left."""
    hidden = data.get("in.hidden")
    for number, stage in enumerate(stages):
        own = data.get(f"in.stage{number}_hidden", hidden)
        assert own is not None
        view = row_view(batch, own, _weights(data, f"stage{number}_"), head_dim=head_dim)
        scores, chosen = run_stage(stage, view)
        close(scores, data[f"out.stage{number}_score"])
        assert kept(chosen) == data[f"out.stage{number}_kept_of_current"].tolist()
        small = dropped(view, stage, chosen)
        hidden, batch = own[small.rows.long()], small.batch
        if stage.positions == "renumber":
            batch = replace(batch, positions=renumbered(batch.cu_seqlens, batch.num_rows))
        wanted = data[f"out.stage{number}_position_ids"]
        assert torch.equal(batch.positions, wanted.expand(3, -1))


@cases("pdrop")
def test_pyramiddrop(name: str) -> None:
    data, params = load(name)
    ratios = tuple(params["ratios"][1:])
    plan = plans.pyramiddrop(ratios, tuple(range(1, 1 + len(ratios))))
    prompt = [params["image_start"], square(params["n"]), params["text_after"]]
    _check_stages(plan.stages, batch_of([prompt], data["in.position_ids"]), data, params["head_dim"])


@cases("vscan_stage2")
def test_vscan_in_the_decoder_on_llava(name: str) -> None:
    """There it is PyramidDrop with numbers of tokens for its shares."""
    data, params = load(name)
    all_tokens, count = params["counts"]
    plan = plans.pyramiddrop((exactly(count, all_tokens),), (0.5,))
    prompt = [params["image_start"], (8, 12), params["text_after"]]
    _check_stages(plan.stages, batch_of([prompt], data["in.position_ids"]), data, params["head_dim"])


@cases("pdrop_qwen")
def test_pyramiddrop_on_qwen(name: str) -> None:
    data, params = load(name)
    plan = plans.pyramiddrop(
        tuple(params["stage_ratios"]),
        tuple(params["stage_layers"]),
        rotary=False,
        of="current",
        positions="keep",
    )
    start, rows = params["image_start"], data["in.position_ids"].shape[1]
    prompt = [start, (8, 12), rows - start - params["n"]]
    _check_stages(plan.stages, batch_of([prompt], data["in.position_ids"]), data, params["llm_head_dim"])


@cases("fastv")
def test_fastv(name: str) -> None:
    data, params = load(name)
    (stage,) = plans.fastv(params["K"], 1 - params["r"]).stages
    assert stage.at.index == params["K"] - 1
    prompt = [params["image_start"], square(params["n"]), params["text_after"]]
    batch = batch_of([prompt], data["in.position_ids"])
    view = row_view(batch, data["in.hidden"], _weights(data, ""), head_dim=params["head_dim"])
    scores, chosen = run_stage(stage, view)
    close(scores, data["out.score"])
    assert kept(chosen) == data["out.kept_indices"].tolist()
    small = dropped(view, stage, chosen)
    assert torch.equal(small.batch.positions[0], data["out.position_ids_after"])
    assert torch.equal(data["in.hidden_out"][small.rows.long()], data["out.hidden_after"])


@cases("sparsevlm")
def test_sparsevlm(name: str) -> None:
    """Version 1 is the same without correction, with all heads; its merging is not ours, so each stage begins from what it left."""
    data, params = load(name)
    second = params["version"] == "2_0"
    plan = plans.sparsevlm(
        tuple(count / params["n"] for count in params["counts"]),
        tuple(params["layers"]),
        heads=14 if second else None,
        corrected=second,
    )
    start, after = params["image_start"], params["text_after"]
    batch = batch_of([[start, square(params["n"]), after]])
    words = torch.cat([torch.randn(start, params["heads"] * params["head_dim"]), data["in.text_embeds"]])
    prepared = plan.stages[0].score.prepare(
        vision_view(batch, data["in.visual_embeds"], text=lambda ids: words.index_select(0, ids))
    )
    assert prepared[0].nonzero()[:, 0].tolist() == [start + rater for rater in data["out.raters"].tolist()]
    for number, stage in enumerate(plan.stages):
        positions = data[f"in.stage{number}_position_ids"]
        if not second:
            now = len(positions) - start - after
            batch = batch_of([[start, square(now), after]], positions)
            most = replace(stage.select.share, ratio=exactly(params["counts"][number], now))
            stage = replace(stage, select=replace(stage.select, share=most))
        assert torch.equal(batch.positions[0], positions)
        view = row_view(
            batch,
            data[f"in.stage{number}_hidden"],
            _weights(data, f"stage{number}_"),
            head_dim=params["head_dim"],
            prepared=prepared,
        )
        scores, chosen = run_stage(stage, view)
        close(scores, data[f"out.stage{number}_score"], 1e-3 if second else 1e-4)
        assert kept(chosen) == data[f"out.stage{number}_kept_of_current"].tolist()
        small = dropped(view, stage, chosen)
        batch = small.batch
        if second:
            assert torch.equal(batch.positions[0], data[f"out.stage{number}_position_ids_after"])

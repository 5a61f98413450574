# SPDX-License-Identifier: Apache-2.0
"""vip against recorded runs of the original, and against its formula written with torch's own modules."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glimpse_kernels import VipWeights, vip, vip_conditions, vip_rotary
from glimpse_kernels.vip.naive import vip as naive_vip
from glimpse_kernels.vip.naive import vip_conditions as naive_conditions
from tests.kernels.kernel_cases import Case, op_cases

all_cases = pytest.mark.parametrize(
    "kernel", [c for c in op_cases("vip") if c.id.endswith("float32")], indirect=True
)


GOLDEN = Path(__file__).parents[1] / "golden" / "glimpse"
CASES: dict[str, Any] = json.loads((GOLDEN / "manifest.json").read_text())["cases"]
PREDICTED = [n for n, c in CASES.items() if c["do_selection"] and not c["use_ref_masks"]]


def state_dict(folder: str) -> dict[str, Tensor]:
    return torch.load(GOLDEN / folder / "new_modules_gp.pt", weights_only=True)["attn_fuser"]


def grid_coordinates(grids: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    rows = [y for h, w in grids for y in range(h) for _ in range(w)]
    cols = [x for h, w in grids for _ in range(h) for x in range(w)]
    return torch.tensor(rows), torch.tensor(cols)


def run_case(case: dict[str, Any], dtype: torch.dtype) -> Tensor:
    setting = case["settings"]
    recorded, inputs = np.load(GOLDEN / case["file"]), np.load(GOLDEN / f"inputs_{case['input']}.npz")
    weights = VipWeights.from_state_dict(state_dict(case["gp_dir"]), setting).to(dtype)
    scores = torch.from_numpy(recorded["glimpse_attn"]).flatten(1)
    grids = [(h // 2, w // 2) for _, h, w in inputs["image_grid_thw"].tolist()]
    cu = torch.tensor(np.cumsum([0] + [h * w for h, w in grids]), dtype=torch.int32)
    if weights.kind == "dummy":
        return vip(scores, None, weights, cu)
    order = torch.arange(len(scores))
    if not setting["attn_fuse_global"]:
        order = torch.from_numpy(inputs["window_index"])
        cu = torch.from_numpy(inputs["cu_window_seqlens"] // 4).int()
    rows, cols = grid_coordinates(grids)
    cos, sin = vip_rotary(rows[order], cols[order], weights.qk_dim, weights.theta)
    taps = [
        torch.from_numpy(inputs[f"vis_hidden_{i}"]).to(dtype)[order]
        for i in setting["selected_visual_layers"]
    ]
    result = torch.full((len(scores),), torch.nan)
    result[order] = vip(scores[order], vip_conditions(taps, weights), weights, cu, cos, sin)
    return result


@all_cases
@pytest.mark.parametrize("name", PREDICTED)
def test_recorded_logits(kernel: Case, name: str) -> None:
    case = CASES[name]
    want = torch.from_numpy(np.load(GOLDEN / case["file"])["vip_logits"])
    if case["dtype"] == "bfloat16":
        got = run_case(case, torch.bfloat16)
        assert got.dtype == torch.float32
        assert (got - want).abs().max() < 0.15  # two correct runs in bfloat16 are this far apart
    else:
        assert (run_case(case, torch.float32) - want).abs().max() <= 1e-4


@all_cases
@pytest.mark.parametrize("name", ["single", "ratio_0111"])
def test_recorded_logits_of_llava(kernel: Case, name: str) -> None:
    """Six by six tokens of a CLIP tower; other tap layers, log-softmax scores."""
    folder = GOLDEN / "llava"
    recorded, config = (
        np.load(folder / f"case_{name}.npz"),
        json.loads((folder / "gp" / "config.json").read_text()),
    )
    weights = VipWeights.from_state_dict(state_dict("llava/gp"), config).to(torch.float32)
    rows, cols = grid_coordinates([(6, 6)])
    cos, sin = vip_rotary(rows, cols, weights.qk_dim, weights.theta)
    taps = [torch.from_numpy(recorded[f"vis_hidden_{i}"][0]) for i in config["selected_visual_layers"]]
    scores, cu = torch.from_numpy(recorded["glimpse_attn"][0]), torch.tensor([0, 36], dtype=torch.int32)
    got = vip(scores, vip_conditions(taps, weights), weights, cu, cos, sin)
    assert (got - torch.from_numpy(recorded["vip_logits"][0])).abs().max() <= 1e-4


def random_weights(
    *,
    heads: int = 2,
    width: int = 24,
    cond: int = 40,
    tap: int = 20,
    features: int = 6,
    layers: int = 3,
    kind: str = "v1",
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    g = torch.Generator().manual_seed(0)
    sd: dict[str, Tensor] = {}

    def linear(name: str, rows: int, cols: int, bias: bool = True) -> None:
        sd[f"{name}.weight"] = torch.randn(rows, cols, generator=g) / cols**0.5
        if bias:
            sd[f"{name}.bias"] = torch.randn(rows, generator=g) * 0.3

    cond = cond if kind == "v1" else 0
    linear("attn_in_proj", width, features)
    for i in range(layers):
        if kind == "v1":
            linear(f"cond_in_projs.{i}", cond, tap)
        for n in (1, 2):
            sd[f"layers.{i}.norm{n}.weight"] = torch.rand(width, generator=g) + 0.5
        linear(f"layers.{i}.attn.q_proj", width + cond, width + cond, bias=False)
        linear(f"layers.{i}.attn.k_proj", width + cond, width + cond, bias=False)
        linear(f"layers.{i}.attn.v_proj", width, width, bias=False)
        linear(f"layers.{i}.attn.o_proj", width, width, bias=False)
        linear(f"layers.{i}.mlp.gate_proj", 2 * width, width)
        linear(f"layers.{i}.mlp.up_proj", 2 * width, width)
        linear(f"layers.{i}.mlp.down_proj", width, 2 * width)
    linear(f"attn_out_projs.{layers - 1}", 1, width)
    config = {
        "attn_fuse_type": "AttnFuserV1" if kind == "v1" else "AttnFuserV2",
        "attn_fuse_num_heads": heads,
        "attn_fuse_hidden_act": "silu",
        "selected_visual_layers": list(range(layers)),
        "attn_fuse_size": width,
        "visual_cond_size": cond or 40,
    }
    return sd, config


def formula(
    sd: dict[str, Tensor],
    scores: Tensor,
    taps: list[Tensor],
    heads: int,
    cu: list[int],
    rows: Tensor,
    cols: Tensor,
) -> Tensor:
    """The predictor in double, one picture at a time, with scaled_dot_product_attention and complex rotations."""
    w = {k: v.double() for k, v in sd.items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    parts = []
    for a, b in zip(cu[:-1], cu[1:], strict=True):
        x = linear(scores[a:b].double(), "attn_in_proj")
        for i in range(sum(k.endswith("norm1.weight") for k in w)):
            p = f"layers.{i}"
            h = F.rms_norm(x, x.shape[-1:], w[f"{p}.norm1.weight"], 1e-6)
            hc = torch.cat((h, linear(taps[i][a:b].double(), f"cond_in_projs.{i}")), -1) if taps else h
            qk = []
            for name in ("q_proj", "k_proj"):
                y = linear(hc, f"{p}.attn.{name}").unflatten(-1, (heads, -1)).transpose(0, 1)
                half = y.shape[-1] // 2
                freq = 10000.0 ** (-torch.arange(0, half, 2).double() / half)
                angle = torch.cat((rows[a:b, None] * freq, cols[a:b, None] * freq), -1)
                z = torch.complex(y[..., :half], y[..., half:]) * torch.polar(torch.ones_like(angle), angle)
                qk.append(torch.cat((z.real, z.imag), -1))
            v = linear(h, f"{p}.attn.v_proj").unflatten(-1, (heads, -1)).transpose(0, 1)
            attended = (qk[0] @ qk[1].transpose(1, 2) / qk[0].shape[-1] ** 0.5).softmax(-1) @ v
            x = x + linear(attended.transpose(0, 1).flatten(1), f"{p}.attn.o_proj")
            h = F.rms_norm(x, x.shape[-1:], w[f"{p}.norm2.weight"], 1e-6)
            inner = F.silu(linear(h, f"{p}.mlp.gate_proj")) * linear(h, f"{p}.mlp.up_proj")
            x = x + linear(inner, f"{p}.mlp.down_proj")
        last = max(int(k.split(".")[1]) for k in w if k.startswith("attn_out_projs"))
        parts.append(linear(x, f"attn_out_projs.{last}")[:, 0])
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


@all_cases
@pytest.mark.parametrize("kind", ["v1", "v2"])
@pytest.mark.parametrize(
    "grids", [[], [(1, 1)], [(3, 5)], [(2, 7), (1, 1), (9, 8)], [(4, 4), (0, 0), (5, 3)]]
)
def test_formula(kernel: Case, kind: str, grids: list[tuple[int, int]]) -> None:
    sd, config = random_weights(kind=kind)
    weights = VipWeights.from_state_dict(sd, config)
    rows, cols = grid_coordinates(grids)
    rows, cols = rows.long(), cols.long()
    cu = [0, *np.cumsum([h * w for h, w in grids]).astype(int).tolist()]
    n = cu[-1]
    g = torch.Generator().manual_seed(1)
    scores = torch.randn(n, 6, generator=g)
    taps = [torch.randn(n, 20, generator=g) for _ in range(3)] if kind == "v1" else []
    cos, sin = vip_rotary(rows, cols, weights.qk_dim)
    for dtype in (torch.float32, torch.bfloat16):
        cast = weights.to(dtype)
        conditions = vip_conditions([t.to(dtype) for t in taps], cast)
        got = vip(scores, conditions or None, cast, torch.tensor(cu, dtype=torch.int32), cos, sin)
        want = formula(sd, scores, taps, 2, cu, rows, cols)
        assert got.dtype == torch.float32 and got.shape == (n,)
        if n:
            assert (got.double() - want).abs().max() <= (2e-5 if dtype == torch.float32 else 0.15)


@all_cases
def test_pictures_do_not_see_each_other(kernel: Case) -> None:
    sd, config = random_weights()
    weights = VipWeights.from_state_dict(sd, config)
    rows, cols = grid_coordinates([(3, 4), (5, 5)])
    g = torch.Generator().manual_seed(1)
    scores, taps = torch.randn(37, 6, generator=g), [torch.randn(37, 20, generator=g) for _ in range(3)]
    cos, sin = vip_rotary(rows, cols, weights.qk_dim)
    both = vip(
        scores, vip_conditions(taps, weights), weights, torch.tensor([0, 12, 37], dtype=torch.int32), cos, sin
    )
    for a, b in ((0, 12), (12, 37)):
        part = vip_conditions([t[a:b] for t in taps], weights)
        alone = vip(
            scores[a:b], part, weights, torch.tensor([0, b - a], dtype=torch.int32), cos[a:b], sin[a:b]
        )
        assert torch.allclose(both[a:b], alone, atol=1e-5)


@all_cases
def test_dummy_of_equal_scores_is_zero(kernel: Case) -> None:
    weights = VipWeights.from_state_dict({}, {"attn_fuse_type": "AttnFuserDummy"})
    got = vip(torch.ones(7, 4), None, weights, torch.tensor([0, 1, 7], dtype=torch.int32))
    assert torch.equal(got, torch.zeros(7))
    assert vip(torch.ones(0, 4), None, weights, torch.tensor([0], dtype=torch.int32)).shape == (0,)


def test_gradients_reach_weights_scores_and_taps() -> None:
    sd, config = random_weights(layers=2, width=8, cond=8, tap=4, features=3)
    leaves = {k: v.double().float().requires_grad_() for k, v in sd.items()}
    weights = VipWeights.from_state_dict(leaves, config)
    rows, cols = grid_coordinates([(2, 3), (2, 2)])
    g = torch.Generator().manual_seed(1)
    scores = torch.randn(10, 3, generator=g, requires_grad=True)
    taps = [torch.randn(10, 4, generator=g, requires_grad=True) for _ in range(2)]
    cu = [0, 6, 10]
    cos, sin = vip_rotary(rows, cols, weights.qk_dim)
    # the public function must notice that autograd is recording and take the definition
    bounds = torch.tensor(cu, dtype=torch.int32)
    vip(scores, vip_conditions(taps, weights), weights, bounds, cos, sin).square().sum().backward()
    twins = {k: v.detach().double().requires_grad_() for k, v in sd.items()}
    twin_scores = scores.detach().double().requires_grad_()
    twin_taps = [t.detach().double().requires_grad_() for t in taps]
    formula(twins, twin_scores, twin_taps, 2, cu, rows, cols).square().sum().backward()
    for got, want in [
        (scores, twin_scores),
        *zip(taps, twin_taps, strict=True),
        *((leaves[k], twins[k]) for k in sd),
    ]:
        assert got.grad is not None and want.grad is not None
        assert torch.allclose(
            got.grad.double(), want.grad, rtol=1e-3, atol=1e-3 * want.grad.abs().max().item()
        )


def test_missing_and_left_over_keys() -> None:
    sd, config = random_weights()
    VipWeights.from_state_dict(sd, config)
    lacking = {k: v for k, v in sd.items() if k != "layers.1.attn.v_proj.weight"}
    with pytest.raises(ValueError, match=r"missing layers\.1\.attn\.v_proj\.weight"):
        VipWeights.from_state_dict(lacking, config)
    without_bias = {k: v for k, v in sd.items() if k != "layers.1.mlp.up_proj.bias"}
    with pytest.raises(ValueError, match=r"missing layers\.1\.mlp\.up_proj\.bias"):
        VipWeights.from_state_dict(without_bias, config)
    with pytest.raises(ValueError, match=r"left-over keys extra\.weight"):
        VipWeights.from_state_dict(sd | {"extra.weight": torch.zeros(1)}, config)
    with pytest.raises(ValueError, match=r"left-over keys layers\.3\.norm1\.weight"):
        VipWeights.from_state_dict(sd | {"layers.3.norm1.weight": torch.zeros(24)}, config)
    with pytest.raises(ValueError, match="left-over"):
        VipWeights.from_state_dict(sd, {"attn_fuse_type": "AttnFuserDummy"})
    with pytest.raises(ValueError, match=r"attn_fuse_type.*AttnFuserV9"):
        VipWeights.from_state_dict(sd, config | {"attn_fuse_type": "AttnFuserV9"})
    with pytest.raises(ValueError, match="attn_fuse_hidden_act"):
        VipWeights.from_state_dict(sd, config | {"attn_fuse_hidden_act": "gelu"})
    with pytest.raises(ValueError, match=r"expected 32 rows \(attn_fuse_size\), found 24"):
        VipWeights.from_state_dict(sd, config | {"attn_fuse_size": 32})
    with pytest.raises(
        ValueError, match=r"layers\.0\.attn\.k_proj.*expected shape \[64, 64\], found \[64, 24\]"
    ):
        VipWeights.from_state_dict(sd | {"layers.0.attn.k_proj.weight": torch.zeros(64, 24)}, config)
    with pytest.raises(ValueError, match="heads"):
        VipWeights.from_state_dict(sd, config | {"attn_fuse_num_heads": 5})


def test_tolerated_keys() -> None:
    sd, config = random_weights(kind="v2")
    unused = {"cond_in_projs.0.weight": torch.zeros(2, 2), "cond_in_projs.0.bias": torch.zeros(2)}
    VipWeights.from_state_dict(sd | unused, config)
    # deep supervision: the earlier outputs are there for training only, the last one is used
    deep = sd | {"attn_out_projs.0.weight": torch.zeros(1, 24), "attn_out_projs.0.bias": torch.zeros(1)}
    weights = VipWeights.from_state_dict(deep, config | {"deep_supervision": True})
    assert weights.out_proj is not None and torch.equal(
        weights.out_proj.weight, sd["attn_out_projs.2.weight"]
    )


def test_bad_arguments() -> None:
    sd, config = random_weights()
    weights = VipWeights.from_state_dict(sd, config)
    cu = torch.tensor([0, 4], dtype=torch.int32)
    scores, taps = torch.zeros(4, 6), [torch.zeros(4, 20)] * 3
    cos, sin = vip_rotary(torch.zeros(4), torch.zeros(4), weights.qk_dim)
    conditions = vip_conditions(taps, weights)
    with pytest.raises(ValueError, match="taps"):
        vip_conditions(taps[:2], weights)
    with pytest.raises(TypeError, match=r"taps\[0\]"):
        vip_conditions([t.bfloat16() for t in taps], weights)
    with pytest.raises(ValueError, match="conditions"):
        vip(scores, None, weights, cu, cos, sin)
    with pytest.raises(ValueError, match="scores"):
        vip(scores[:, :5], conditions, weights, cu, cos, sin)
    with pytest.raises(ValueError, match="cos"):
        vip(scores, conditions, weights, cu)
    with pytest.raises(ValueError, match="sin"):
        vip(scores, conditions, weights, cu, cos, sin[:3])


@all_cases
@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_published_shape_against_the_definition(kernel: Case, kind: str) -> None:
    """Width 256, condition 512, 4 heads of 192 and 64, as in the published modules."""
    sd, config = random_weights(heads=4, width=256, cond=512, tap=160, features=16, layers=2, kind=kind)
    weights = VipWeights.from_state_dict(sd, config)
    grids = [(9, 13), (6, 7)]
    rows, cols = grid_coordinates(grids)
    g = torch.Generator().manual_seed(1)
    n = rows.numel()
    scores, taps = torch.randn(n, 16, generator=g), [torch.randn(n, 160, generator=g) for _ in range(2)]
    cu = torch.tensor([0, 117, 159], dtype=torch.int32)
    cos, sin = vip_rotary(rows, cols, weights.qk_dim)
    conditions = vip_conditions(taps, weights)
    got = vip(scores, conditions or None, weights, cu, cos, sin)
    want = naive_vip(scores, naive_conditions(taps, weights) if kind == "v1" else None, weights, cu, cos, sin)
    assert torch.allclose(got, want, atol=2e-5)
    assert replace(weights, num_heads=2).qk_dim == 2 * weights.qk_dim

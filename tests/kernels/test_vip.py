# SPDX-License-Identifier: Apache-2.0
"""vip against recorded runs of the original, and against its formula written with torch's own modules."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glimpse_kernels import VipWeights, vip, vip_conditions, vip_rotary
from glimpse_kernels.vip import Linear
from tests.kernels.kernel_cases import Case, assert_as_good_as, op_cases

all_cases = pytest.mark.parametrize("kernel", op_cases("vip"), indirect=True)


def chosen_cases(wanted: Callable[[Case], bool]) -> list[Any]:
    """Those of the op's cases that `wanted` takes."""
    return [c for c in op_cases("vip") if wanted(c.values[0])]  # type: ignore[attr-defined]


exact_cases = pytest.mark.parametrize(
    "kernel", chosen_cases(lambda case: case.dtype is torch.float32), indirect=True
)
triton_cases = pytest.mark.parametrize(
    "kernel", chosen_cases(lambda case: case.backend == "triton"), indirect=True
)


@pytest.fixture(autouse=True)
def few_steps(request: pytest.FixtureRequest) -> Iterator[None]:
    """The interpreter pays by the operation, whatever its size: large tiles, but in `test_tiles`."""
    if "kernel" in request.fixturenames and request.getfixturevalue("kernel").interpreted:
        from glimpse_kernels.vip.triton_layer import MLP, PROJECT, MlpTile, ProjectTile

        with PROJECT.forced(ProjectTile(8, 2, 64, 128, 128)), MLP.forced(MlpTile(8, 1, 64, 128, 128)):
            yield
    else:
        yield


GOLDEN = Path(__file__).parents[1] / "golden" / "glimpse"
CASES: dict[str, Any] = json.loads((GOLDEN / "manifest.json").read_text())["cases"]
PREDICTED = [n for n, c in CASES.items() if c["do_selection"] and not c["use_ref_masks"]]
INTERPRETED = (
    "v1_two_images",
    "v1_wide_windowed",
    "v2_wide",
    "two_layers_le2",
    "logprob_wide",
    "dummy_two_images_thr",
    "bf16_square",
)
"""One of each kind: the others differ in what happens around the predictor, and the interpreter takes its time."""


def recorded_cases() -> list[Any]:
    """Every backend in fp32 against the fp32 runs of the original, in 16 bits against its bf16 run."""
    found = []
    for param in op_cases("vip"):
        case: Case = param.values[0]  # type: ignore[attr-defined]
        for name in INTERPRETED if case.interpreted else PREDICTED:
            if (CASES[name]["dtype"] == "bfloat16") == (case.dtype is not torch.float32):
                found.append(pytest.param(case, name, id=f"{name}-{case}", marks=param.marks))  # type: ignore[attr-defined]
    return found


def state_dict(folder: str) -> dict[str, Tensor]:
    return torch.load(GOLDEN / folder / "new_modules_gp.pt", weights_only=True, map_location="cpu")[
        "attn_fuser"
    ]


def grid_coordinates(grids: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    rows = [y for h, w in grids for y in range(h) for _ in range(w)]
    cols = [x for h, w in grids for _ in range(h) for x in range(w)]
    return torch.tensor(rows), torch.tensor(cols)


def run_case(case: dict[str, Any], kernel: Case) -> Tensor:
    setting, device = case["settings"], kernel.device
    recorded, inputs = np.load(GOLDEN / case["file"]), np.load(GOLDEN / f"inputs_{case['input']}.npz")
    weights = VipWeights.from_state_dict(state_dict(case["gp_dir"]), setting).to(device, kernel.dtype)
    scores = torch.from_numpy(recorded["glimpse_attn"]).flatten(1).to(device)
    grids = [(h // 2, w // 2) for _, h, w in inputs["image_grid_thw"].tolist()]
    cu = torch.tensor(np.cumsum([0] + [h * w for h, w in grids]).tolist(), dtype=torch.int32)
    if weights.kind == "dummy":
        return vip(scores, None, weights, cu)
    order = torch.arange(len(scores))
    if not setting["attn_fuse_global"]:
        order = torch.from_numpy(inputs["window_index"]).to(device)
        cu = torch.from_numpy(inputs["cu_window_seqlens"] // 4).int().to(device)
    rows, cols = grid_coordinates(grids)
    cos, sin = vip_rotary(rows[order], cols[order], weights.qk_dim, weights.theta)
    taps = [
        torch.from_numpy(inputs[f"vis_hidden_{i}"]).to(device, kernel.dtype)[order]
        for i in setting["selected_visual_layers"]
    ]
    result = torch.full((len(scores),), torch.nan)
    result[order] = vip(scores[order], vip_conditions(taps, weights), weights, cu, cos, sin)
    return result


@pytest.mark.parametrize(("kernel", "name"), recorded_cases(), indirect=["kernel"])
def test_recorded_logits(kernel: Case, name: str) -> None:
    case = CASES[name]
    want = torch.from_numpy(np.load(GOLDEN / case["file"])["vip_logits"]).to(kernel.device)
    got = run_case(case, kernel)
    assert got.dtype == torch.float32
    # two correct runs in bfloat16 are up to 0.15 apart
    assert (got - want).abs().max() <= (0.15 if case["dtype"] == "bfloat16" else 1e-4)


@exact_cases
@pytest.mark.parametrize("name", ["single", "ratio_0111"])
def test_recorded_logits_of_llava(kernel: Case, name: str) -> None:
    """Six by six tokens of a CLIP tower; other tap layers, log-softmax scores."""
    folder, device = GOLDEN / "llava", kernel.device
    recorded = np.load(folder / f"case_{name}.npz")
    config = json.loads((folder / "gp" / "config.json").read_text())
    weights = VipWeights.from_state_dict(state_dict("llava/gp"), config).to(device, torch.float32)
    rows, cols = grid_coordinates([(6, 6)])
    cos, sin = vip_rotary(rows, cols, weights.qk_dim, weights.theta)
    taps = [
        torch.from_numpy(recorded[f"vis_hidden_{i}"][0]).to(device) for i in config["selected_visual_layers"]
    ]
    scores = torch.from_numpy(recorded["glimpse_attn"][0]).to(device)
    cu = torch.tensor([0, 36], dtype=torch.int32)
    got = vip(scores, vip_conditions(taps, weights), weights, cu, cos, sin)
    assert (got - torch.from_numpy(recorded["vip_logits"][0]).to(device)).abs().max() <= 1e-4


def random_weights(
    *,
    heads: int = 2,
    width: int = 24,
    cond: int = 40,
    tap: int = 20,
    features: int = 6,
    layers: int = 3,
    kind: str = "v1",
    attention_bias: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    g = torch.Generator("cpu").manual_seed(0)
    sd: dict[str, Tensor] = {}

    def linear(name: str, rows: int, cols: int, bias: bool = True) -> None:
        sd[f"{name}.weight"] = torch.randn(rows, cols, generator=g, device="cpu") / cols**0.5
        if bias:
            sd[f"{name}.bias"] = torch.randn(rows, generator=g, device="cpu") * 0.3

    cond = cond if kind == "v1" else 0
    linear("attn_in_proj", width, features)
    for i in range(layers):
        if kind == "v1":
            linear(f"cond_in_projs.{i}", cond, tap)
        for n in (1, 2):
            sd[f"layers.{i}.norm{n}.weight"] = torch.rand(width, generator=g, device="cpu") + 0.5
        linear(f"layers.{i}.attn.q_proj", width + cond, width + cond, attention_bias)
        linear(f"layers.{i}.attn.k_proj", width + cond, width + cond, attention_bias)
        linear(f"layers.{i}.attn.v_proj", width, width, attention_bias)
        linear(f"layers.{i}.attn.o_proj", width, width, attention_bias)
        linear(f"layers.{i}.mlp.gate_proj", 2 * width, width)
        linear(f"layers.{i}.mlp.up_proj", 2 * width, width)
        linear(f"layers.{i}.mlp.down_proj", width, 2 * width)
    linear(f"attn_out_projs.{layers - 1}", 1, width)
    sd = {name: t.to(torch.get_default_device()) for name, t in sd.items()}
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
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The predictor in double (or another dtype), one picture at a time, with torch's own modules and complex rotations."""
    w = {k: v.to(dtype) for k, v in sd.items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    parts = []
    for a, b in zip(cu[:-1], cu[1:], strict=True):
        x = linear(scores[a:b].to(dtype), "attn_in_proj")
        for i in range(sum(k.endswith("norm1.weight") for k in w)):
            p = f"layers.{i}"
            h = F.rms_norm(x, x.shape[-1:], w[f"{p}.norm1.weight"], 1e-6)
            hc = torch.cat((h, linear(taps[i][a:b].to(dtype), f"cond_in_projs.{i}")), -1) if taps else h
            qk = []
            for name in ("q_proj", "k_proj"):
                y = linear(hc, f"{p}.attn.{name}").unflatten(-1, (heads, -1)).transpose(0, 1).double()
                half = y.shape[-1] // 2
                freq = 10000.0 ** (-torch.arange(0, half, 2).double() / half)
                angle = torch.cat((rows[a:b, None] * freq, cols[a:b, None] * freq), -1)
                z = torch.complex(y[..., :half], y[..., half:]) * torch.polar(torch.ones_like(angle), angle)
                qk.append(torch.cat((z.real, z.imag), -1).to(dtype))
            v = linear(h, f"{p}.attn.v_proj").unflatten(-1, (heads, -1)).transpose(0, 1)
            attended = (qk[0] @ qk[1].transpose(1, 2) / qk[0].shape[-1] ** 0.5).softmax(-1) @ v
            x = x + linear(attended.transpose(0, 1).flatten(1), f"{p}.attn.o_proj")
            h = F.rms_norm(x, x.shape[-1:], w[f"{p}.norm2.weight"], 1e-6)
            inner = F.silu(linear(h, f"{p}.mlp.gate_proj")) * linear(h, f"{p}.mlp.up_proj")
            x = x + linear(inner, f"{p}.mlp.down_proj")
        last = max(int(k.split(".")[1]) for k in w if k.startswith("attn_out_projs"))
        parts.append(linear(x, f"attn_out_projs.{last}")[:, 0])
    return torch.cat(parts) if parts else torch.zeros(0, dtype=dtype)


def without_biases(weights: VipWeights) -> VipWeights:
    def bare(x: Linear) -> Linear:
        return Linear(x.weight)

    layers = tuple(
        replace(x, **{name: bare(getattr(x, name)) for name in ("q", "k", "v", "o", "gate", "up", "down")})
        for x in weights.layers
    )
    assert weights.in_proj is not None and weights.out_proj is not None
    return replace(
        weights,
        in_proj=bare(weights.in_proj),
        cond_projs=tuple(bare(c) for c in weights.cond_projs),
        layers=layers,
        out_proj=bare(weights.out_proj),
    )


@dataclass(frozen=True)
class Example:
    """Random scores and taps on some pictures, in the dtype of a kernel, and how to judge what `vip` makes of them."""

    sd: dict[str, Tensor]
    weights: VipWeights
    scores: Tensor
    taps: list[Tensor]
    cu: list[int]
    rows: Tensor
    cols: Tensor

    @property
    def segments(self) -> Tensor:
        return torch.tensor(self.cu, dtype=torch.int32)

    @property
    def rotary(self) -> tuple[Tensor, Tensor]:
        return vip_rotary(self.rows, self.cols, self.weights.qk_dim)

    def found(self, plain: bool = False) -> Tensor:
        """`plain`: from the conditions alone, whatever else a backend has computed ahead."""
        conditions = vip_conditions(self.taps, self.weights) or None
        if plain:
            conditions = list(conditions or ())
        return vip(self.scores, conditions, self.weights, self.segments, *self.rotary)

    def expected(self, dtype: torch.dtype = torch.float64) -> Tensor:
        heads = self.weights.num_heads
        return formula(self.sd, self.scores, self.taps, heads, self.cu, self.rows, self.cols, dtype)


def example(
    dtype: torch.dtype | None, grids: list[tuple[int, int]], *, bare: bool = False, **sizes: Any
) -> Example:
    assert dtype is not None
    sd, config = random_weights(**sizes)
    sd = {name: t.to(dtype) for name, t in sd.items()}
    weights = VipWeights.from_state_dict(sd, config)
    if bare:
        weights, sd = without_biases(weights), {n: t for n, t in sd.items() if not n.endswith("bias")}
    rows, cols = grid_coordinates(grids)
    cu = [0, *np.cumsum([h * w for h, w in grids]).astype(int).tolist()]
    scores = torch.randn(cu[-1], weights.tensors()[0].shape[1])
    taps = [torch.randn(cu[-1], proj.weight.shape[1]).to(dtype) for proj in weights.cond_projs]
    return Example(sd, weights, scores, taps, cu, rows.long(), cols.long())


TOLERANCE = {torch.float32: 2e-5, torch.float16: 0.02, torch.bfloat16: 0.15}


def assert_close(kernel: Case, got: Tensor, want: Tensor) -> None:
    assert kernel.dtype is not None
    assert got.dtype == torch.float32 and got.shape == want.shape
    if len(want):
        assert (got.double() - want).abs().max() <= TOLERANCE[kernel.dtype]


@all_cases
@pytest.mark.parametrize("kind", ["v1", "v2"])
@pytest.mark.parametrize(
    "grids", [[], [(1, 1)], [(3, 5)], [(2, 7), (1, 1), (9, 8)], [(4, 4), (0, 0), (5, 3)]]
)
def test_formula(kernel: Case, kind: str, grids: list[tuple[int, int]]) -> None:
    this = example(kernel.dtype, grids, kind=kind, layers=2 if kernel.interpreted else 3)
    assert_close(kernel, this.found(), this.expected())


@triton_cases
def test_what_is_computed_ahead_and_what_is_not_agree(kernel: Case) -> None:
    this = example(kernel.dtype, [(3, 4)], layers=2, attention_bias=True)
    want = this.expected()
    assert_close(kernel, this.found(plain=True), want)
    conditions = vip_conditions(this.taps, this.weights)
    conditions[1] = vip_conditions(this.taps[::-1], this.weights)[1]
    got = vip(this.scores, conditions, this.weights, this.segments, *this.rotary)
    changed = replace(this, taps=[this.taps[0], this.taps[0]])
    assert_close(kernel, got, changed.expected())
    assert (changed.expected() - want).abs().max() > 0.05
    elsewhere = replace(this.weights, cond_projs=this.weights.cond_projs[::-1])
    conditions = vip_conditions(this.taps, this.weights)
    assert conditions.shares(0, this.weights) and not conditions.shares(0, elsewhere)  # type: ignore[attr-defined]


@all_cases
@pytest.mark.parametrize("bare", [False, True])
def test_biases(kernel: Case, bare: bool) -> None:
    """A bias wherever one can be, and none at all."""
    this = example(kernel.dtype, [(5, 4), (2, 3)], bare=bare, attention_bias=not bare, layers=2)
    assert_close(kernel, this.found(), this.expected())


@all_cases
@pytest.mark.parametrize(
    "sizes",
    [
        {"heads": 1, "width": 6, "cond": 2, "tap": 3, "features": 1, "layers": 1},
        {"heads": 5, "width": 35, "cond": 25, "tap": 7, "features": 33, "layers": 2},
        {"heads": 3, "width": 36, "cond": 72, "tap": 17, "features": 70, "layers": 1},
    ],
    ids=str,
)
def test_odd_sizes(kernel: Case, sizes: dict[str, int]) -> None:
    """Widths that no tile divides, an odd number of value columns, more scores a token than one tile takes."""
    this = example(kernel.dtype, [(3, 7), (6, 8)], **sizes)
    assert_close(kernel, this.found(), this.expected())


@all_cases
def test_strides(kernel: Case) -> None:
    """Scores, conditions and tables as they are found in wider tensors; scores transposed, where the backend takes it."""
    this = example(kernel.dtype, [(5, 4), (3, 3)], layers=1 if kernel.interpreted else 2)

    def wide(t: Tensor) -> Tensor:
        return torch.cat((torch.full_like(t, torch.nan), t, torch.full_like(t, torch.nan)), 1)[
            :, t.shape[1] : 2 * t.shape[1]
        ]

    cos, sin = map(wide, this.rotary)
    conditions = [wide(c) for c in vip_conditions(this.taps, this.weights)]
    given = [wide(this.scores), this.scores.to(this.weights.dtype)]
    if kernel.backend != "cpu":
        given.append(this.scores.T.contiguous().T)
    for scores in given:
        got = vip(scores, conditions, this.weights, this.segments, cos, sin)
        assert_close(kernel, got, this.expected())


@all_cases
def test_pictures_do_not_see_each_other(kernel: Case) -> None:
    this = example(kernel.dtype, [(3, 4), (5, 5)])
    both, (cos, sin) = this.found(), this.rotary
    for a, b in ((0, 12), (12, 37)):
        part = vip_conditions([t[a:b] for t in this.taps], this.weights)
        cu = torch.tensor([0, b - a], dtype=torch.int32)
        alone = vip(this.scores[a:b], part, this.weights, cu, cos[a:b], sin[a:b])
        assert (both[a:b] - alone).abs().max() <= TOLERANCE[both.dtype] * (
            1 if kernel.dtype is torch.float32 else 500
        )


@triton_cases
@pytest.mark.parametrize("plain", [False, True])
def test_rows_outside_the_segments_may_hold_anything(kernel: Case, plain: bool) -> None:
    """Capacities are larger than what is in them: the segments say what counts."""
    this = example(kernel.dtype, [(2, 3), (5, 9), (1, 70)], layers=2)
    want = this.found(plain)[6:51]
    cos, sin = this.rotary
    for t in (this.scores, *this.taps, cos, sin):
        t[:6], t[51:] = torch.nan, torch.nan
    conditions = vip_conditions(this.taps, this.weights)
    if plain:
        conditions = list(conditions)
    inside = torch.tensor([6, 51, 51], dtype=torch.int32)
    got = vip(this.scores, conditions, this.weights, inside, cos, sin)[6:51]
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)


@triton_cases
@pytest.mark.parametrize(
    ("capability", "project", "mlp"),
    [
        (90, None, None),
        (80, None, None),
        (90, (32, 128, 16), (64, 32, 16)),
        (90, (128, 16, 64), (16, 16, 64)),
    ],
    ids=str,
)
def test_tiles(
    kernel: Case, capability: int, project: tuple[int, ...] | None, mlp: tuple[int, ...] | None
) -> None:
    """The tiles of the table, and others: what `bench.tune` tries must be right too."""
    from glimpse_kernels._triton import Chip, force_chip
    from glimpse_kernels.vip.triton_layer import MLP, PROJECT, MlpTile, ProjectTile

    this = example(kernel.dtype, [(2, 3), (8, 8)], layers=2, width=20, heads=1, cond=12)
    with (
        PROJECT.forced(project and ProjectTile(4, 2, *project)),
        MLP.forced(mlp and MlpTile(4, 1, *mlp)),
        force_chip(Chip(capability, 3)),
    ):
        assert_close(kernel, this.found(), this.expected())


@exact_cases
@pytest.mark.parametrize("lengths", [[1], [5, 0, 1, 64, 65], [0], [130]], ids=str)
def test_dummy(kernel: Case, lengths: list[int]) -> None:
    weights = VipWeights.from_state_dict({}, {"attn_fuse_type": "AttnFuserDummy"})
    scores = 3 * torch.randn(sum(lengths), 37)
    cu = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)
    got = vip(scores, None, weights, cu)
    for part, mine in zip(scores.double().split(lengths), got.split(lengths), strict=True):
        if len(part):
            p = part.mean(-1).softmax(0)
            want = (p - p.min()) / (p.max() - p.min() + 1e-6)
            torch.testing.assert_close(mine.double(), want, rtol=1e-4, atol=1e-5)


@exact_cases
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
def test_published_shape(kernel: Case, kind: str) -> None:
    """Width 256, condition 512, 4 heads of 192 and 64, as in the published modules; no worse than torch in the same dtype."""
    sizes = {"heads": 4, "width": 256, "cond": 512, "tap": 160, "features": 16}
    sizes["layers"] = 1 if kernel.interpreted else 2
    grids = [(5, 9), (3, 7)] if kernel.interpreted else [(9, 13), (6, 7)]
    this = example(kernel.dtype, grids, kind=kind, **sizes)
    assert kernel.dtype is not None
    assert_as_good_as(this.found(), this.expected(kernel.dtype), this.expected())
    assert replace(this.weights, num_heads=2).qk_dim == 2 * this.weights.qk_dim


@all_cases
def test_conditions(kernel: Case) -> None:
    this = example(kernel.dtype, [(5, 9)], layers=2)
    for tap, proj, got in zip(
        this.taps, this.weights.cond_projs, vip_conditions(this.taps, this.weights), strict=True
    ):
        assert proj.bias is not None and got.dtype == kernel.dtype
        want = tap.double() @ proj.weight.double().T + proj.bias.double()
        assert_as_good_as(got, tap @ proj.weight.T + proj.bias, want)

# SPDX-License-Identifier: Apache-2.0
"""rope against complex multiplication in double, and against what Hugging Face's Qwen2.5-VL hands to its attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from glimpse_kernels import mrope_cos_sin, rope, vision_rotary
from tests.kernels.kernel_cases import Case, op_cases

all_cases = pytest.mark.parametrize("kernel", op_cases("rope"), indirect=True)
single = pytest.mark.parametrize(
    "kernel", [c for c in op_cases("rope") if c.id.endswith("float32")], indirect=True
)


def tables(t: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    angles = torch.rand(t, d // 2, generator=torch.Generator().manual_seed(seed)) * 60
    return angles.cos(), angles.sin()


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotation as multiplication of complex numbers, in double."""
    half = x.shape[-1] // 2
    z = torch.complex(x[..., :half].double(), x[..., half:].double())
    z = z * torch.complex(cos.double(), sin.double())[:, None]
    return torch.cat((z.real, z.imag), dim=-1)


def same_dtype(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Hugging Face's arithmetic, every step in the dtype of x."""
    c, s = (torch.cat((t, t), dim=-1).to(x.dtype)[:, None] for t in (cos, sin))
    half = x.shape[-1] // 2
    return x * c + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * s


def close(got: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    truth = exact(x, cos, sin)
    assert got.dtype == x.dtype and got.shape == x.shape and not got.isnan().any()
    if not x.numel():
        return
    noise = (same_dtype(x, cos, sin).double() - truth).abs().max()
    assert (got.double() - truth).abs().max() <= 2 * noise + 1e-7


@all_cases
@pytest.mark.parametrize("d", [2, 6, 32, 64, 80, 128, 192])
@pytest.mark.parametrize("t, hq, hkv", [(0, 2, 1), (1, 16, 2), (7, 3, 3), (33, 4, 1)])
def test_in_place(kernel: Case, d: int, t: int, hq: int, hkv: int) -> None:
    dtype = kernel.dtype
    q, k = random(t, hq, d, dtype=dtype), random(t, hkv, d, dtype=dtype, seed=1)
    cos, sin = tables(t, d)
    q_new, k_new = q.clone(), k.clone()
    rope(q_new, k_new, cos, sin)
    close(q_new, q, cos, sin)
    close(k_new, k, cos, sin)
    q_alone = q.clone()
    rope(q_alone, None, cos, sin)
    assert torch.equal(q_alone, q_new)


@all_cases
@pytest.mark.parametrize("d, dv", [(128, 128), (80, 80), (192, 64), (18, 7)])
def test_views_of_a_fused_buffer_into_slots(kernel: Case, d: int, dv: int) -> None:
    dtype = kernel.dtype
    t, hq, hkv, size = 21, 4, 2, 40
    fused = random(t, hq * d + hkv * d + hkv * dv + 5, dtype=dtype)
    before = fused.clone()

    def views(buffer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _ = buffer.split([hq * d, hkv * d, hkv * dv, 5], dim=-1)
        return q.unflatten(-1, (hq, d)), k.unflatten(-1, (hkv, d)), v.unflatten(-1, (hkv, dv))

    q, k, v = views(fused)
    q0, k0, v0 = views(before)
    cos, sin = tables(t, d)
    slots = torch.randperm(size, generator=torch.Generator().manual_seed(3))[:t].int()
    slots[4] = slots[20] = -1
    k_pool = torch.full((3, size, hkv, d), torch.nan, dtype=dtype)
    v_pool = torch.full((3, size, hkv, dv), torch.nan, dtype=dtype)
    rope(q, k, cos, sin, v=v, k_out=k_pool[1], v_out=v_pool[1], slots=slots)
    close(q, q0, cos, sin)
    assert torch.equal(fused[:, hq * d :], before[:, hq * d :])  # k, v and what follows stay as they were
    written = slots >= 0
    places = slots[written].long()
    close(k_pool[1, places], k0[written], cos[written], sin[written])
    assert torch.equal(v_pool[1, places], v0[written])
    untouched = [s for s in range(size) if s not in places.tolist()]
    for pool in (k_pool, v_pool):
        assert pool[0].isnan().all() and pool[2].isnan().all() and pool[1, untouched].isnan().all()


@all_cases
def test_without_slots(kernel: Case) -> None:
    dtype = kernel.dtype
    q, k, v = (random(5, h, 32, dtype=dtype, seed=h) for h in (4, 2, 2))
    cos, sin = tables(5, 32)
    # head-major caches
    k_out, v_out = (torch.full((2, 9, 32), torch.nan, dtype=dtype).transpose(0, 1) for _ in range(2))
    k0 = k.clone()
    rope(q, k, cos, sin, v=v, k_out=k_out, v_out=v_out)
    assert torch.equal(k, k0) and torch.equal(v_out[:5], v)
    close(k_out[:5], k, cos, sin)
    assert k_out[5:].isnan().all() and v_out[5:].isnan().all()
    rope(q, k, cos, sin, k_out=k_out[4:])
    close(k_out[4:], k, cos, sin)


@single
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    t=st.integers(0, 12), hq=st.integers(0, 3), hkv=st.integers(1, 3), half=st.integers(1, 40), data=st.data()
)
def test_slots(kernel: Case, t: int, hq: int, hkv: int, half: int, data: st.DataObject) -> None:
    d, size = 2 * half, t + 2
    q, k = random(t, hq, d, dtype=torch.float32), random(t, hkv, d, dtype=torch.float32, seed=1)
    cos, sin = tables(t, d)
    chosen = data.draw(st.permutations(range(size)))[:t]
    slots = torch.tensor([-1 if data.draw(st.booleans()) else s for s in chosen], dtype=torch.int32)
    out = torch.full((size, hkv, d), torch.nan)
    rope(q.clone(), k, cos, sin, k_out=out, slots=slots)
    truth = exact(k, cos, sin)
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            assert torch.allclose(out[slot].double(), truth[row], atol=2e-6)
    assert out.isnan().all(-1).all(-1).sum() == size - int((slots >= 0).sum())


def tiny() -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 64,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 48,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 64,
            "window_size": 112,
            "fullatt_block_indexes": [0],
        },
        image_token_id=30,
        video_token_id=29,
        vision_start_token_id=28,
        vision_end_token_id=27,
    )
    return Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Queries and keys [H, T, D] as they reach Hugging Face's attention, rotated."""
    calls: list[tuple[Tensor, Tensor]] = []
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def record(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append((query[0].detach(), key[0].detach()))
        return original(module, query, key, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", record)
    return calls


@single
def test_mrope_as_hugging_face(kernel: Case, recorded: list[tuple[Tensor, Tensor]]) -> None:
    text = tiny().model.language_model
    projected: dict[str, Tensor] = {}
    attention = text.layers[0].self_attn
    for name in ("q_proj", "k_proj"):
        hook = lambda m, i, o, name=name: projected.update({name: o[0].detach()})  # noqa: E731
        getattr(attention, name).register_forward_hook(hook)
    t = 13
    positions = torch.randint(0, 500, (3, 1, t), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        text(inputs_embeds=random(1, t, 64, dtype=torch.float32), position_ids=positions)
    inv_freq = 1.0 / (1e6 ** (torch.arange(0, 32, 2, dtype=torch.float32) / 32))
    cos, sin = mrope_cos_sin(positions[:, 0], inv_freq, (4, 6, 6))
    q, k = (projected[n].unflatten(-1, (-1, 32)).clone() for n in ("q_proj", "k_proj"))
    rope(q, k, cos, sin)
    (their_q, their_k), *_ = recorded
    assert torch.allclose(q.transpose(0, 1), their_q, atol=1e-5)
    assert torch.allclose(k.transpose(0, 1), their_k, atol=1e-5)


@single
def test_vision_rotary_as_hugging_face(kernel: Case, recorded: list[tuple[Tensor, Tensor]]) -> None:
    vision = tiny().model.visual
    seen: list[Tensor] = []
    vision.blocks[0].attn.qkv.register_forward_hook(lambda m, i, o: seen.append(o.detach()))
    height, width = 4, 6  # patches: smaller than one window, so that the tower does not reorder them
    with torch.no_grad():
        vision(random(height * width, 1176, dtype=torch.float32), grid_thw=torch.tensor([[1, height, width]]))
    # the processor's order: 2 x 2 groups, row by row
    rows, cols = [], []
    for group_row in range(height // 2):
        for group_col in range(width // 2):
            for y in range(2):
                for x in range(2):
                    rows.append(2 * group_row + y)
                    cols.append(2 * group_col + x)
    cos, sin = vision_rotary(torch.tensor(rows), torch.tensor(cols), 24)
    assert cos.shape == (24, 12) and cos.dtype == torch.float32
    q, k, _ = seen[0].view(-1, 3, 2, 24).unbind(1)
    q, k = q.clone(), k.clone()
    rope(q, k, cos, sin)
    (their_q, their_k), *_ = recorded
    assert torch.allclose(q.transpose(0, 1), their_q, atol=1e-5)
    assert torch.allclose(k.transpose(0, 1), their_k, atol=1e-5)


def test_equal_coordinates_make_plain_rotary() -> None:
    position = torch.arange(9)
    inv_freq = 10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float32) / 16)
    cos, sin = mrope_cos_sin(position.expand(3, -1), inv_freq, (2, 3, 3))
    angles = position[:, None].double() * inv_freq.double()
    assert torch.allclose(cos.double(), angles.cos(), atol=1e-6)
    assert torch.allclose(sin.double(), angles.sin(), atol=1e-6)


def test_bad_arguments() -> None:
    q, (cos, sin) = torch.zeros(3, 2, 8), tables(3, 8)
    with pytest.raises(ValueError, match="cos"):
        rope(q, None, cos[:2], sin)
    with pytest.raises(TypeError, match="sin"):
        rope(q, None, cos, sin.bfloat16())
    with pytest.raises(ValueError, match="even"):
        rope(torch.zeros(3, 2, 7), None, cos, sin)
    with pytest.raises(ValueError, match="k_out"):
        rope(q, q.clone(), cos, sin, slots=torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="v_out"):
        rope(q, q.clone(), cos, sin, v=q.clone(), k_out=q.clone())
    with pytest.raises(ValueError, match="at least 3 rows"):
        rope(q, q.clone(), cos, sin, k_out=torch.zeros(2, 2, 8))
    with pytest.raises(TypeError, match="k"):
        rope(q, q.bfloat16(), cos, sin)
    with pytest.raises(ValueError, match="sections"):
        mrope_cos_sin(torch.zeros(3, 4), torch.ones(16), (4, 6, 7))
    with pytest.raises(ValueError, match="positions"):
        mrope_cos_sin(torch.zeros(2, 4), torch.ones(16), (4, 6, 6))
    with pytest.raises(ValueError, match="dim"):
        vision_rotary(torch.zeros(2), torch.zeros(2), 10)


def test_gradients_flow() -> None:
    """While autograd records, rope is differentiable: against the rotation written out."""
    q0, k0, v0 = (random(5, 2, 8, dtype=torch.float32, seed=i).requires_grad_() for i in (1, 2, 3))
    cos, sin = tables(5, 8)
    weights = [random(5, 2, 8, dtype=torch.float32, seed=i) for i in (4, 5, 6)]
    q, k_out, v_out = q0 * 1.0, torch.zeros(5, 2, 8), torch.zeros(5, 2, 8)
    slots = torch.tensor([3, -1, 0, 4, 1], dtype=torch.int32)
    rope(q, k0, cos, sin, v=v0, k_out=k_out, v_out=v_out, slots=slots)
    loss = torch.stack([(x * w).sum() for x, w in zip((q, k_out, v_out), weights, strict=True)]).sum()
    found = torch.autograd.grad(loss, (q0, k0, v0))
    want = torch.zeros(3, 5, 2, 8)

    def backward(g: Tensor, t: int) -> Tensor:
        return torch.cat((g[:, :4] * cos[t] + g[:, 4:] * sin[t], g[:, 4:] * cos[t] - g[:, :4] * sin[t]), -1)

    for t, slot in enumerate(slots.tolist()):
        want[0, t] = backward(weights[0][t], t)
        if slot >= 0:
            want[1, t] = backward(weights[1][slot], t)
            want[2, t] = weights[2][slot]
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)

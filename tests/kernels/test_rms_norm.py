# SPDX-License-Identifier: Apache-2.0
"""rms_norm against Hugging Face's norm and against double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from glimpse_kernels import rms_norm
from tests.kernels.arena import spread
from tests.kernels.kernel_cases import Case, assert_same, op_cases

all_cases = pytest.mark.parametrize("kernel", op_cases("rms_norm"), indirect=True)
single = pytest.mark.parametrize(
    "kernel", [c for c in op_cases("rms_norm") if c.id.endswith("float32")], indirect=True
)


SHAPES = [
    (0, 8),
    (1, 1),
    (1, 1024),
    (3, 7),
    (5, 33),
    (17, 80),
    (2, 129),
    (64, 640),
    (9, 3584),
    (3, 1280),
    (2, 3420),
]
# beside powers of two: 1280 and 3584 of the models, odd sizes, 3420 that no 16-byte vector divides


def data(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * torch.rand(shape[:-1] + (1,), generator=g) * 30
    return x.to(dtype), (torch.randn(shape[-1], generator=g) + 1).to(dtype)


def exact(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    norm = Qwen2RMSNorm(x.shape[-1], eps)
    norm.weight.data = weight
    return norm(x).detach()


def close(got: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    assert got.dtype == x.dtype and got.shape == x.shape and not got.isnan().any()
    if not x.numel():
        return
    truth, theirs = exact(x, weight, eps), reference(x, weight, eps)
    noise = (theirs.double() - truth).abs()
    floor = truth.abs() * (1e-6 if x.dtype == torch.float32 else 0)
    assert ((got.double() - truth).abs() <= 2 * noise.max() + floor).all()
    if x.dtype == torch.bfloat16:  # the same roundings, but for ties that the order of a sum decides
        assert (got == theirs).float().mean() > 0.995


@all_cases
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_norm(kernel: Case, shape: tuple[int, ...], eps: float) -> None:
    dtype = kernel.dtype
    x, weight = data(shape, dtype)
    close(rms_norm(x, weight, eps), x, weight, eps)
    out = torch.full_like(x, torch.nan)
    assert rms_norm(x, weight, eps, out=out).data_ptr() == out.data_ptr()
    close(out, x, weight, eps)


@all_cases
@pytest.mark.parametrize("shape", SHAPES)
def test_residual(kernel: Case, shape: tuple[int, ...]) -> None:
    dtype = kernel.dtype
    x, weight = data(shape, dtype)
    residual = data(shape, dtype, seed=1)[0]
    total = residual + x  # torch adds in fp32 and rounds once
    before = x.clone()
    got = rms_norm(x, weight, 1e-6, residual=residual)
    assert torch.equal(residual, total) and torch.equal(x, before)
    close(got, total, weight, 1e-6)


@all_cases
def test_strided_rows_and_in_place(kernel: Case) -> None:
    dtype = kernel.dtype
    wide, weight = data((11, 3 * 40), dtype)
    weight = weight[:40]
    x = wide[:, 40:80]
    store = torch.full((11, 100), torch.nan, dtype=dtype)
    got = rms_norm(x, weight, 1e-6, out=store[:, 30:70])
    close(got, x, weight, 1e-6)
    assert store[:, :30].isnan().all() and store[:, 70:].isnan().all()
    residual = wide[:, 80:].clone()
    twin, twin_residual = x.clone(), residual.clone()
    want = rms_norm(twin, weight, 1e-6, residual=twin_residual)
    got = rms_norm(x, weight, 1e-6, residual=residual, out=x)  # x is not needed after the sum
    assert torch.equal(got, want) and got.data_ptr() == x.data_ptr() and torch.equal(residual, twin_residual)


@all_cases
def test_heads(kernel: Case) -> None:
    dtype = kernel.dtype
    x, weight = data((6, 4, 32), dtype)
    close(rms_norm(x, weight, 1e-6), x, weight, 1e-6)
    transposed = x.transpose(0, 1)
    close(rms_norm(transposed, weight, 1e-6), transposed, weight, 1e-6)


@all_cases
def test_heads_of_a_fused_product(kernel: Case) -> None:
    """Some of the heads in a row of queries, keys and values: a stride for the row and one for the head."""
    dtype = kernel.dtype
    fused, weight = data((5, 7, 48), dtype)
    heads, residual = fused[:, 2:5, :40], fused[:, 4:, 8:].clone()
    want = rms_norm(heads.contiguous(), weight[:40], 1e-6, residual=(total := residual.clone()))
    out = torch.full_like(fused, torch.nan)
    got = rms_norm(heads, weight[:40], 1e-6, residual=residual, out=out[:, 2:5, :40])
    assert_same(kernel, got, want)
    assert torch.equal(residual, total)
    assert out.isnan().sum() == out.numel() - got.numel()
    deep = fused[:, :, :36].reshape(5, 7, 2, 18).transpose(0, 2)
    close(rms_norm(deep, weight[:18], 1e-6), deep, weight[:18], 1e-6)


@all_cases
def test_nothing_beside_the_rows_is_read(kernel: Case) -> None:
    dtype = kernel.dtype
    x, weight = data((5, 60), dtype)
    place = torch.full((7, 80), torch.nan, dtype=dtype)
    inside, sides = place[1:6, 8:68].copy_(x), torch.full((80,), torch.nan, dtype=dtype)
    assert_same(kernel, rms_norm(inside, sides[9:69].copy_(weight), 1e-6), rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize(
    "kernel", [c for c in op_cases("rms_norm") if c.id.startswith("triton-")], indirect=True
)
def test_rows_further_apart_than_32_bits_reach(kernel: Case) -> None:
    dtype = kernel.dtype
    x, weight = data((4, 33), dtype)
    residual = data((4, 33), dtype, seed=1)[0]
    want = rms_norm(x, weight, 1e-6, residual=(total := residual.clone()))
    x, residual, out = (spread(t, 0, 2**30) for t in (x, residual, torch.full_like(x, torch.nan)))
    assert_same(kernel, rms_norm(x, weight, 1e-6, residual=residual, out=out), want)
    assert torch.equal(residual, total)


@single
def test_rows_do_not_mix(kernel: Case) -> None:
    x, weight = data((8, 48), torch.float32)
    want = rms_norm(x, weight, 1e-6)
    x[3] = torch.nan
    got = rms_norm(x, weight, 1e-6)
    rows = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(got[rows], want[rows]) and got[3].isnan().all()


@single
def test_large_values_do_not_overflow_in_bfloat16(kernel: Case) -> None:
    dtype = torch.float32 if kernel.interpreted else torch.bfloat16
    x = torch.full((1, 64), 1e15, dtype=dtype)
    assert torch.equal(rms_norm(x, torch.ones(64, dtype=dtype), 1e-6), torch.ones(1, 64, dtype=dtype))


def test_gradient() -> None:
    x, weight = data((4, 12), torch.float32)
    x.requires_grad_()
    rms_norm(x, weight, 1e-6).sum().backward()
    twin = x.detach().double().requires_grad_()
    exact(twin, weight, 1e-6).sum().backward()
    assert torch.allclose(x.grad.double(), twin.grad, atol=1e-5)


def test_bad_arguments() -> None:
    x, weight = data((4, 12), torch.float32)
    with pytest.raises(ValueError, match="weight"):
        rms_norm(x, weight[:5], 1e-6)
    with pytest.raises(TypeError, match="weight"):
        rms_norm(x, weight.bfloat16(), 1e-6)
    with pytest.raises(ValueError, match="residual"):
        rms_norm(x, weight, 1e-6, residual=x[:2].clone())
    with pytest.raises(ValueError, match="out"):
        rms_norm(x, weight, 1e-6, residual=(residual := x.clone()), out=residual)
    with pytest.raises(ValueError, match="contiguous"):
        rms_norm(torch.zeros(12, 4).t(), weight, 1e-6)
    with pytest.raises(TypeError, match="float64"):
        rms_norm(x.double(), weight.double(), 1e-6)


def test_not_a_tensor() -> None:
    with pytest.raises(TypeError, match="rms_norm: x: expected a torch.Tensor, found NoneType"):
        rms_norm(None, torch.ones(3), 1e-6)  # type: ignore[arg-type]

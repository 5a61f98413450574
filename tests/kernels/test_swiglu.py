# SPDX-License-Identifier: Apache-2.0
"""swiglu against double precision, by the rule: no more than twice the error of torch in the same dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glimpse_kernels import swiglu
from tests.kernels.arena import spread
from tests.kernels.kernel_cases import Case, op_cases

all_cases = pytest.mark.parametrize("kernel", op_cases("swiglu"), indirect=True)
single = pytest.mark.parametrize(
    "kernel", [c for c in op_cases("swiglu") if c.id.endswith("float32")], indirect=True
)


SHAPES = [(0, 4), (1, 1), (1, 4096), (3, 17), (5, 80), (7, 129), (33, 1712), (2, 3420), (3, 1026)]
# 3420 and 1026: the second half of a fused row starts at 8 and at 4 bytes beyond a multiple of 16


def data(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    g = torch.Generator().manual_seed(shape[1])
    return (torch.randn(shape[0], 2 * shape[1], generator=g) * 4).to(dtype)


def close(got: Tensor, gate: Tensor, up: Tensor) -> None:
    truth = F.silu(gate.double()) * up.double()
    theirs = F.silu(gate) * up
    assert got.dtype == gate.dtype and got.shape == gate.shape and not got.isnan().any()
    error, noise = (got.double() - truth).abs(), (theirs.double() - truth).abs()
    floor = truth.abs() * (1e-6 if gate.dtype == torch.float32 else 2**-8) + 1e-30
    assert (error <= 2 * noise + floor).all()


@all_cases
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(kernel: Case, shape: tuple[int, int]) -> None:
    dtype = kernel.dtype
    fused = data(shape, dtype)
    gate, up = fused.chunk(2, dim=-1)  # the two halves of one GEMM
    close(swiglu(gate, up), gate, up)
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.full_like(gate, torch.nan)
    assert swiglu(gate, up, out=out).data_ptr() == out.data_ptr()
    close(out, gate, up)


@all_cases
def test_in_place_and_neighbours(kernel: Case) -> None:
    dtype = kernel.dtype
    fused = data((6, 50), dtype)
    want = swiglu(fused[:, :50], fused[:, 50:])
    for half in (slice(0, 50), slice(50, 100)):
        twin = fused.clone()
        got = swiglu(twin[:, :50], twin[:, 50:], out=twin[:, half])
        assert torch.equal(got, want)
        other = slice(50, 100) if half.start == 0 else slice(0, 50)
        assert torch.equal(twin[:, other], fused[:, other])


@all_cases
def test_nothing_beside_the_rows_is_read(kernel: Case) -> None:
    dtype = kernel.dtype
    fused = data((5, 60), dtype)
    place = torch.full((7, 140), torch.nan, dtype=dtype)
    place[1:6, 8:128] = fused
    gate, up = place[1:6, 8:68], place[1:6, 68:128]
    out = torch.full((7, 80), 7.0, dtype=dtype)
    swiglu(gate, up, out=out[1:6, 3:63])
    assert torch.equal(out[1:6, 3:63], swiglu(fused[:, :60], fused[:, 60:]))
    out[1:6, 3:63] = 7
    assert (out == 7).all()


@pytest.mark.parametrize(
    "kernel", [c for c in op_cases("swiglu") if c.id.startswith("triton-")], indirect=True
)
def test_rows_further_apart_than_32_bits_reach(kernel: Case) -> None:
    dtype = kernel.dtype
    gate, up = data((4, 24), dtype).chunk(2, dim=1)
    want = swiglu(gate, up)
    gate, up, out = (spread(t, 0, 2**30) for t in (gate, up, torch.full_like(gate, torch.nan)))
    assert torch.equal(swiglu(gate, up, out=out), want)


@all_cases
def test_extremes(kernel: Case) -> None:
    dtype = kernel.dtype
    big = torch.finfo(dtype).max / 4
    gate = torch.tensor([[-big, -200.0, -100.0, -88.0, -0.0, 0.0, 88.0, 100.0, big, torch.inf]], dtype=dtype)
    up = torch.full_like(gate, 2.0)
    got, theirs = swiglu(gate, up), F.silu(gate.float()) * up.float()
    assert torch.allclose(got.float(), theirs, rtol=2**-7, atol=max(1e-36, torch.finfo(dtype).tiny))
    assert swiglu(torch.full((1, 20), torch.nan, dtype=dtype), torch.ones(1, 20, dtype=dtype)).isnan().all()


@single
def test_dense_sweep(kernel: Case) -> None:
    gate = torch.linspace(-90, 90, 100_001)[None]
    close(swiglu(gate, torch.ones_like(gate)), gate, torch.ones_like(gate))


def test_gradient() -> None:
    gate = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    up = torch.ones(3, 5)
    swiglu(gate, up).sum().backward()
    twin = gate.detach().clone().requires_grad_()
    F.silu(twin).sum().backward()
    assert torch.allclose(gate.grad, twin.grad, atol=1e-6)


def test_bad_arguments() -> None:
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="up"):
        swiglu(x, x[:, :2])
    with pytest.raises(TypeError, match="up"):
        swiglu(x, x.bfloat16())
    with pytest.raises(ValueError, match="contiguous"):
        swiglu(torch.zeros(4, 3).t(), x)
    with pytest.raises(TypeError, match="float64"):
        swiglu(x.double(), x.double())

# SPDX-License-Identifier: Apache-2.0
"""The stand-in GPU is as strict as a real one about where tensors are, and as right as the CPU about what they hold."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from glimpse_kernels import _triton, dispatch, rms_norm
from tests.stand_in import DEVICE, HostWaited, StandIn, stand_in_gpu

pytestmark = pytest.mark.skipif(
    not _triton.interpreting(), reason=_triton.missing() or "there is a GPU: nothing has to stand in for it"
)


@pytest.fixture
def gpu() -> Iterator[StandIn]:
    with stand_in_gpu() as found:
        yield found


def test_factories_and_what_follows_from_them_are_on_the_device(gpu: StandIn) -> None:
    with torch.device("cuda"):
        x = torch.randn(4, 6)
        made = [
            x,
            torch.tensor([1.0]),
            torch.arange(3),
            torch.empty_like(x),
            x.new_zeros(2),
            x[1:],
            x.double(),
            x @ x.T,
        ]
        assert torch.zeros(2, device="cpu").device.type == "cpu"
    assert all(t.device == DEVICE and t.is_cuda and not t.is_cpu for t in made)
    assert x.shape == torch.Size([4, 6]) and x.stride() == (6, 1) and x[:, 1].stride() == (6,)
    assert not gpu.reads
    for moved in (x.to("cpu"), x.cpu()):
        assert moved.device.type == "cpu"
    assert torch.ones(2).to("cuda").device == torch.ones(2).cuda().device == DEVICE
    assert len(gpu.reads) == 2


def test_views_share_memory_and_in_place_results_are_the_tensor(gpu: StandIn) -> None:
    x = torch.zeros(5, device="cuda")
    assert x.add_(1) is x
    x[1:3].fill_(7)
    x[torch.tensor([4], device="cuda")] = 9.0
    out = torch.empty(5, device="cuda")
    assert torch.add(x, 1, out=out) is out
    assert x.tolist() == [1, 7, 7, 1, 9] and out.tolist() == [2, 8, 8, 2, 10]
    host = torch.ones(5)
    copy = host.to("cuda")
    copy.zero_()
    assert host.tolist() == [1.0] * 5


def test_two_devices_do_not_mix(gpu: StandIn) -> None:
    x, host = torch.ones(3, device="cuda"), torch.ones(3)
    for wrong in (
        lambda: x + host,
        lambda: torch.cat((x, host)),
        lambda: F.linear(x, host.expand(2, 3)),
        lambda: torch.where(x > 0, x, host),
        lambda: torch.add(x, x, out=host),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            wrong()
    assert (x + torch.tensor(2.0)).device == DEVICE  # a number, as torch has it
    with pytest.raises(TypeError, match="cannot convert"):
        x.numpy()
    assert np.asarray(x.cpu()).sum() == 3


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.sum() > 0),
        lambda x: int(x[0]),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: torch.empty(3).copy_(x),
        lambda x: torch.where(x > 0),
        lambda x: x.unique(),
        lambda x: torch.bincount(x.long()),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: torch.repeat_interleave(x.long()),
        lambda x: torch.repeat_interleave(x, repeats=x.long(), dim=0),
    ],
)
def test_every_wait_of_the_host_is_noted(gpu: StandIn, read) -> None:  # type: ignore[no-untyped-def]
    x = torch.ones(3, device="cuda")
    y = x * 2 + x.softmax(0)
    y[1:] = 0
    y[torch.tensor([0], device="cuda")] = 1
    y.repeat_interleave(2), y.repeat_interleave(x.long(), output_size=3), torch.where(x > 0, x, 0.0)
    assert not gpu.reads
    read(x)
    assert len(gpu.reads) == 1


def test_kernels_run_and_take_device_tensors_alone(gpu: StandIn) -> None:
    from glimpse_kernels.rms_norm.triton import rms_norm as kernel

    x, weight = torch.randn(3, 8), torch.ones(8)
    want = F.rms_norm(x.double(), (8,), eps=1e-6)
    with dispatch.force_backend("triton"):
        found = rms_norm(x.cuda(), weight.cuda(), 1e-6)
    assert found.device == DEVICE
    torch.testing.assert_close(found.cpu().double(), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="Triton: expected tensors on cuda:0, found one on cpu"):
        kernel(x.cuda(), weight, 1e-6)


def test_it_ends_with_the_block() -> None:
    with stand_in_gpu():
        pass
    assert torch.ones(2).device.type == "cpu"
    assert not torch.cuda.is_available()


def test_nothing_waits_means_nothing(gpu: StandIn) -> None:
    """Each way in which the host would wait raises, and what is queued does not."""
    x = torch.arange(4.0, device="cuda")
    host, locked = torch.zeros(4), torch.zeros(4, pin_memory=True)
    waits = {
        "item": lambda: x[0].item(),
        "tolist": lambda: x.tolist(),
        "nonzero": lambda: x.nonzero(),
        "where": lambda: torch.nonzero(x > 1),
        "boolean index": lambda: x[x > 1],
        "bool": lambda: bool(x[0]),
        "int": lambda: int(x[0]),
        "cpu": lambda: x.cpu(),
        "to": lambda: x.to("cpu"),
        "up, ordinary memory": lambda: host.to("cuda", non_blocking=True),
        "up, but waited for": lambda: locked.to("cuda"),
        "up, from a list": lambda: x.new_tensor([1.0]),
        "a list": lambda: torch.tensor([1.0, 2.0], device="cuda"),
        "copy up": lambda: x.copy_(host),
        "copy down": lambda: host.copy_(x, non_blocking=True),
        "copy down, waited for": lambda: locked.copy_(x),
        "assigned": lambda: x.__setitem__(slice(None), host),
    }
    for name, wait in waits.items():
        with gpu.nothing_waits(), pytest.raises(HostWaited):
            wait()
            pytest.fail(f"{name}: passed")
    with gpu.nothing_waits():
        y = locked.to("cuda", non_blocking=True)
        x.copy_(locked, non_blocking=True)
        locked.copy_(y + 1, non_blocking=True)
        torch.where(x > 1, x, 0.0).masked_fill_(x > 1, 2.0).index_fill_(0, torch.zeros_like(x).long(), 1.0)
    assert locked.tolist() == [1.0] * 4
    x.tolist()  # outside it is only noted
    assert gpu.reads

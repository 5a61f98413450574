# SPDX-License-Identifier: Apache-2.0
"""Copies between host and device that nobody waits for."""

from __future__ import annotations

import torch

from glimpse_runtime.uploads import ALIGNMENT, Arriving, upload, upload_together
from tests.stand_in import stand_in_gpu

CPU = torch.device("cpu")
PARTS = [
    torch.arange(5, dtype=torch.int32),
    torch.tensor([True, False, True]),
    torch.arange(12, dtype=torch.int64).view(3, 4),
    torch.zeros(0, 7),
    torch.tensor(2.5),
    torch.randn(4, 3, dtype=torch.bfloat16).T,
]


def test_together_and_alone() -> None:
    with stand_in_gpu() as gpu:
        device = torch.device("cuda", 0)
        sent = upload_together(PARTS, device)
        for part, arrived in zip(PARTS, sent, strict=True):
            assert arrived.device == device and arrived.dtype == part.dtype and arrived.shape == part.shape
            assert arrived.data_ptr() % ALIGNMENT == 0 or not part.numel()
            alone = upload(part, device)
            assert not gpu.reads
            assert torch.equal(arrived.cpu(), part) and torch.equal(alone.cpu(), part)
            assert upload(alone, device) is alone
            gpu.reads.clear()
        assert upload_together([], device) == []


def test_one_buffer_for_all_of_them() -> None:
    with stand_in_gpu():
        sent = upload_together(PARTS, torch.device("cuda", 0))
        assert len({part.untyped_storage().data_ptr() for part in sent}) == 1


def test_what_is_changed_afterwards_is_not_sent() -> None:
    with stand_in_gpu():
        host = torch.ones(3)
        sent = upload(host, torch.device("cuda", 0))
        host.zero_()
        assert sent.cpu().tolist() == [1, 1, 1]


def test_on_a_cpu_nothing_is_copied() -> None:
    assert all(a is b for a, b in zip(upload_together(PARTS, CPU), PARTS, strict=True))
    assert upload(PARTS[0], CPU) is PARTS[0]
    assert Arriving(PARTS[0]).wait() == [0, 1, 2, 3, 4]


class _Streams:
    """Stands in for `torch.cuda`: `log` is what happened to the event."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def current_stream(self, device: torch.device) -> str:
        return f"stream of {device}"

    def Event(self) -> _Streams:  # noqa: N802 (the name it has in torch.cuda)
        return self

    def record(self, stream: str) -> None:
        self.log.append(f"recorded on {stream}")

    def synchronize(self) -> None:
        self.log.append("waited for")


def test_numbers_arrive_behind_what_was_queued() -> None:
    streams = _Streams()
    with stand_in_gpu():
        source = torch.arange(3, dtype=torch.int32, device="cuda")
        arriving = Arriving(source, streams)
        source.zero_()
        assert streams.log == ["recorded on stream of cuda:0"]
        assert arriving.wait() == [0, 1, 2] and arriving.wait() == [0, 1, 2]
    assert streams.log[1:] == ["waited for"]

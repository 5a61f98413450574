# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the kernel tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from glimpse_kernels import _triton
from tests.kernels.kernel_cases import Case


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.device.type == "meta":
            return tensor
        with torch.no_grad():
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
            elif tensor.dtype is not torch.bool:
                tensor.fill_(torch.iinfo(tensor.dtype).max // 2)
        return tensor

    return wrapper


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN (integers: a huge value): what is not written shows."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def checked_launches() -> Iterator[None]:
    """Launches that the interpreter runs keep to the rules of `tests.kernels.interpreter_checks`, and have bf16 as on a GPU."""
    if not _triton.interpreting():
        yield
        return
    from tests.kernels.interpreter_bf16 import exact_bfloat16
    from tests.kernels.interpreter_checks import checking

    with checking(), exact_bfloat16():
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def kernel(request: pytest.FixtureRequest) -> Iterator[Case]:
    """The case of `parametrize("kernel", op_cases(op), indirect=True)`, in force during the test."""
    case: Case = request.param
    with case.active():
        yield case

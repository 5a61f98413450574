# SPDX-License-Identifier: Apache-2.0
"""What every public entry point does first."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def inference(entry: Callable[P, R]) -> Callable[P, R]:
    """No gradients, and no autocast inside: kernels take the dtype they are given."""

    @functools.wraps(entry)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        torch.get_num_threads()  # in a new Python thread, OpenMP learns torch's number by this call
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return entry(*args, **kwargs)

    return run

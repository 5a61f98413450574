# SPDX-License-Identifier: Apache-2.0
"""How an op gets its entry under `torch.ops.glimpse`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("glimpse", "DEF")
DEVICES = ("CPU", "CUDA")

OPS: list[str] = []
"""Names under `torch.ops.glimpse`."""


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """`run` serves calls, `fake` makes results of the same shapes and dtypes from tensors without memory."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in DEVICES:
        _library.impl(name, run, device)
    torch.library.register_fake(f"glimpse::{name}", fake, lib=_library)
    OPS.append(name)


def like_first(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_empty(x.shape)


def nothing(*_: Any, **__: Any) -> None:
    return None

# SPDX-License-Identifier: Apache-2.0
"""`linear` by torch's own product, for the backends that leave some of their calls to it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def torch_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, out: Tensor | None
) -> Tensor:
    """See `glimpse_kernels.linear`; arguments are checked there."""
    if out is None:
        y = F.linear(x, weight, bias)
    elif bias is None:
        y = torch.mm(x, weight.T, out=out)
    else:
        y = torch.addmm(bias, x, weight.T, out=out)
    return torch.ops.aten.gelu.out(y, out=y) if activation == "gelu" else y

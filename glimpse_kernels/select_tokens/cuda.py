# SPDX-License-Identifier: Apache-2.0
"""`select_tokens` in CUDA C++ (csrc/cuda/select_tokens.cu): a radix select for each group, a scan over the rows. One launch for up to
eight groups (two where the GPU has no clusters), else three that overlap."""

from __future__ import annotations

import torch
from torch import Tensor

from glimpse_kernels import _cuda
from glimpse_kernels.select_tokens.arguments import arguments
from glimpse_kernels.select_tokens.selection import Selection


def select_tokens(
    logits: Tensor,
    cu_groups: Tensor,
    *,
    threshold: float,
    caps: Tensor,
    floors: Tensor,
    forced: Tensor | None,
    token_rows: Tensor,
    row_keep: Tensor,
    cu_seqlens: Tensor,
    capacity: int,
) -> Selection:
    """See `glimpse_kernels.select_tokens`; arguments are checked there. Their values are not: that would make the host wait."""
    tokens, groups = logits.shape[0], cu_groups.shape[0] - 1
    device, module = logits.device, _cuda.module()
    keep = torch.empty(tokens, dtype=torch.bool, device=device)
    counts = torch.empty(groups, dtype=torch.int32, device=device)
    index = torch.empty(capacity, dtype=torch.int32, device=device)
    cu_out = torch.empty(cu_seqlens.shape[0], dtype=torch.int32, device=device)
    room = module.select_tokens_workspace(tokens, groups, row_keep.shape[0])
    workspace = torch.empty(room, dtype=torch.uint8, device=device) if room else None
    into = Selection(keep=keep, counts=counts, index=index, cu_seqlens=cu_out)
    module.select_tokens(
        _cuda.stream(logits),
        0 if workspace is None else workspace.data_ptr(),
        room,
        *arguments(
            logits, cu_groups, threshold, caps, floors, forced, token_rows, row_keep, cu_seqlens, into
        ),
    )
    return into

# SPDX-License-Identifier: Apache-2.0
"""The ops as `torch.ops.glimpse.*`, for `torch.compile` and `torch.library.opcheck`. Importing this module registers them.

Runtime code calls the functions of `glimpse_kernels` directly: that is one Python call, with no dispatcher between.
A registered op calls the same function, so backends and checks are the same. What writes to its arguments says so in its
schema; where an op can do both (`rope`, `rms_norm`), each way has its own name,
as has `linear` with an 8-bit weight. `vip` has no entry: it takes a structure of
weights, and its parts are here.
"""

from __future__ import annotations

from glimpse_kernels.library import (  # noqa: F401  (they register what they hold)
    attention,
    linear,
    patchify,
    rows,
    scores,
    selection,
)
from glimpse_kernels.library.registry import DEVICES, OPS

__all__ = ["DEVICES", "OPS"]

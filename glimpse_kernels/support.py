# SPDX-License-Identifier: Apache-2.0
"""Which kernels exist: op, backend, device and dtypes. The only place that knows; tests and docs/kernels.md are generated from it.

A backend of an op lives in ``glimpse_kernels/<folder>/<backend>.py`` as a function of the op's name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from glimpse_kernels.measured import dtype_name

BACKENDS: tuple[str, ...] = ("cuda", "triton", "cpu", "naive")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_FLOATS = (torch.float32, torch.bfloat16)
"""dtypes of the C++ kernels; the Triton kernels have all of `FLOATS`."""


@dataclass(frozen=True)
class Support:
    """One row of the support table.

    op: public name. backend: one of `BACKENDS`. device: torch device type, "any" for the definitions.
    dtypes: of the op's main tensor; None = any dtype. folder: package under glimpse_kernels. symbols: functions that
    the compiled extension must have. grad: whether autograd can go through it.
    """

    op: str
    backend: str
    device: str
    dtypes: tuple[torch.dtype, ...] | None
    folder: str
    symbols: tuple[str, ...] = ()
    grad: bool = False


def _rows(
    op: str,
    *,
    folder: str | None = None,
    symbols: tuple[str, ...] | None = None,
    naive: tuple[torch.dtype, ...] | None = FLOATS,
    cpu: tuple[torch.dtype, ...] | None = KERNEL_FLOATS,
    triton: tuple[torch.dtype, ...] | None = FLOATS,
    cuda: tuple[torch.dtype, ...] | None = FLOATS,
    without: tuple[str, ...] = ("cuda",),
) -> tuple[Support, ...]:
    folder = folder or op
    rows = (
        Support(op, "cuda", "cuda", cuda, folder, (op,)),
        Support(op, "triton", "cuda", triton, folder),
        Support(op, "cpu", "cpu", cpu, folder, (op,) if symbols is None else symbols),
        Support(op, "naive", "any", naive, folder, grad=True),
    )
    return tuple(row for row in rows if row.backend not in without)


TABLE: tuple[Support, ...] = (
    *_rows("attention"),
    *_rows("decode_attention", without=()),
    *_rows("glimpse_scores", without=()),
    *_rows("received_attention"),
    *_rows("last_row_attention"),
    *_rows("farthest_points", without=()),
    *_rows(
        "greedy_dpp",
        naive=(torch.float32,),
        cpu=(torch.float32,),
        triton=(torch.float32,),
        cuda=(torch.float32,),
        without=(),
    ),
    *_rows("drop_duplicates", without=()),
    *_rows(
        "window_topk",
        naive=(torch.float32,),
        cpu=(torch.float32,),
        triton=(torch.float32,),
        without=("cuda",),
    ),
    *_rows("graph_flow"),
    *_rows("merge_nearest"),
    *_rows("vip_conditions", folder="vip", symbols=("linear",)),
    *_rows("vip", symbols=("linear", "rms_norm", "rope", "attention")),
    *_rows(
        "select_tokens",
        naive=(torch.float32,),
        cpu=(torch.float32,),
        triton=(torch.float32,),
        cuda=(torch.float32,),
        without=(),
    ),
    *_rows("compact", naive=None, cpu=None, triton=None, cuda=None, without=()),
    *_rows("rope"),
    *_rows("rms_norm"),
    *_rows("swiglu"),
    *_rows("linear"),
    *_rows("linear_group", folder="linear", symbols=("linear",)),
    *_rows("gated_linear", folder="linear", symbols=("linear",)),
    *_rows(
        "patchify",
        naive=(torch.uint8,),
        cpu=(torch.uint8,),
        triton=(torch.uint8,),
        cuda=(torch.uint8,),
        without=(),
    ),
)

BY_OP: dict[str, tuple[Support, ...]] = {}
for _row in TABLE:
    BY_OP[_row.op] = (*BY_OP.get(_row.op, ()), _row)


def table_markdown() -> str:
    """The support table as Markdown, one row an op (docs/kernels.md holds it, a test compares)."""

    def cell(op: str, backend: str) -> str:
        for row in BY_OP[op]:
            if row.backend == backend:
                return "any dtype" if row.dtypes is None else ", ".join(dtype_name(d) for d in row.dtypes)
        return "–"

    backends = [b for b in reversed(BACKENDS) if any(row.backend == b for row in TABLE)]
    names = {
        "naive": "naive (any device)",
        "cpu": "cpu (C++)",
        "triton": "triton (CUDA)",
        "cuda": "cuda (C++)",
    }
    lines = ["| op | " + " | ".join(names[b] for b in backends) + " |", "| --- |" + " --- |" * len(backends)]
    lines += [f"| `{op}` | " + " | ".join(cell(op, b) for b in backends) + " |" for op in BY_OP]
    return "\n".join(lines)

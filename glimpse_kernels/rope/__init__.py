# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding of queries and keys, with the write of keys and values to where attention reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from glimpse_kernels import _tensors as check
from glimpse_kernels import dispatch
from glimpse_kernels.rope.naive import mrope_cos_sin, vision_rotary

__all__ = ["mrope_cos_sin", "rope", "vision_rotary"]


def rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    v: Tensor | None = None,
    k_out: Tensor | None = None,
    v_out: Tensor | None = None,
    slots: Tensor | None = None,
) -> None:
    """Rotate q in place, and k in place or on its way to a cache (Su et al., arXiv:2104.09864, section 3.4.2).

    The pairs are (x[i], x[i + D/2]): y[i] = x[i] cos[i] - x[i + D/2] sin[i], y[i + D/2] = x[i + D/2] cos[i] + x[i] sin[i].

    q: [T, Hq, D], rotated in place. k: [T, Hkv, D] or None. v: [T, Hkv, Dv], only with v_out. All of one dtype (float32,
        bfloat16; the definition takes float16 too); last dimension contiguous, row and head strides free, so that
        the three may be views into one fused GEMM output.
    cos, sin: [T, D/2] float32, last dimension contiguous. See `mrope_cos_sin`, `vision_rotary`.
    k_out: [S, Hkv, D]: the rotated k goes here and k itself stays as it was; v_out: [S, Hkv, Dv]: v is copied here. Neither
        may overlap q, k or v.
    slots: [T] int32, row t goes to row slots[t] of k_out and v_out; -1: nowhere; no slot twice. None: row t goes to row t.

    Returns None. Computed in fp32 and rounded once. While autograd records, the definition serves: gradients flow through
    q, k_out and v_out as through any in-place operation of torch.

    Raises TypeError / ValueError for a wrong dtype / shape, UnsupportedError if no backend serves the dtype or device.
    """
    op = "rope"
    check.expect_tensors(op, q=q, cos=cos, sin=sin)
    check.expect_shape(op, "q", q, (None, None, None), "[T, Hq, D]")
    t, _, d = q.shape
    if d % 2:
        raise ValueError(f"{op}: q: expected an even head dimension, found {check.describe(q)}")
    for name, table in (("cos", cos), ("sin", sin)):
        check.expect_shape(op, name, table, (t, d // 2), "[T, D/2]")
        check.expect_dtype(op, name, table, torch.float32)
    if k is None:
        if v is not None or k_out is not None or v_out is not None or slots is not None:
            raise ValueError(f"{op}: k: expected a tensor with v, k_out, v_out or slots, found None")
    else:
        check.expect_shape(op, "k", k, (t, None, d), "[T, Hkv, D]")
        check.expect_dtype(op, "k", k, q.dtype)
        if (v is None) != (v_out is None):
            raise ValueError(
                f"{op}: v_out: expected v and v_out together, found {check.describe(v)} and {check.describe(v_out)}"
            )
        if k_out is None:
            if v_out is not None or slots is not None:
                raise ValueError(f"{op}: k_out: expected a tensor with v_out or slots, found None")
        else:
            _check_cache(op, "k", k, k_out, slots)
        if v is not None and v_out is not None:
            check.expect_shape(op, "v", v, (t, k.shape[1], None), "[T, Hkv, Dv]")
            check.expect_dtype(op, "v", v, q.dtype)
            _check_cache(op, "v", v, v_out, slots)
        if slots is not None:
            check.expect_shape(op, "slots", slots, (t,), "[T]")
            check.expect_dtype(op, "slots", slots, torch.int32)
            check.expect_contiguous(op, "slots", slots)
    check.expect_last_contiguous(op, q=q, k=k, v=v, cos=cos, sin=sin, k_out=k_out, v_out=v_out)
    check.expect_same_device(op, q.device, k=k, v=v, cos=cos, sin=sin, k_out=k_out, v_out=v_out, slots=slots)
    serve = dispatch.select(op, q.device, q.dtype, grad=check.needs_grad(q, k, v, cos, sin))
    serve(q, k, cos, sin, v=v, k_out=k_out, v_out=v_out, slots=slots)


def _check_cache(op: str, name: str, x: Tensor, out: Tensor, slots: Tensor | None) -> None:
    check.expect_shape(op, f"{name}_out", out, (None, x.shape[1], x.shape[2]), "[S, Hkv, D]")
    check.expect_dtype(op, f"{name}_out", out, x.dtype)
    if slots is None and out.shape[0] < x.shape[0]:
        raise ValueError(
            f"{op}: {name}_out: expected at least {x.shape[0]} rows without slots, found {check.describe(out)}"
        )

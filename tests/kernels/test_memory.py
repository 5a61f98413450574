# SPDX-License-Identifier: Apache-2.0
"""No kernel reads or writes past a tensor: every tensor ends at, or begins behind, a page that nobody may touch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from glimpse_kernels import _ext

ROOT = Path(__file__).parents[2]
PROGRAM = """
import ctypes, mmap, random, sys
import torch
import glimpse_kernels as gk
from glimpse_kernels import _ext
from glimpse_kernels.attention.naive import attention as naive

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
alive = []
front = False

def guard(t):
    size = t.numel() * t.element_size()
    if size == 0:
        return t.contiguous()
    pages = -(-size // PAGE)
    area = mmap.mmap(-1, (pages + 2) * PAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for page in (base, base + (pages + 1) * PAGE):
        assert libc.mprotect(page, PAGE, 0) == 0
    at = base + PAGE if front else base + (pages + 1) * PAGE - size
    raw = (ctypes.c_uint8 * size).from_address(at)
    alive.append((area, raw))
    result = torch.frombuffer(raw, dtype=t.dtype).view(t.shape)
    return result.copy_(t)

def ints(*x):
    return guard(torch.tensor(x, dtype=torch.int32))

def real(*shape):
    return guard(torch.randn(*shape).to(dtype))

def bounds(lengths):
    return ints(*[sum(lengths[:i]) for i in range(len(lengths) + 1)])

if sys.argv[1:] == ["fault"]:  # the guard itself: one element too far is a fault
    t = guard(torch.zeros(5))
    ctypes.c_float.from_address(t.data_ptr() + 20).value
random.seed(0)
torch.manual_seed(0)
torch.set_num_threads(2)
module = _ext.extension()
for isa in ("avx512bf16", "avx512", "avx2", "baseline"):
    try:
        module.set_isa(isa)
    except RuntimeError:
        continue
    for turn in range(30):
        dtype, front = (torch.float32, torch.bfloat16)[turn % 2], turn % 3 == 0
        d, dv = random.choice([1, 3, 7, 13, 17, 33, 64, 80, 130]), random.choice([1, 2, 5, 13, 31, 48, 65, 128])
        hq, hkv = random.choice([(1, 1), (3, 1), (4, 2), (7, 7)])
        lq = [random.choice([0, 1, 5, 64, 65]) for _ in range(3)]
        lk = [random.choice([0, 1, 3, 63, 64, 66, 129]) for _ in range(3)]
        q, k, v = real(sum(lq), hq, d), real(sum(lk), hkv, d), real(sum(lk), hkv, dv)
        at_q, at_k = bounds(lq), bounds(lk)
        out = gk.attention(q, k, v, at_q, at_k, causal=turn % 4 < 2, out=real(sum(lq), hq, dv))
        want = naive(q, k, v, at_q, at_k, causal=turn % 4 < 2)
        limit = 1e-5 if dtype is torch.float32 else 0.1
        torch.testing.assert_close(out.float(), want.float(), rtol=limit, atol=limit)
        size = random.choice([1, 5, 16])
        length = random.choice([0, 1, size, 300])
        blocks = max(1, -(-length // size))
        table = guard(torch.randperm(blocks).int().view(1, -1))
        pool = real(blocks, size, hkv, d), real(blocks, size, hkv, dv)
        gk.decode_attention(real(1, hq, d), *pool, table, ints(length), out=real(1, hq, dv))
        lse, scores = guard(torch.randn(2, hq)), guard(torch.randn(3, hq))
        gk.glimpse_scores(real(2, hq, d), real(9, hkv, d), ints(8, 0, 8), ints(1, 1, 0), out=scores, lse=lse)
        rows = torch.full((sum(lq), hq), 2.0), torch.randperm(sum(lk)).int()
        rows = [guard(x) for x in rows]
        kind = dict(causal=turn % 4 < 2, order=rows[1])
        gk.received_attention(q, k, rows[0], at_q, at_k, out=guard(torch.randn(sum(lk))), **kind)
        if sum(lk):
            last = torch.randint(0, sum(lk), (5,)).int()
            seq = torch.bucketize(last, at_k, right=True).int() - 1
            listed = guard(last), guard(seq)
            for given in (None, guard(torch.randn(3, hq))):
                gk.last_row_attention(real(3, hq, d), k, at_k, *listed, lse=given, out=guard(torch.randn(5)))
        marks = [guard(torch.rand(sum(lk)) < 0.5) for _ in range(2)]
        like = guard(torch.randn(sum(lk), d).to(random.choice([torch.float32, torch.bfloat16])))
        gk.merge_nearest(real(sum(lk), dv), marks[0], at_k, sources=marks[1], metric=like, out=real(sum(lk), dv))
        t = random.choice([1, 3, 9])
        gk.rms_norm(real(t, d), real(d), 1e-6, residual=real(t, d), out=real(t, d))
        rows, depth, cols = (random.choice(c) for c in ((1, 2, 5, 16, 17, 40), (1, 31, 64, 97, 130), (1, 3, 32, 65, 100)))
        weight, up = real(cols, depth), real(cols, depth)
        x, bias = real(rows, depth), real(cols)
        got = gk.linear(x, weight, bias, out=real(rows, cols))
        limit = 1e-4 if dtype is torch.float32 else 0.3
        torch.testing.assert_close(
            got.float(), x.float() @ weight.float().T + bias.float(), rtol=limit, atol=limit
        )
        gk.gated_linear(x, weight, up, bias, out=real(rows, cols))
        gk.linear_group(x, [weight, up], [bias, None], outs=[real(rows, cols), real(rows, cols)])
        packed = gk.quantize_int8(weight, 32)
        packed = gk.Int8Weight(guard(packed.values), guard(packed.scales), 32)
        got = gk.linear(x, packed, bias, activation="gelu", out=real(rows, cols))
        assert got.isfinite().all()
        gk.swiglu(real(t, d), real(t, d), out=real(t, d))
        angles = guard(torch.randn(t, d)), guard(torch.randn(t, d))
        target = dict(k_out=real(t, hkv, 2 * d), v_out=real(t, hkv, dv), slots=guard(torch.randperm(t).int()))
        gk.rope(real(t, hq, 2 * d), real(t, hkv, 2 * d), *angles, v=real(t, hkv, dv), **target)
        pair = real(2, t, hkv, d), real(2, 2, hkv, d)
        gk.compact(ints(0, t - 1), ints(1, 0), pair[0], None, pair[1], None, [(real(t, d), real(2, d))])
        sides = random.choice([1, 2, 5, 16, 40, 61]), random.choice([1, 2, 5, 16, 21, 40, 61])
        picture = guard(torch.randint(0, 256, (*sides, 3), dtype=torch.uint8))
        grid = dict(size=random.choice([(3, 6), (33, 15), (18, 24)]), patch_size=3, merge_size=1, temporal_patch_size=2)
        cells = grid["size"][0] * grid["size"][1] // 9
        plain = dict(mean=(0.5,) * 3, std=(0.5,) * 3, resample=random.choice(["bicubic", "lanczos", "box"]))
        gk.patchify(picture, **grid, **plain, down_first=turn % 2 == 0, out=real(cells, 54))
        del picture
        del q, k, v, at_q, at_k, out, want, table, pool, lse, scores, angles, target, pair, rows, kind, marks, like
        listed = given = None
        alive.clear()
print("done")
"""


@pytest.mark.skipif(
    _ext.compiled() is None, reason=f"compiled extension not available: {_ext.compiled_error()}"
)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect on anonymous maps as Linux has it")
def test_nothing_is_touched_outside_of_the_tensors() -> None:
    """In a process of its own: a fault is a failing test, not the end of this one."""
    result = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, (result.returncode, result.stderr)
    assert result.stdout.strip() == "done"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect on anonymous maps as Linux has it")
def test_the_guard_works() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM, "fault"], cwd=ROOT, capture_output=True)
    assert result.returncode < 0  # ended by a signal

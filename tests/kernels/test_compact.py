# SPDX-License-Identifier: Apache-2.0
"""compact: exact copies against a loop, nothing written that was not asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from glimpse_kernels import compact
from tests.kernels.kernel_cases import Case, op_cases

CASES_HERE: list[Any] = op_cases("compact")
all_cases = pytest.mark.parametrize("kernel", CASES_HERE, indirect=True)
kernel_cases = pytest.mark.parametrize(
    "kernel", [p for p in CASES_HERE if p.values[0].backend != "naive"], indirect=True
)

DTYPES = [torch.float32, torch.bfloat16]


def bits(t: Tensor) -> Tensor:
    """Raw bits, so that NaN equals NaN."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.contiguous().view(width)


def ints(x: list[int]) -> Tensor:
    return torch.tensor(x, dtype=torch.int32)


def random(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    t = torch.randn(*shape, generator=generator, device="cpu").to(torch.get_default_device())
    return t.to(dtype) if dtype.is_floating_point else (t * 1000).to(dtype)


Pairs = list[tuple[Tensor, Tensor]]


def loop(index: Tensor, slots: Tensor | None, pairs: Pairs, rows: Pairs) -> None:
    for i, row in enumerate(index.tolist()):
        if row < 0:
            continue
        for src, dst in rows:
            dst[i] = src[row]
        if slots is not None and slots[i] >= 0:
            for src, dst in pairs:
                for layer in range(src.shape[0]):
                    dst[layer, slots[i]] = src[layer, row]


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    t = draw(st.integers(0, 20))
    m = draw(st.integers(0, t + 3))
    index = [draw(st.integers(-1, t - 1)) for _ in range(m)]
    size = m + draw(st.integers(0, 5))
    slots = draw(st.permutations(range(size)))[:m]
    slots = [-1 if draw(st.integers(0, 5)) == 0 else s for s in slots]
    return {"t": t, "index": index, "slots": slots, "size": size, "layers": draw(st.integers(0, 4))}


@all_cases
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(), heads=st.integers(1, 3), d=st.sampled_from([1, 7, 32, 80]), dv=st.sampled_from([3, 64]))
def test_against_a_loop(
    kernel: Case, dtype: torch.dtype, case: dict[str, Any], heads: int, d: int, dv: int
) -> None:
    g = torch.Generator().manual_seed(0)
    t, size, layers = case["t"], case["size"], case["layers"]
    index, slots = ints(case["index"]), ints(case["slots"])
    k_src, v_src = (random(g, layers, t, heads, x, dtype=dtype) for x in (d, dv))
    k_dst, v_dst = (torch.full((layers, size, heads, x), torch.nan, dtype=dtype) for x in (d, dv))
    rows = [
        (random(g, t, 5, dtype=dtype), torch.full((len(index) + 2, 5), torch.nan, dtype=dtype)),
        (random(g, t, 3, dtype=torch.int64), torch.full((len(index), 3), -7)),
        (random(g, t, dtype=torch.int32), torch.full((len(index),), -7, dtype=torch.int32)),
        (random(g, t, 2, 2) > 0, torch.zeros(len(index), 2, 2, dtype=torch.bool)),
    ]
    want_kv = [(k_src, k_dst.clone()), (v_src, v_dst.clone())]
    want_rows = [(src, dst.clone()) for src, dst in rows]
    loop(index, slots, want_kv, want_rows)
    compact(index, slots, k_src, v_src, k_dst, v_dst, rows)
    for (_, want), got in zip(want_kv, (k_dst, v_dst), strict=True):
        assert torch.equal(bits(want), bits(got))
    for (_, want), (_, got) in zip(want_rows, rows, strict=True):
        assert torch.equal(bits(want), bits(got))


@all_cases
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_views(kernel: Case, dtype: torch.dtype) -> None:
    """The first layers of a pool, a workspace that is longer than its content, positions stored as [3, T]."""
    g = torch.Generator().manual_seed(1)
    layers, t, heads, d = 3, 50, 2, 16
    workspace = random(g, 2, layers, 64, heads, d, dtype=dtype)  # k and v in one buffer
    workspace[:, :, t:] = torch.nan
    pool = torch.full((2, 5, 40, heads, d), torch.nan, dtype=dtype)
    before = pool.clone()
    positions = torch.arange(3 * t).view(3, t)
    hidden = random(g, t, 2 * 24, dtype=dtype)[:, 24:]
    index = ints([0, 3, 4, 11, 30, 49, -1, -1])
    slots = ints([8, 9, 39, 0, 1, 2, 3, 4])
    positions_out = torch.full((3, 8), -1)
    hidden_out = torch.full((8, 24), torch.nan, dtype=dtype)
    compact(
        index,
        slots,
        workspace[0, :, :t],
        workspace[1, :, :t],
        pool[0, :layers],
        pool[1, :layers],
        [(positions.t(), positions_out.t()), (hidden, hidden_out)],
    )
    kept, places = index[:6].long(), slots[:6].long()
    for i in range(2):
        assert torch.equal(bits(pool[i, :layers, places]), bits(workspace[i, :, kept]))
        untouched = [s for s in range(40) if s not in places.tolist()]
        assert torch.equal(bits(pool[i, :, untouched]), bits(before[i, :, untouched]))
        assert torch.equal(bits(pool[i, layers:]), bits(before[i, layers:]))
    assert torch.equal(positions_out[:, :6], positions[:, kept]) and (positions_out[:, 6:] == -1).all()
    assert torch.equal(bits(hidden_out[:6]), bits(hidden[kept])) and hidden_out[6:].isnan().all()


@all_cases
def test_large_enough_for_threads(kernel: Case) -> None:
    g = torch.Generator().manual_seed(2)
    layers = 1 if kernel.interpreted else 5
    k = random(g, layers, 1500, 2, 64, dtype=torch.bfloat16)
    v = random(g, layers, 1500, 2, 64, dtype=torch.bfloat16)
    index = torch.arange(0, 1500, 2, dtype=torch.int32)
    slots = torch.randperm(800, generator=g, device="cpu")[:750].int().to(kernel.device)
    k_dst, v_dst = (torch.zeros(layers, 800, 2, 64, dtype=torch.bfloat16) for _ in range(2))
    compact(index, slots, k, v, k_dst, v_dst, [])
    assert torch.equal(k_dst[:, slots.long()], k[:, ::2]) and torch.equal(v_dst[:, slots.long()], v[:, ::2])


@all_cases
def test_rows_or_keys_only(kernel: Case) -> None:
    src, dst = torch.arange(6.0).view(3, 2), torch.zeros(2, 2)
    compact(ints([2, 0]), None, None, None, None, None, [(src, dst)])
    assert dst.tolist() == [[4.0, 5.0], [0.0, 1.0]]
    k, out = torch.arange(6.0).view(1, 3, 1, 2), torch.zeros(1, 4, 1, 2)
    compact(ints([1]), ints([3]), k, None, out, None, [])
    assert out.flatten().tolist() == [0, 0, 0, 0, 0, 0, 2.0, 3.0]


def follow(index: Tensor, slots: Tensor | None, pairs: Pairs, rows: Pairs) -> None:
    """Runs the op and compares all of every destination with the loop."""
    want = [(src, dst.clone()) for src, dst in pairs], [(src, dst.clone()) for src, dst in rows]
    loop(index, slots, *want)
    (k_src, k_dst), (v_src, v_dst) = pairs if pairs else [(None, None)] * 2
    compact(index, slots, k_src, v_src, k_dst, v_dst, rows)
    for (_, right), (_, got) in zip([*want[0], *want[1]], [*pairs, *rows], strict=True):
        assert raw(right) == raw(got)


def raw(t: Tensor) -> bytes:
    return t.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@all_cases
def test_rows_of_every_size(kernel: Case) -> None:
    """Bytes that no wider unit divides, units of every width, views that are aligned to one element only."""
    g = torch.Generator().manual_seed(3)
    index = ints([4, -1, 0, 6, -1])
    rows: Pairs = []
    for width in (1, 2, 3, 4, 7, 8, 15, 16, 24, 1025):
        rows.append((random(g, 7, width, dtype=torch.uint8), torch.full((6, width), 9, dtype=torch.uint8)))
    for dtype in (torch.int16, torch.int32, torch.float32, torch.int64, torch.float64):
        wide = random(g, 7, 40, dtype=dtype)
        rows.append((wide[:, 1:34], torch.full((5, 50), 9, dtype=dtype)[:, 3:36]))
    follow(index, None, [], rows)


@all_cases
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.bool, torch.float16], ids=str)
def test_other_dtypes(kernel: Case, dtype: torch.dtype) -> None:
    every_kind_of_pair(dtype)


@kernel_cases
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16], ids=str)
def test_dtypes_that_torch_cannot_index(kernel: Case, dtype: torch.dtype) -> None:
    every_kind_of_pair(dtype)


def every_kind_of_pair(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(4)

    def typed(*shape: int) -> Tensor:
        if dtype is torch.bool:
            return random(g, *shape) > 0
        numbers = random(g, *shape, 16, dtype=torch.uint8)[..., : dtype.itemsize].contiguous()
        return numbers.view(dtype).squeeze(-1)

    pairs = [(typed(2, 6, 2, 3), typed(2, 9, 2, 3)) for _ in range(2)]
    rows = [(typed(6), typed(4)), (typed(6, 5), typed(4, 5)), (typed(3, 6).t(), typed(3, 4).t())]
    index, slots = ints([5, -1, 2, 0]), ints([0, 3, -1, 8])
    want = [dst.clone() for _, dst in (*pairs, *rows)]
    for i, row in enumerate(index.tolist()):
        if row >= 0:
            for (src, _), dst in zip(pairs, want[:2], strict=True):
                if slots[i] >= 0:
                    dst[:, int(slots[i])] = src[:, row]
            for (src, _), dst in zip(rows, want[2:], strict=True):
                dst[i] = src[row]
    compact(index, slots, pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1], rows)
    for right, (_, got) in zip(want, (*pairs, *rows), strict=True):
        assert raw(right) == raw(got)


@all_cases
def test_more_pairs_than_a_launch_takes(kernel: Case) -> None:
    g = torch.Generator().manual_seed(5)
    rows = [(random(g, 9, 1 + i % 5), torch.full((4, 1 + i % 5), torch.nan)) for i in range(21)]
    follow(ints([8, 3, -1, 0]), None, [], rows)


@all_cases
def test_dimensions_in_any_order(kernel: Case) -> None:
    g = torch.Generator().manual_seed(6)
    src, dst = random(g, 3, 4, 2, 6), torch.full((3, 5, 4, 2), torch.nan)
    rows = [
        (src.permute(3, 0, 1, 2), dst.permute(1, 0, 2, 3)),
        (src.permute(3, 2, 1, 0), torch.full((4, 2, 4, 3), torch.nan)),
        (src[0, 0, :1].t(), torch.full((4, 1), torch.nan)),
        (random(g, 6, 1)[:, :0], torch.full((4, 0), torch.nan)),
        (random(g, 1, 3).expand(6, 3), torch.full((4, 3), torch.nan)),
    ]
    follow(ints([1, -1, 5, 0]), None, [], rows)


@all_cases
@pytest.mark.parametrize("alive", [0.0, 0.1, 1.0])
def test_long_index(kernel: Case, alive: float) -> None:
    """More blocks of entries than programs: alive ones first, and dead ones between them too."""
    g = torch.Generator().manual_seed(7)
    t, m = 300, 400 if kernel.interpreted else 7000
    chosen = torch.randint(0, t, (m,), generator=g, device="cpu").int()
    keep = torch.rand(m, generator=g, device="cpu") < alive
    index = torch.where(keep, chosen, -1).to(kernel.device)
    slots = torch.randperm(m, generator=g, device="cpu").int().to(kernel.device)
    pairs = [(random(g, 3, t, 1, d), torch.full((3, m, 1, d), torch.nan)) for d in (8, 6)]
    rows = [(random(g, t, 2), torch.full((m, 2), torch.nan))]
    want = [dst.clone() for _, dst in (*pairs, *rows)]
    at = keep.nonzero().flatten().to(kernel.device)
    for (src, _), dst in zip(pairs, want[:2], strict=True):
        dst[:, slots[at].long()] = src[:, index[at].long()]
    want[2][at] = rows[0][0][index[at].long()]
    compact(index, slots, pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1], rows)
    for right, (_, got) in zip(want, (*pairs, *rows), strict=True):
        assert torch.equal(bits(right), bits(got))


@all_cases
def test_nothing_to_do(kernel: Case) -> None:
    """No layers, no entries, no rows: no tensor is touched."""
    out = torch.full((1, 3, 1, 2), torch.nan)
    compact(ints([1]), ints([0]), torch.zeros(0, 4, 1, 2), None, torch.zeros(0, 3, 1, 2), None, [])
    compact(ints([]), ints([]), torch.zeros(1, 4, 1, 2), None, out, None, [])
    compact(ints([-1]), ints([0]), torch.zeros(1, 0, 1, 2), None, out, None, [])
    compact(ints([-1, -1]), ints([0, 1]), torch.zeros(1, 4, 1, 2), None, out, None, [])
    assert out.isnan().all()


def test_bad_arguments() -> None:
    buffer = torch.zeros(1, 8, 1, 4)
    index = ints([0])
    with pytest.raises(ValueError, match=r"k_dst.*overlap"):
        compact(index, index, buffer[:, :5], None, buffer[:, 4:], None, [])
    with pytest.raises(ValueError, match="overlap"):
        compact(index, None, None, None, None, None, [(buffer[0], buffer[0])])
    with pytest.raises(ValueError, match="slots"):
        compact(index, None, buffer, None, buffer.clone(), None, [])
    with pytest.raises(ValueError, match="together"):
        compact(index, index, buffer, None, None, None, [])
    with pytest.raises(TypeError, match="k_dst"):
        compact(index, index, buffer, None, buffer.bfloat16(), None, [])
    with pytest.raises(TypeError, match="index"):
        compact(index.long(), index, buffer, None, buffer.clone(), None, [])
    with pytest.raises(ValueError, match=r"rows\[0\]"):
        compact(index, None, None, None, None, None, [(torch.zeros(3, 2), torch.zeros(1, 3))])


def test_gradients_flow() -> None:
    """While autograd records, the copies are differentiable: the gradient of a row is that of where it went."""
    src = torch.randn(2, 4, 1, 3, requires_grad=True)
    hidden = torch.randn(4, 5, requires_grad=True)
    dst, out = torch.zeros(2, 6, 1, 3), torch.zeros(3, 5)
    compact(ints([3, -1, 0]), ints([2, 1, 5]), src, None, dst, None, [(hidden, out)])
    at_dst, at_out = torch.randn(2, 6, 1, 3), torch.randn(3, 5)
    found = torch.autograd.grad((dst * at_dst).sum() + (out * at_out).sum(), (src, hidden))
    want_src, want_hidden = torch.zeros(2, 4, 1, 3), torch.zeros(4, 5)
    want_src[:, 3], want_src[:, 0] = at_dst[:, 2], at_dst[:, 5]
    want_hidden[3], want_hidden[0] = at_out[0], at_out[2]
    assert torch.equal(found[0], want_src) and torch.equal(found[1], want_hidden)

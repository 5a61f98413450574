# SPDX-License-Identifier: Apache-2.0
"""`attention` on every backend and instruction set against plain PyTorch, segment by segment."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from glimpse_kernels import attention
from glimpse_kernels.attention.naive import attention as naive_attention
from tests.kernels.attention_cases import check, per_segment
from tests.kernels.kernel_cases import Case, assert_as_good_as, cu_seqlens, fused_views, op_cases

all_cases = pytest.mark.parametrize("kernel", op_cases("attention"), indirect=True)


@all_cases
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("lq", "lk", "heads", "dims"),
    [
        ([1], [1], (1, 1), (1, 1)),
        ([7, 0, 65, 1], [7, 0, 65, 1], (4, 2), (128, 128)),
        ([64, 64, 17], [64, 64, 17], (3, 3), (80, 80)),
        ([130], [130], (4, 4), (192, 64)),
        ([33, 2], [70, 129], (6, 1), (32, 48)),
        ([5, 3, 0, 4], [9, 0, 6, 4], (14, 2), (37, 19)),
        ([300], [300], (7, 1), (64, 64)),
        ([20, 2], [33, 3], (2, 1), (256, 31)),
    ],
    ids=lambda value: "x".join(map(str, value)),
)
def test_segments(
    kernel: Case, lq: list[int], lk: list[int], heads: tuple[int, int], dims: tuple[int, int], causal: bool
) -> None:
    check(kernel, lq, lk, heads, dims, causal=causal)


@all_cases
def test_more_queries_than_keys_leaves_rows_without_keys(kernel: Case) -> None:
    check(kernel, [9, 70], [4, 3], (2, 1), (16, 16), causal=True)


@all_cases
def test_positions_of_gathered_queries(kernel: Case) -> None:
    lk = [150, 40]
    rows = [torch.tensor([0, 3, 64, 65, 127, 149]), torch.tensor([39, 7, 0, -1])]
    check(kernel, [6, 4], lk, (4, 2), (64, 64), causal=True, positions=torch.cat(rows))


@all_cases
def test_positions_past_the_end_see_everything(kernel: Case) -> None:
    check(kernel, [3], [70], (2, 2), (16, 8), causal=True, positions=torch.tensor([69, 70, 2**31 - 1]))


@all_cases
@pytest.mark.parametrize("scale", [0.3, 1.0, -0.2, 0.0])
def test_scale(kernel: Case, scale: float) -> None:
    check(kernel, [40], [90], (2, 1), (24, 24), causal=True, scale=scale)


@all_cases
def test_large_logits(kernel: Case) -> None:
    """Logits of several hundred: the running maximum has to be subtracted everywhere."""
    check(kernel, [50], [200], (2, 2), (64, 64), causal=False, spread=60.0)


@all_cases
def test_maximum_in_every_place(kernel: Case) -> None:
    """A dominant key in each tile position in turn, so that the running maximum moves at every step or never."""
    assert kernel.dtype is not None
    keys, dim = 200, 16
    for order in (torch.arange(keys), torch.arange(keys).flip(0)):
        q = (1 + 0.1 * torch.randn(20, 1, dim)).to(kernel.dtype)
        k = (order.float()[:, None, None] / 20 + 0.1 * torch.randn(keys, 1, dim)).to(kernel.dtype)
        v = torch.randn(keys, 1, dim).to(kernel.dtype)
        truth, same, _ = per_segment(q, k, v, [20], [keys], False, None, None)
        out = attention(q, k, v, cu_seqlens([20]), cu_seqlens([keys]), causal=False)
        assert_as_good_as(out, same, truth)


@all_cases
def test_views_into_a_fused_buffer(kernel: Case) -> None:
    assert kernel.dtype is not None
    q, k, v = (torch.randn(75, h, 40).to(kernel.dtype) for h in (4, 2, 2))
    bounds = cu_seqlens([30, 45])
    whole = attention(q, k, v, bounds, bounds, causal=True)
    fq, fk, fv = fused_views(q, k, v)
    assert fq.stride(0) == 8 * 40
    assert torch.equal(attention(fq, fk, fv, bounds, bounds, causal=True), whole)
    out = torch.full((75, 4, 2, 40), float("nan"), dtype=kernel.dtype)[:, :, 1]
    returned = attention(q, k, v, bounds, bounds, causal=True, out=out)
    assert returned.data_ptr() == out.data_ptr()
    assert torch.equal(out, whole)


@all_cases
def test_segment_alone_equals_segment_in_batch(kernel: Case) -> None:
    """A segment's result does not depend on its neighbours; in the kernels not even in the last bit."""
    assert kernel.dtype is not None
    lengths = [70, 1, 129]
    q, k, v = (torch.randn(sum(lengths), h, 32).to(kernel.dtype) for h in (4, 2, 2))
    bounds = cu_seqlens(lengths)
    whole = attention(q, k, v, bounds, bounds, causal=True)
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        own = cu_seqlens([stop - start])
        alone = attention(q[start:stop], k[start:stop], v[start:stop], own, own, causal=True)
        if kernel.backend == "naive":
            torch.testing.assert_close(
                whole[start:stop], alone, rtol=0, atol=2 * torch.finfo(kernel.dtype).eps
            )
        else:
            assert torch.equal(whole[start:stop], alone)


@all_cases
def test_no_rows_and_no_segments(kernel: Case) -> None:
    assert kernel.dtype is not None
    q, k, v = (torch.randn(0, h, 8).to(kernel.dtype) for h in (4, 2, 2))
    assert attention(q, k, v, cu_seqlens([]), cu_seqlens([]), causal=True).shape == (0, 4, 8)
    assert attention(q, k, v, cu_seqlens([0, 0]), cu_seqlens([0, 0]), causal=True).shape == (0, 4, 8)
    q = torch.randn(5, 4, 8).to(kernel.dtype)
    out = attention(q, k, v, cu_seqlens([]), cu_seqlens([]), causal=True)
    assert torch.equal(out, torch.zeros_like(out))


@all_cases
def test_nan_in_a_visible_key_is_not_hidden(kernel: Case) -> None:
    assert kernel.dtype is not None
    q, k, v = (torch.randn(4, 1, 8).to(kernel.dtype) for _ in range(3))
    k[1, 0, 3] = float("nan")
    out = attention(q, k, v, cu_seqlens([4]), cu_seqlens([4]), causal=True)
    assert not out[0].isnan().any()
    assert out[1:].isnan().all()


@pytest.mark.parametrize("kernel", [p for p in op_cases("attention") if "cpu" in str(p.id)], indirect=True)  # type: ignore[attr-defined]
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_packing(kernel: Case, data: st.DataObject) -> None:
    """Random packings against the definition."""
    assert kernel.dtype is not None
    lengths = data.draw(st.lists(st.tuples(st.integers(0, 70), st.integers(0, 140)), min_size=1, max_size=4))
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    dim, v_dim = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    causal = data.draw(st.booleans())
    lq, lk = [a for a, _ in lengths], [b for _, b in lengths]
    q = torch.randn(sum(lq), kv_heads * group, dim).to(kernel.dtype)
    k = torch.randn(sum(lk), kv_heads, dim).to(kernel.dtype)
    v = torch.randn(sum(lk), kv_heads, v_dim).to(kernel.dtype)
    bounds = cu_seqlens(lq), cu_seqlens(lk)
    out, lse = attention(q, k, v, *bounds, causal=causal, return_lse=True)
    want, want_lse = naive_attention(q.float(), k.float(), v.float(), *bounds, causal=causal, return_lse=True)
    eps = torch.finfo(kernel.dtype).eps
    bound = (
        (2 if kernel.dtype is torch.bfloat16 else 16)
        * eps
        * max(1.0, v.abs().max().item() if v.numel() else 1.0)
    )
    torch.testing.assert_close(out.float(), want, rtol=0, atol=bound)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)


def test_definition_is_differentiable() -> None:
    q, k, v = (torch.randn(6, h, 4, requires_grad=True) for h in (2, 1, 1))
    bounds = cu_seqlens([2, 4])
    attention(q, k, v, bounds, bounds, causal=True).square().sum().backward()
    grads = [t.grad.clone() for t in (q, k, v)]  # type: ignore[union-attr]
    for t in (q, k, v):
        t.grad = None
    total = torch.zeros(())
    for a, b in ((0, 2), (2, 6)):
        part = F.scaled_dot_product_attention(
            q[a:b].transpose(0, 1),
            k[a:b].expand(-1, 2, -1).transpose(0, 1),
            v[a:b].expand(-1, 2, -1).transpose(0, 1),
            is_causal=True,
        )
        total = total + part.square().sum()
    total.backward()
    for found, t in zip(grads, (q, k, v), strict=True):
        torch.testing.assert_close(found, t.grad)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k": torch.zeros(4, 2, 9)}, ValueError, "k: expected shape"),
        ({"v": torch.zeros(5, 2, 8)}, ValueError, "v: expected shape"),
        ({"q": torch.zeros(4, 3, 8)}, ValueError, "multiple of Hkv = 2"),
        ({"k": torch.zeros(4, 2, 8, dtype=torch.bfloat16)}, TypeError, "k: expected dtype float32"),
        ({"cu_seqlens_q": torch.tensor([0, 4])}, TypeError, "cu_seqlens_q: expected dtype int32"),
        ({"cu_seqlens_k": torch.tensor([0, 2, 4], dtype=torch.int32)}, ValueError, "cu_seqlens_k"),
        ({"q_positions": torch.zeros(4, dtype=torch.int32), "causal": False}, ValueError, "q_positions"),
        (
            {"q_positions": torch.zeros(3, dtype=torch.int32)},
            ValueError,
            r"q_positions: expected shape \[Tq\]",
        ),
        ({"out": torch.zeros(4, 4, 9)}, ValueError, "out: expected shape"),
        ({"q": torch.zeros(4, 8, 4).transpose(1, 2)}, ValueError, "contiguous last dimension"),
        ({"q": torch.zeros(4, 8)}, ValueError, "expected shapes"),
    ],
)
def test_wrong_arguments(change: dict[str, object], error: type[Exception], words: str) -> None:
    bounds = torch.tensor([0, 4], dtype=torch.int32)
    given_arguments: dict[str, object] = {
        "q": torch.zeros(4, 4, 8),
        "k": torch.zeros(4, 2, 8),
        "v": torch.zeros(4, 2, 8),
        "cu_seqlens_q": bounds,
        "cu_seqlens_k": bounds,
        "causal": True,
    }
    given_arguments.update(change)
    with pytest.raises(error, match=words):
        attention(**given_arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "kernel", [p for p in op_cases("attention") if "cpu" in str(p.id)][:1], indirect=True
)  # type: ignore[attr-defined]
@pytest.mark.parametrize("bounds", [[0, 5], [0, 3, 2, 4], [-1, 4]])
def test_bounds_outside_the_rows(kernel: Case, bounds: list[int]) -> None:
    q, k, v = (torch.zeros(4, 1, 8, dtype=kernel.dtype) for _ in range(3))
    good = torch.linspace(0, 4, len(bounds)).int()
    with pytest.raises(ValueError, match="cu_seqlens_k"):
        attention(q, k, v, good, torch.tensor(bounds, dtype=torch.int32), causal=False)


def assert_like_the_definition(q: Tensor, k: Tensor, v: Tensor, tolerance: float = 2e-3) -> None:
    """Output and lse of one full segment, NaN and infinities included."""
    bounds_q, bounds_k = cu_seqlens([q.shape[0]]), cu_seqlens([k.shape[0]])
    out, lse = attention(q, k, v, bounds_q, bounds_k, causal=False, return_lse=True)
    want, want_lse = naive_attention(q, k, v, bounds_q, bounds_k, causal=False, return_lse=True)
    rounding = tolerance if q.dtype is torch.float32 else 2e-2
    torch.testing.assert_close(out.float(), want.float(), rtol=rounding, atol=rounding, equal_nan=True)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5, equal_nan=True)


@all_cases
@pytest.mark.parametrize("keys", [5, 64, 150])
def test_a_query_of_nan_gives_nan(kernel: Case, keys: int) -> None:
    assert kernel.dtype is not None
    q, k, v = (torch.randn(n, 2, 24).to(kernel.dtype) for n in (9, keys, keys))
    q[4, 1] = float("nan")
    out, lse = attention(q, k, v, cu_seqlens([9]), cu_seqlens([keys]), causal=False, return_lse=True)
    assert out[4, 1].isnan().all() and lse[4, 1].isnan()
    assert out.isnan().sum() == 24 and lse.isnan().sum() == 1
    assert_like_the_definition(q, k, v)
    k[0] = float("nan")  # one bad key is in every row's sum
    assert attention(q, k, v, cu_seqlens([9]), cu_seqlens([keys]), causal=False).isnan().all()


@all_cases
def test_logits_of_minus_infinity(kernel: Case) -> None:
    """A whole tile of keys with logits -inf (the products overflow), alone and in front of keys with the logit 0."""
    assert kernel.dtype is not None
    q = torch.full((7, 2, 16), 1e30).to(kernel.dtype)
    k = torch.full((70, 1, 16), -1e30).to(kernel.dtype)
    v = torch.randn(70, 1, 16).to(kernel.dtype)
    k[64:] = 0
    if kernel.dtype is torch.float16:  # its largest number is 65504: there is no overflow in fp32
        return assert_like_the_definition(q.clamp(max=6e4), k.clamp(min=-6e4), v)
    assert_like_the_definition(q, k, v)
    assert_like_the_definition(q, k[:64], v[:64])
    assert_like_the_definition(q, k[:3], v[:3])


@all_cases
@pytest.mark.parametrize("keys", [5, 64, 150])
def test_very_large_logits(kernel: Case, keys: int) -> None:
    """Where one key takes all of the weight, its value is the output, however large the logits are."""
    assert kernel.dtype is not None
    q, k, v = (torch.randn(n, 2, 32) for n in (9, keys, keys))
    q = q * (1e3 if kernel.dtype is torch.float16 else 1e10)
    q, k, v = (t.to(kernel.dtype) for t in (q, k, v))
    logits = torch.einsum("ihd,jhd->hij", q.double(), k.double())
    best, top = logits.topk(2).values.unbind(-1)
    assert ((best - top) > 1e-5 * best.abs()).all()  # no near-ties, which fp32 could order either way
    out = attention(q, k, v, cu_seqlens([9]), cu_seqlens([keys]), causal=False)
    heads = torch.arange(2)[:, None]
    want = v.transpose(0, 1)[heads, logits.argmax(-1)].transpose(0, 1)
    if kernel.dtype is not torch.float16:
        assert torch.equal(out, want)
    assert_like_the_definition(q, k, v)


@all_cases
def test_no_query_heads_and_no_value_dimensions(kernel: Case) -> None:
    bounds = cu_seqlens([3])
    q, k = torch.randn(3, 2, 8).to(kernel.dtype), torch.randn(3, 2, 8).to(kernel.dtype)
    out, lse = attention(q[:, :0], k, k, bounds, bounds, causal=True, return_lse=True)
    assert out.shape == (3, 0, 8) and lse.shape == (3, 0)
    out, lse = attention(q, k, k[..., :0], bounds, bounds, causal=True, return_lse=True)
    assert out.shape == (3, 2, 0)
    torch.testing.assert_close(lse, attention(q, k, k, bounds, bounds, causal=True, return_lse=True)[1])
    with pytest.raises(ValueError, match="head dimension D of at least 1"):
        attention(q[..., :0], k[..., :0], k, bounds, bounds, causal=True)


def test_not_a_tensor() -> None:
    x, bounds = torch.randn(3, 2, 8), cu_seqlens([3])
    with pytest.raises(TypeError, match=r"attention: q: expected a torch.Tensor, found list"):
        attention([1], x, x, bounds, bounds, causal=True)  # type: ignore[call-overload]

# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of `attention`; `triton.py` says why they are as they are.

Words: a token is a row of q; a tile row is token * GROUP + (query head within its group). D0 + D1 and V0 + V1 are the parts of
the head sizes D and DV (the second 0 if there is one). `limit` of a tile row is the last key it sees, counted in its segment,
at most the segment's last; -1: none.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _segment_of(
    cu_ptr,
    segments,
    value,
    FACTOR: tl.constexpr,
    UNIT: tl.constexpr,
    EACH: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """The last b with cu[b] * FACTOR // UNIT + b * EACH <= value, -1 if none.

    All bounds are compared, SEARCH at a time: no load waits for another one, as those of a binary search do.
    """
    count = 0
    for first in range(0, segments + 1, SEARCH):
        b = first + tl.arange(0, SEARCH)
        start = tl.load(cu_ptr + b, mask=b <= segments, other=0) * FACTOR // UNIT + b * EACH
        count += tl.sum(((start <= value) & (b <= segments)).to(tl.int32), 0)
    return count - 1


@triton.jit
def _load_part(ptrs, columns, rows_ok, COUNT: tl.constexpr, BASE: tl.constexpr, SIZE: tl.constexpr):
    """Columns BASE to BASE + SIZE of the rows at `ptrs`, 0 where a row is not ok or a column is not below COUNT."""
    if BASE + SIZE <= COUNT:
        return tl.load(ptrs + BASE + columns[None, :], mask=rows_ok[:, None], other=0.0)
    else:
        return tl.load(
            ptrs + BASE + columns[None, :],
            mask=rows_ok[:, None] & (BASE + columns < COUNT)[None, :],
            other=0.0,
        )


@triton.jit
def _load_q(q_ptr, tokens, heads, ok, stride_t, stride_h, COUNT: tl.constexpr, BASE: tl.constexpr, SIZE: tl.constexpr,
            SIGN: tl.constexpr):  # fmt: skip
    ptrs = q_ptr + tokens.to(tl.int64)[:, None] * stride_t + heads.to(tl.int64)[:, None] * stride_h
    q = _load_part(ptrs, tl.arange(0, SIZE), ok, COUNT, BASE, SIZE)
    if SIGN < 0:
        q = (-q.to(tl.float32)).to(q.dtype)
    if SIGN == 0:
        q = (q.to(tl.float32) * 0.0).to(q.dtype)
    return q


@triton.jit
def _load_keys(
    source, head, row, count, begin, stride_t, stride_h,
    DIM: tl.constexpr, BASE: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows begin + row to begin + row + ROWS of one head, [ROWS, SIZE]. MASKED: rows from `count` on are 0 by plain loads and
    anything at all by a descriptor."""
    if DESCRIPTORS:
        return source.load([begin + row, head, BASE]).reshape([ROWS, SIZE])
    else:
        base = source + (begin + row).to(tl.int64) * stride_t + head.to(tl.int64) * stride_h + BASE
        rows = tl.arange(0, ROWS)
        columns = tl.arange(0, SIZE)
        ptrs = base + rows.to(tl.int64)[:, None] * stride_t + columns[None, :]
        if MASKED:
            ok = (row + rows < count)[:, None]
            if BASE + SIZE > DIM:
                ok = ok & (BASE + columns < DIM)[None, :]
            return tl.load(ptrs, mask=ok, other=0.0)
        else:
            if BASE + SIZE > DIM:
                return tl.load(ptrs, mask=(BASE + columns < DIM)[None, :], other=0.0)
            else:
                return tl.load(ptrs)


@triton.jit
def _attend(
    top, total, acc0, acc1, q0, q1,
    k0, k1, v0, v1, head, first, last, limit, k_begin, k_count, scale_log2,
    stride_kt, stride_kh, stride_vt, stride_vh,
    D: tl.constexpr, DV: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, DESCRIPTORS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys `first` to `last` (both counted in the segment; `first` a multiple of BLOCK_N).

    top: running maximum of the raw products, total: sum of the weights, acc0, acc1: weighted sums of the parts of v.
    """
    for n in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        key = _load_keys(
            k0, head, n, k_count, k_begin, stride_kt, stride_kh, D, 0, D0, BLOCK_N, DESCRIPTORS, MASKED
        )
        logits = tl.dot(q0, tl.trans(key), input_precision="ieee")
        if D1 > 0:
            key1 = _load_keys(
                k1, head, n, k_count, k_begin, stride_kt, stride_kh, D, D0, D1, BLOCK_N, DESCRIPTORS, MASKED
            )
            logits = tl.dot(q1, tl.trans(key1), logits, input_precision="ieee")
        if MASKED:
            cols = n + tl.arange(0, BLOCK_N)
            if CAUSAL:
                logits = tl.where(cols[None, :] <= limit[:, None], logits, float("-inf"))
            else:
                logits = tl.where((cols < k_count)[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2((logits - shift[:, None]) * scale_log2)
        fade = tl.exp2((top - shift) * scale_log2)
        total = total * fade + tl.sum(weights, 1)
        top = new_top
        value = _load_keys(
            v0,
            head,
            n,
            k_count,
            k_begin,
            stride_vt,
            stride_vh,
            DV,
            0,
            V0,
            BLOCK_N,
            DESCRIPTORS and not MASKED,
            MASKED,
        )
        weights = weights.to(value.dtype)
        acc0 = tl.dot(weights, value, acc0 * fade[:, None], input_precision="ieee")
        if V1 > 0:
            value1 = _load_keys(
                v1,
                head,
                n,
                k_count,
                k_begin,
                stride_vt,
                stride_vh,
                DV,
                V0,
                V1,
                BLOCK_N,
                DESCRIPTORS and not MASKED,
                MASKED,
            )
            acc1 = tl.dot(weights, value1, acc1 * fade[:, None], input_precision="ieee")
    return top, total, acc0, acc1


@triton.jit
def _lse(top, total, scale):
    """Log of the sum: -inf where nothing, or nothing but -inf, was added."""
    return tl.where(total == 0.0, float("-inf"), top * scale + tl.log(tl.where(total == 0.0, 1.0, total)))


@triton.jit
def _limits(
    positions_ptr, tokens, ok, q_begin, q_count, k_count, CAUSAL: tl.constexpr, POSITIONS: tl.constexpr
):
    """Last visible key of each tile row, -1 for none and for rows that are not ok."""
    if POSITIONS:
        limit = tl.load(positions_ptr + tokens, mask=ok, other=-1)
        limit = tl.maximum(tl.minimum(limit, k_count - 1), -1)
    elif CAUSAL:
        limit = tl.maximum(tl.where(ok, tokens - q_begin + k_count - q_count, -1), -1)
    else:
        limit = tl.where(ok, k_count - 1, -1)
    return limit


@triton.jit
def _store_part(
    ptr,
    values,
    tokens,
    heads,
    ok,
    stride_t,
    stride_h,
    COUNT: tl.constexpr,
    BASE: tl.constexpr,
    SIZE: tl.constexpr,
):
    columns = BASE + tl.arange(0, SIZE)
    ptrs = (
        ptr
        + tokens.to(tl.int64)[:, None] * stride_t
        + heads.to(tl.int64)[:, None] * stride_h
        + columns[None, :]
    )
    tl.store(ptrs, values.to(ptr.dtype.element_ty), mask=ok[:, None] & (columns < COUNT)[None, :])


@triton.jit
def _blank(
    out_ptr, lse_ptr, head, first, last, step, stride_ot, stride_oh, q_heads,
    GROUP: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, BLOCK_M: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """Output 0 and lse -inf for the tile rows first, first + step, ... below `last`: rows outside all segments."""
    for begin in range(first, last, step):
        row = begin + tl.arange(0, BLOCK_M)
        ok = row < last
        heads = head * GROUP + row % GROUP
        tokens = row // GROUP
        _store_part(
            out_ptr, tl.zeros([BLOCK_M, V0], tl.float32), tokens, heads, ok, stride_ot, stride_oh, DV, 0, V0
        )
        if V1 > 0:
            _store_part(
                out_ptr,
                tl.zeros([BLOCK_M, V1], tl.float32),
                tokens,
                heads,
                ok,
                stride_ot,
                stride_oh,
                DV,
                V0,
                V1,
            )
        if LSE:
            nothing = tl.full([BLOCK_M], float("-inf"), tl.float32)
            tl.store(lse_ptr + tokens.to(tl.int64) * q_heads + heads, nothing, mask=ok)


@triton.jit(do_not_specialize=["q_rows", "k_rows", "segments", "tiles", "tiles_each"])
def attention_kernel(
    q_ptr, k_ptr, v_ptr, k0, k1, v0, v1, positions_ptr, cu_q_ptr, cu_k_ptr, out_ptr, lse_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    scale_log2, scale, q_rows, k_rows, segments, kv_heads, tiles, tiles_each,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    CAUSAL: tl.constexpr, POSITIONS: tl.constexpr, SIGN: tl.constexpr, LSE: tl.constexpr, SEARCH: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of query rows of one key head against all keys that it sees. Grid: tiles * kv_heads, heads fastest: programs
    that run together read the same tokens, and the long tiles of a causal launch come first whatever the head.

    tiles: programs for each head. tiles_each: of them for each segment, where SEARCH is 0; else SEARCH bounds are compared at
    a time to find the segment.
    """
    program = tl.program_id(0)
    head = program % kv_heads
    slot = program // kv_heads
    q_heads = kv_heads * GROUP

    # Rows before the first and after the last segment are shared out among all programs; most often there are none.
    lead = tl.minimum(tl.load(cu_q_ptr), q_rows) * GROUP
    tail = tl.minimum(tl.load(cu_q_ptr + segments), q_rows) * GROUP
    _blank(out_ptr, lse_ptr, head, slot * BLOCK_M, lead, tiles * BLOCK_M, stride_ot, stride_oh, q_heads,
           GROUP, DV, V0, V1, BLOCK_M, LSE)  # fmt: skip
    _blank(out_ptr, lse_ptr, head, tail + slot * BLOCK_M, q_rows * GROUP, tiles * BLOCK_M, stride_ot, stride_oh, q_heads,
           GROUP, DV, V0, V1, BLOCK_M, LSE)  # fmt: skip

    if SEARCH == 0:
        if CAUSAL:
            segment = slot % segments
            tile = tiles_each - 1 - slot // segments
        else:
            segment = slot // tiles_each
            tile = slot % tiles_each
    else:
        if CAUSAL:
            slot = tiles - 1 - slot
        segment = _segment_of(cu_q_ptr, segments, slot, GROUP, BLOCK_M, 1, SEARCH)
        if (segment < 0) | (segment >= segments):
            return
        tile = slot - (tl.load(cu_q_ptr + segment) * GROUP // BLOCK_M + segment)
    q_begin = tl.load(cu_q_ptr + segment)
    q_count = tl.minimum(tl.load(cu_q_ptr + segment + 1), q_rows) - q_begin
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if tile * BLOCK_M >= q_count * GROUP:
        return
    k_begin = tl.load(cu_k_ptr + segment)
    k_count = tl.minimum(tl.load(cu_k_ptr + segment + 1), k_rows) - k_begin

    ok = row < q_count * GROUP
    tokens = q_begin + row // GROUP
    heads = head * GROUP + row % GROUP
    limit = _limits(positions_ptr, tokens, ok, q_begin, q_count, k_count, CAUSAL, POSITIONS)
    if POSITIONS:
        end = tl.max(limit, 0) + 1
        clear = tl.min(tl.where(ok, limit, k_count), 0) + 1
    elif CAUSAL:
        final = tl.minimum(tile * BLOCK_M + BLOCK_M, q_count * GROUP) - 1
        end = tl.maximum(final // GROUP + k_count - q_count + 1, 0)
        clear = tl.maximum(tile * BLOCK_M // GROUP + k_count - q_count + 1, 0)
    else:
        end = k_count
        clear = k_count
    clear = clear // BLOCK_N * BLOCK_N

    q0 = _load_q(q_ptr, tokens, heads, ok, stride_qt, stride_qh, D, 0, D0, SIGN)
    q1 = q0
    if D1 > 0:
        q1 = _load_q(q_ptr, tokens, heads, ok, stride_qt, stride_qh, D, D0, D1, SIGN)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, V0], tl.float32)
    acc1 = total
    if V1 > 0:
        acc1 = tl.zeros([BLOCK_M, V1], tl.float32)
    top, total, acc0, acc1 = _attend(
        top, total, acc0, acc1, q0, q1, k0, k1, v0, v1, head, 0, clear, limit, k_begin, k_count, scale_log2,
        stride_kt, stride_kh, stride_vt, stride_vh, D, DV, D0, D1, V0, V1, BLOCK_N, CAUSAL, False, DESCRIPTORS, STAGES,
    )  # fmt: skip
    top, total, acc0, acc1 = _attend(
        top, total, acc0, acc1, q0, q1, k0, k1, v_ptr, v_ptr, head, clear, end, limit, k_begin, k_count, scale_log2,
        stride_kt, stride_kh, stride_vt, stride_vh, D, DV, D0, D1, V0, V1, BLOCK_N, CAUSAL, True, DESCRIPTORS, STAGES,
    )  # fmt: skip

    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    _store_part(out_ptr, acc0 * share[:, None], tokens, heads, ok, stride_ot, stride_oh, DV, 0, V0)
    if V1 > 0:
        _store_part(out_ptr, acc1 * share[:, None], tokens, heads, ok, stride_ot, stride_oh, DV, V0, V1)
    if LSE:
        lse = _lse(top, total, scale)
        tl.store(lse_ptr + tokens.to(tl.int64) * q_heads + heads, lse, mask=ok)


@triton.jit(do_not_specialize=["q_rows", "k_rows", "segments", "longest"])
def attention_split_kernel(
    q_ptr, k_ptr, v_ptr, k0, k1, v0, v1, positions_ptr, cu_q_ptr, cu_k_ptr, sums_ptr, logs_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    scale_log2, scale, q_rows, k_rows, segments, longest, kv_heads,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    CAUSAL: tl.constexpr, POSITIONS: tl.constexpr, SIGN: tl.constexpr, SEARCH: tl.constexpr, CHUNK: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All rows of one segment and key head against one chunk of its keys. Grid: chunks * kv_heads, heads fastest.

    Chunk i of segment b has the number cu_k[b] // CHUNK + b + i. sums [chunks, longest, q_heads, DV] fp32: attention over the
    chunk alone, logs [chunks, longest, q_heads] fp32: its lse. Rows that see nothing of the chunk are not always written.
    """
    program = tl.program_id(0)
    head = program % kv_heads
    slot = program // kv_heads
    q_heads = kv_heads * GROUP
    segment = 0
    if SEARCH > 0:
        segment = _segment_of(cu_k_ptr, segments, slot, 1, CHUNK, 1, SEARCH)
        if (segment < 0) | (segment >= segments):
            return
    k_begin = tl.load(cu_k_ptr + segment)
    k_count = tl.minimum(tl.load(cu_k_ptr + segment + 1), k_rows) - k_begin
    q_begin = tl.load(cu_q_ptr + segment)
    q_count = tl.minimum(tl.load(cu_q_ptr + segment + 1), q_rows) - q_begin
    rows = tl.minimum(q_count, longest) * GROUP
    first = (slot - (k_begin // CHUNK + segment)) * CHUNK
    if (first < 0) | (first >= k_count):
        return
    for row0 in range(0, rows, BLOCK_M):
        row = row0 + tl.arange(0, BLOCK_M)
        ok = row < rows
        tokens = q_begin + row // GROUP
        heads = head * GROUP + row % GROUP
        limit = _limits(positions_ptr, tokens, ok, q_begin, q_count, k_count, CAUSAL, POSITIONS)
        end = tl.minimum(tl.max(limit, 0) + 1, first + CHUNK)
        if end > first:
            clear = tl.minimum(tl.min(tl.where(ok, limit, k_count), 0) + 1, first + CHUNK)
            if not CAUSAL:
                clear = tl.minimum(k_count, first + CHUNK)
            clear = tl.maximum(clear // BLOCK_N * BLOCK_N, first)
            q0 = _load_q(q_ptr, tokens, heads, ok, stride_qt, stride_qh, D, 0, D0, SIGN)
            q1 = q0
            if D1 > 0:
                q1 = _load_q(q_ptr, tokens, heads, ok, stride_qt, stride_qh, D, D0, D1, SIGN)
            top = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            acc0 = tl.zeros([BLOCK_M, V0], tl.float32)
            acc1 = total
            if V1 > 0:
                acc1 = tl.zeros([BLOCK_M, V1], tl.float32)
            top, total, acc0, acc1 = _attend(
                top, total, acc0, acc1, q0, q1, k0, k1, v0, v1, head, first, clear, limit, k_begin, k_count, scale_log2,
                stride_kt, stride_kh, stride_vt, stride_vh,
                D, DV, D0, D1, V0, V1, BLOCK_N, CAUSAL, False, DESCRIPTORS, STAGES,
            )  # fmt: skip
            top, total, acc0, acc1 = _attend(
                top, total, acc0, acc1, q0, q1, k0, k1, v_ptr, v_ptr, head, clear, end, limit, k_begin, k_count, scale_log2,
                stride_kt, stride_kh, stride_vt, stride_vh,
                D, DV, D0, D1, V0, V1, BLOCK_N, CAUSAL, True, DESCRIPTORS, STAGES,
            )  # fmt: skip
            share = 1.0 / tl.where(total == 0.0, 1.0, total)
            at = slot.to(tl.int64) * longest + row // GROUP
            _store_part(sums_ptr, acc0 * share[:, None], at, heads, ok, q_heads * DV, DV, DV, 0, V0)
            if V1 > 0:
                _store_part(sums_ptr, acc1 * share[:, None], at, heads, ok, q_heads * DV, DV, DV, V0, V1)
            lse = _lse(top, total, scale)
            tl.store(logs_ptr + at * q_heads + heads, lse, mask=ok)


@triton.jit(do_not_specialize=["q_rows", "k_rows", "segments", "longest"])
def attention_combine_kernel(
    sums_ptr, logs_ptr, out_ptr, lse_ptr, positions_ptr, cu_q_ptr, cu_k_ptr,
    stride_ot, stride_oh, q_rows, k_rows, segments, longest, q_heads,
    DV: tl.constexpr, V: tl.constexpr, CAUSAL: tl.constexpr, POSITIONS: tl.constexpr, LSE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """One query row of one head: its chunks, added in their order, BLOCK at a time. Grid: q_rows * q_heads.

    A row outside all segments, or without a visible key, has no chunks.
    """
    program = tl.program_id(0)
    token = program // q_heads
    head = program % q_heads
    segment = _segment_of(cu_q_ptr, segments, token, 1, 1, 0, SEARCH)
    inside = (segment >= 0) & (segment < segments)
    segment = tl.minimum(tl.maximum(segment, 0), segments - 1)
    q_begin = tl.load(cu_q_ptr + segment)
    q_count = tl.minimum(tl.load(cu_q_ptr + segment + 1), q_rows) - q_begin
    k_begin = tl.load(cu_k_ptr + segment)
    k_count = tl.minimum(tl.load(cu_k_ptr + segment + 1), k_rows) - k_begin
    seen = k_count
    if POSITIONS:
        seen = tl.minimum(tl.load(positions_ptr + token), k_count - 1) + 1
    elif CAUSAL:
        seen = token - q_begin + k_count - q_count + 1
    chunks = tl.where(inside, (tl.maximum(seen, 0) + CHUNK - 1) // CHUNK, 0)
    slot = k_begin // CHUNK + segment

    columns = tl.arange(0, V)
    top = -float("inf")
    total = 0.0
    acc = tl.zeros([V], tl.float32)
    for first in range(0, chunks, BLOCK):
        chunk = first + tl.arange(0, BLOCK)
        at = ((slot + chunk).to(tl.int64) * longest + (token - q_begin)) * q_heads + head
        logs = tl.load(logs_ptr + at, mask=chunk < chunks, other=float("-inf"))
        sums = tl.load(
            sums_ptr + at[:, None] * DV + columns[None, :],
            mask=(chunk < chunks)[:, None] & (columns < DV)[None, :],
            other=0.0,
        )
        new_top = tl.maximum(top, tl.max(logs, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp(logs - shift)
        fade = tl.exp(top - shift)
        total = total * fade + tl.sum(weights, 0)
        acc = acc * fade + tl.sum(sums * weights[:, None], 0)
        top = new_top
    out = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(
        out_ptr + token.to(tl.int64) * stride_ot + head.to(tl.int64) * stride_oh + columns,
        out.to(out_ptr.dtype.element_ty),
        mask=columns < DV,
    )
    if LSE:
        tl.store(lse_ptr + program, _lse(top, total, 1.0))

// SPDX-License-Identifier: Apache-2.0
// Rotary embedding of q and k with the write of k and v to the cache: each token's heads share its cosines and sines.
#include "glimpse/rope.h"

#include "cpu/vec.h"

namespace glimpse::GLIMPSE_ISA_NS {
namespace {

// Rotates one head from x to y (x == y is allowed), `vectors` vectors of each half at a time; the last may hold `last` < kLanes
// lanes. All are read before the first is written: a load that touches bytes of a store still under way has to wait for it.
template <class T, int vectors>
GLIMPSE_INLINE void rotate(const T* x, T* y, const float* cos, const float* sin, int64_t half, int last) {
  vf first[vectors], second[vectors];
#pragma GCC unroll 4
  for (int j = 0; j < vectors; ++j) {
    const int64_t i = j * kLanes;
    const bool whole = j + 1 < vectors || last == kLanes;
    const vf a = whole ? load(x + i) : load_n(x + i, last), b = whole ? load(x + half + i) : load_n(x + half + i, last);
    const vf c = whole ? load(cos + i) : load_n(cos + i, last), s = whole ? load(sin + i) : load_n(sin + i, last);
    first[j] = a * c - b * s;
    second[j] = b * c + a * s;
  }
#pragma GCC unroll 4
  for (int j = 0; j < vectors; ++j) {
    const int64_t i = j * kLanes;
    if (j + 1 < vectors || last == kLanes) {
      store(y + i, first[j]);
      store(y + half + i, second[j]);
    } else {
      store_n(y + i, first[j], last);
      store_n(y + half + i, second[j], last);
    }
  }
}

template <class T>
GLIMPSE_INLINE void rotate_head(const T* x, T* y, const float* cos, const float* sin, int64_t half) {
  int64_t i = 0;
  for (; half - i > 4 * kLanes; i += 4 * kLanes) rotate<T, 4>(x + i, y + i, cos + i, sin + i, half, kLanes);
  x += i, y += i, cos += i, sin += i;
  const int64_t left = half - i;
  const int last = static_cast<int>((left - 1) % kLanes) + 1;
  switch ((left + kLanes - 1) / kLanes) {
    case 1:
      return rotate<T, 1>(x, y, cos, sin, half, last);
    case 2:
      return rotate<T, 2>(x, y, cos, sin, half, last);
    case 3:
      return rotate<T, 3>(x, y, cos, sin, half, last);
    case 4:
      return rotate<T, 4>(x, y, cos, sin, half, last);
  }
}

template <class T>
void tokens(const glimpse_rope_params& p, int64_t begin, int64_t end) {
  const int64_t half = p.dim / 2;
  for (int64_t t = begin; t < end; ++t) {
    const float* cos = p.cos + t * p.cos_stride;
    const float* sin = p.sin + t * p.sin_stride;
    T* q = static_cast<T*>(p.q) + t * p.q_stride;
    for (int64_t h = 0; h < p.q_heads; ++h) {
      T* head = q + h * p.q_head_stride;
      rotate_head(head, head, cos, sin, half);
    }
    const int64_t row = p.slots != nullptr ? p.slots[t] : t;
    if (p.k == nullptr || row < 0) continue;
    const T* k = static_cast<const T*>(p.k) + t * p.k_stride;
    T* k_out = static_cast<T*>(p.k_out) + row * p.k_out_stride;
    for (int64_t h = 0; h < p.kv_heads; ++h)
      rotate_head(k + h * p.k_head_stride, k_out + h * p.k_out_head_stride, cos, sin, half);
    if (p.v == nullptr) continue;
    const T* v = static_cast<const T*>(p.v) + t * p.v_stride;
    T* v_out = static_cast<T*>(p.v_out) + row * p.v_out_stride;
    for (int64_t h = 0; h < p.kv_heads; ++h)
      memcpy(v_out + h * p.v_out_head_stride, v + h * p.v_head_stride, static_cast<size_t>(p.v_dim) * sizeof(T));
  }
}

template <class T>
glimpse_status run(const glimpse_rope_params& p) {
  if (p.slots != nullptr) {
    for (int64_t t = 0; t < p.tokens; ++t)
      if (p.slots[t] < -1 || p.slots[t] >= p.out_rows)
        return fail(GLIMPSE_INVALID, "rope: slots[%lld]: expected -1 or a row of k_out in [0, %lld), found %d",
                    static_cast<long long>(t), static_cast<long long>(p.out_rows), p.slots[t]);
  }
  const int64_t work = larger<int64_t>((p.q_heads + 2 * p.kv_heads) * p.dim, 1);
  parallel_range(p.tokens, 1 + 16384 / work, [&](int64_t begin, int64_t end) { tokens<T>(p, begin, end); });
  return GLIMPSE_OK;
}

}  // namespace

glimpse_status rope(const glimpse_rope_params& p) {
  return p.dtype == GLIMPSE_BFLOAT16 ? run<bf16>(p) : run<float>(p);
}

}  // namespace glimpse::GLIMPSE_ISA_NS

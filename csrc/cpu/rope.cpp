// SPDX-License-Identifier: Apache-2.0
// Rotary embedding of q and k with the write of k and v to the cache: each token's heads share its cosines and sines.
#include "glimpse/rope.h"

#include "cpu/vec.h"

namespace glimpse::GLIMPSE_ISA_NS {
namespace {

// Rotates one head from x to y (x == y is allowed).
template <class T>
GLIMPSE_INLINE void rotate_head(const T* x, T* y, const float* cos, const float* sin, int64_t half) {
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const vf a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(y + i, a * c - b * s);
    store(y + half + i, b * c + a * s);
  }
  if (i < half) {
    const int n = static_cast<int>(half - i);
    const vf a = load_n(x + i, n), b = load_n(x + half + i, n), c = load_n(cos + i, n), s = load_n(sin + i, n);
    store_n(y + i, a * c - b * s, n);
    store_n(y + half + i, b * c + a * s, n);
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

// SPDX-License-Identifier: Apache-2.0
// Root-mean-square norm with the residual addition in front: one pass to add and square, one to scale, while the row is
// still in the cache.
#include "glimpse/rms_norm.h"

#include "cpu/vec.h"

namespace glimpse::GLIMPSE_ISA_NS {
namespace {

GLIMPSE_INLINE vf as_stored(float, vf x) { return x; }
GLIMPSE_INLINE vf as_stored(bf16, vf x) { return rounded_to_bf16(x); }

// residual += x where there is one; returns the sum of squares of what is to be normalised.
template <class T, bool kResidual>
GLIMPSE_INLINE float add_and_square(const T* x, T* residual, int64_t cols) {
  vf sums[4] = {};
  int64_t c = 0;
  for (; c + 4 * kLanes <= cols; c += 4 * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      vf v = load(x + c + i * kLanes);
      if (kResidual) {
        v = as_stored(T{}, v + load(residual + c + i * kLanes));
        store(residual + c + i * kLanes, v);
      }
      sums[i] = fma(v, v, sums[i]);
    }
  }
  for (; c < cols; c += kLanes) {
    const int n = static_cast<int>(smaller<int64_t>(kLanes, cols - c));
    vf v = load_n(x + c, n);
    if (kResidual) {
      v = as_stored(T{}, v + load_n(residual + c, n));
      store_n(residual + c, v, n);
    }
    sums[0] = fma(v, v, sums[0]);
  }
  return hsum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
GLIMPSE_INLINE void scale_row(const T* x, const T* weight, T* out, int64_t cols, float factor) {
  const vf by = splat(factor);
  int64_t c = 0;
  for (; c + 4 * kLanes <= cols; c += 4 * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int64_t at = c + i * kLanes;
      store(out + at, as_stored(T{}, load(x + at) * by) * load(weight + at));
    }
  }
  for (; c + kLanes <= cols; c += kLanes)
    store(out + c, as_stored(T{}, load(x + c) * by) * load(weight + c));
  if (c < cols) {
    const int n = static_cast<int>(cols - c);
    store_n(out + c, as_stored(T{}, load_n(x + c, n) * by) * load_n(weight + c, n), n);
  }
}

template <class T, bool kResidual>
void rows(const glimpse_rms_norm_params& p, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(p.weight);
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(p.x) + r * p.x_stride;
    T* residual = kResidual ? static_cast<T*>(p.residual) + r * p.residual_stride : nullptr;
    const float squares = add_and_square<T, kResidual>(x, residual, p.cols);
    const float factor = 1.0f / __builtin_sqrtf(squares / static_cast<float>(p.cols) + p.eps);
    scale_row(kResidual ? residual : x, weight, static_cast<T*>(p.out) + r * p.out_stride, p.cols, factor);
  }
}

template <class T>
glimpse_status run(const glimpse_rms_norm_params& p) {
  const int64_t grain = 1 + 16384 / larger<int64_t>(p.cols, 1);
  parallel_range(p.rows, grain, [&](int64_t begin, int64_t end) {
    if (p.residual != nullptr)
      rows<T, true>(p, begin, end);
    else
      rows<T, false>(p, begin, end);
  });
  return GLIMPSE_OK;
}

}  // namespace

glimpse_status rms_norm(const glimpse_rms_norm_params& p) {
  return p.dtype == GLIMPSE_BFLOAT16 ? run<bf16>(p) : run<float>(p);
}

}  // namespace glimpse::GLIMPSE_ISA_NS

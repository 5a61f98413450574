// SPDX-License-Identifier: Apache-2.0
// Gated activation in one pass over the two halves of a GEMM's output.
#include "glimpse/swiglu.h"

#include "cpu/vec.h"

namespace glimpse::GLIMPSE_ISA_NS {
namespace {

// exp(-gate) is inf for very negative gates, and gate / inf is the right -0.
GLIMPSE_INLINE vf gated(float, vf gate, vf up) { return gate / (splat(1.0f) + vexp(-gate)) * up; }

// The result is rounded to 8 bits, so a shorter polynomial does. A NaN gate comes through the division.
GLIMPSE_INLINE vf gated(bf16, vf gate, vf up) {
  const vf power = vmin(vmax(gate * splat(-1.44269504f), splat(-126.0f)), splat(129.0f));
  const vf n = round_even(power);
  const vf e = scale_by_power(exp2_fraction_short(power - n), n);
  return gate / (splat(1.0f) + e) * up;
}

template <class T>
void piece(const T* gate, const T* up, T* out, int64_t cols) {
  int64_t c = 0;
  for (; c + 2 * kLanes <= cols; c += 2 * kLanes) {
    const vf a = gated(T{}, load(gate + c), load(up + c));
    const vf b = gated(T{}, load(gate + c + kLanes), load(up + c + kLanes));
    store(out + c, a);
    store(out + c + kLanes, b);
  }
  for (; c < cols; c += kLanes) {
    const int n = static_cast<int>(smaller<int64_t>(kLanes, cols - c));
    store_n(out + c, gated(T{}, load_n(gate + c, n), load_n(up + c, n)), n);
  }
}

template <class T>
glimpse_status run(const glimpse_swiglu_params& p) {
  if (p.cols <= 0) return GLIMPSE_OK;
  // Long rows are cut, so that one row (decoding) still fills the threads.
  constexpr int64_t kPiece = 8192;
  const int64_t pieces = (p.cols + kPiece - 1) / kPiece;
  const int64_t grain = 1 + 4 * kPiece / smaller(p.cols, kPiece);  // waking a thread costs as much as 32 k elements
  parallel_range(p.rows * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t r = task / pieces;
      const int64_t c = task % pieces * kPiece;
      piece(static_cast<const T*>(p.gate) + r * p.gate_stride + c, static_cast<const T*>(p.up) + r * p.up_stride + c,
            static_cast<T*>(p.out) + r * p.out_stride + c, smaller<int64_t>(kPiece, p.cols - c));
    }
  });
  return GLIMPSE_OK;
}

}  // namespace

glimpse_status swiglu(const glimpse_swiglu_params& p) {
  return p.dtype == GLIMPSE_BFLOAT16 ? run<bf16>(p) : run<float>(p);
}

}  // namespace glimpse::GLIMPSE_ISA_NS

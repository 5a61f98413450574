// SPDX-License-Identifier: Apache-2.0
// Logits of the glimpse row against listed keys. Each key row is read once for all query heads of its group.
#include "glimpse/glimpse_scores.h"

#include "cpu/vec.h"

namespace glimpse::GLIMPSE_ISA_NS {
namespace {

template <class T>
glimpse_status run(const glimpse_glimpse_scores_params& p) {
  const T* q = static_cast<const T*>(p.q);
  const T* k = static_cast<const T*>(p.k);
  const int64_t group = p.q_heads / p.kv_heads;
  for (int64_t n = 0; n < p.count; ++n) {
    if (p.token_index[n] < 0 || p.token_index[n] >= p.tokens)
      return fail(GLIMPSE_INVALID, "glimpse_scores: token_index[%lld]: expected a row of k in [0, %lld), found %d",
                  static_cast<long long>(n), static_cast<long long>(p.tokens), p.token_index[n]);
    if (p.token_seq[n] < 0 || p.token_seq[n] >= p.sequences)
      return fail(GLIMPSE_INVALID, "glimpse_scores: token_seq[%lld]: expected a row of q in [0, %lld), found %d",
                  static_cast<long long>(n), static_cast<long long>(p.sequences), p.token_seq[n]);
  }
  parallel_range(p.count, 64, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t sequence = p.token_seq[n];
      const T* row = k + p.token_index[n] * p.k_stride;
      for (int64_t h = 0; h < p.q_heads; ++h) {
        const T* query = q + sequence * p.q_stride + h * p.q_head_stride;
        float score = p.scale * dot(query, row + h / group * p.k_head_stride, p.dim);
        if (p.lse != nullptr) score -= p.lse[sequence * p.lse_stride + h];
        p.out[n * p.out_stride + h] = score;
      }
    }
  });
  return GLIMPSE_OK;
}

}  // namespace

glimpse_status glimpse_scores(const glimpse_glimpse_scores_params& p) {
  return p.dtype == GLIMPSE_BFLOAT16 ? run<bf16>(p) : run<float>(p);
}

}  // namespace glimpse::GLIMPSE_ISA_NS

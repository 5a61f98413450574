// SPDX-License-Identifier: Apache-2.0
// Logits of the glimpse row against listed keys. Each key row is read once for all query heads of its group.
#include "glimpse/glimpse_scores.h"

#include "cpu/cells.h"

namespace glimpse::GLIMPSE_ISA_NS {
namespace {

#if defined(__AVX512F__)

// Four tokens by four heads at a time. Which tokens come together depends on the split into threads, which therefore must
// not change a result: tokens of different sequences, and the last ones, take the same path with rows repeated.
template <class T>
void score(const glimpse_glimpse_scores_params& p, int64_t begin, int64_t end) {
  const T* q = static_cast<const T*>(p.q);
  const T* k = static_cast<const T*>(p.k);
  const int64_t group = p.q_heads / p.kv_heads;
  for (int64_t n = begin; n < end;) {
    const int64_t sequence = p.token_seq[n];
    int count = 1;
    while (count < 4 && n + count < end && p.token_seq[n + count] == sequence) ++count;
    const T* rows[4];
    for (int i = 0; i < 4; ++i) {
      rows[i] = k + p.token_index[n + smaller(i, count - 1)] * p.k_stride;
      if (n + i + 12 < end) {
        const char* later = reinterpret_cast<const char*>(k + p.token_index[n + i + 12] * p.k_stride);
        for (int64_t b = 0; b < p.dim * static_cast<int64_t>(sizeof(T)); b += 64) __builtin_prefetch(later + b);
      }
    }
    for (int64_t kv_head = 0; kv_head < p.kv_heads; ++kv_head) {
      for (int64_t first = kv_head * group; first < (kv_head + 1) * group; first += 4) {
        const int heads = static_cast<int>(smaller<int64_t>(4, (kv_head + 1) * group - first));
        const T* queries[4];
        for (int j = 0; j < 4; ++j) queries[j] = q + sequence * p.q_stride + (first + smaller(j, heads - 1)) * p.q_head_stride;
        vf found = dot_tile(rows, queries, p.dim) * p.scale;
        if (p.lse != nullptr) {
          const __m128 lse = _mm_maskz_loadu_ps(static_cast<__mmask8>((1u << heads) - 1u), p.lse + sequence * p.lse_stride + first);
          found = found - _mm512_broadcast_f32x4(lse);
        }
        float scores[16] __attribute__((aligned(64)));
        store(scores, found);
        for (int i = 0; i < count; ++i)
          for (int j = 0; j < heads; ++j) p.out[(n + i) * p.out_stride + first + j] = scores[4 * i + j];
      }
      for (int i = 0; i < 4; ++i) rows[i] += p.k_head_stride;
    }
    n += count;
  }
}

#else

template <class T>
void score(const glimpse_glimpse_scores_params& p, int64_t begin, int64_t end) {
  const T* q = static_cast<const T*>(p.q);
  const T* k = static_cast<const T*>(p.k);
  const int64_t group = p.q_heads / p.kv_heads;
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
}

#endif

template <class T>
glimpse_status run(const glimpse_glimpse_scores_params& p) {
  for (int64_t n = 0; n < p.count; ++n) {
    if (p.token_index[n] < 0 || p.token_index[n] >= p.tokens)
      return fail(GLIMPSE_INVALID, "glimpse_scores: token_index[%lld]: expected a row of k in [0, %lld), found %d",
                  static_cast<long long>(n), static_cast<long long>(p.tokens), p.token_index[n]);
    if (p.token_seq[n] < 0 || p.token_seq[n] >= p.sequences)
      return fail(GLIMPSE_INVALID, "glimpse_scores: token_seq[%lld]: expected a row of q in [0, %lld), found %d",
                  static_cast<long long>(n), static_cast<long long>(p.sequences), p.token_seq[n]);
  }
  // waking a thread costs as much as some 10^5 products
  const int64_t grain = 1 + (int64_t{1} << 18) / larger<int64_t>(1, p.q_heads * p.dim);
  parallel_range(p.count, grain, [&](int64_t begin, int64_t end) { score<T>(p, begin, end); });
  return GLIMPSE_OK;
}

}  // namespace

glimpse_status glimpse_scores(const glimpse_glimpse_scores_params& p) {
  return p.dtype == GLIMPSE_BFLOAT16 ? run<bf16>(p) : run<float>(p);
}

}  // namespace glimpse::GLIMPSE_ISA_NS

// SPDX-License-Identifier: Apache-2.0
#include "glimpse/glimpse_scores.h"

#include <cmath>

#include "cuda/tests/harness.h"

namespace glimpse::tests {
namespace {

struct Shape {
  int64_t sequences, tokens, count, q_heads, kv_heads, dim;
  int64_t padding = 0;  // elements between the heads of q, and between the rows of k
  bool in_order = true; // of the sequences
};

// What lies between the rows, and the rows that nobody listed, is NaN.
std::vector<float> spread(const std::vector<float>& rows, int64_t dim, int64_t stride) {
  std::vector<float> out(rows.size() / static_cast<size_t>(dim) * static_cast<size_t>(stride), NAN);
  for (size_t i = 0; i < rows.size(); ++i) out[i / static_cast<size_t>(dim) * static_cast<size_t>(stride) + i % static_cast<size_t>(dim)] = rows[i];
  out.resize(out.size() - static_cast<size_t>(stride - dim));  // the memory ends with the last row
  return out;
}

std::vector<uint16_t> halves(const std::vector<float>& x) {
  std::vector<uint16_t> out;
  for (const float value : x) out.push_back(to_bfloat16(value));
  return out;
}

void check(const Shape& s, bool bf16, bool with_lse) {
  const auto size = [](int64_t n) { return static_cast<size_t>(n); };
  std::vector<float> q = random_floats(size(s.sequences * s.q_heads * s.dim), 1), k = random_floats(size(s.tokens * s.kv_heads * s.dim), 2);
  if (bf16)
    for (auto* x : {&q, &k})
      for (float& value : *x) value = from_bfloat16(to_bfloat16(value));
  const auto lse = random_floats(size(s.sequences * s.q_heads), 3);
  auto index = random_ints(size(s.count), static_cast<int32_t>(s.tokens), 4), seq = random_ints(size(s.count), static_cast<int32_t>(s.sequences), 5);
  if (s.in_order)
    for (size_t n = 0; n < seq.size(); ++n) seq[n] = static_cast<int32_t>(n * size(s.sequences) / seq.size());
  std::vector<bool> listed(size(s.tokens), false);
  for (const int32_t row : index) listed[size(row)] = true;
  for (size_t i = 0; i < k.size(); ++i)
    if (!listed[i / size(s.kv_heads * s.dim)]) k[i] = NAN;
  if (s.count > 3) index[1] = static_cast<int32_t>(s.tokens), index[2] = -5, seq[3] = static_cast<int32_t>(s.sequences);

  const int64_t q_head = s.dim + s.padding, k_row = s.kv_heads * s.dim + s.padding, out_row = s.q_heads + 3;
  const auto wide_q = spread(q, s.dim, q_head), wide_k = spread(k, s.kv_heads * s.dim, k_row);
  const Buffer<float> q32(bf16 ? std::vector<float>{} : wide_q), k32(bf16 ? std::vector<float>{} : wide_k);
  const Buffer<uint16_t> q16(bf16 ? halves(wide_q) : std::vector<uint16_t>{}), k16(bf16 ? halves(wide_k) : std::vector<uint16_t>{});
  const Buffer<float> lse_here(lse), out(size((s.count - 1) * out_row + s.q_heads));
  const Buffer<int32_t> index_here(index), seq_here(seq);
  glimpse_glimpse_scores_params p{};
  p.q = bf16 ? static_cast<const void*>(q16.data()) : q32.data();
  p.k = bf16 ? static_cast<const void*>(k16.data()) : k32.data();
  p.token_index = index_here.data();
  p.token_seq = seq_here.data();
  p.lse = with_lse ? lse_here.data() : nullptr;
  p.out = out.data();
  p.sequences = s.sequences;
  p.tokens = s.tokens;
  p.count = s.count;
  p.q_heads = s.q_heads;
  p.kv_heads = s.kv_heads;
  p.dim = s.dim;
  p.q_stride = s.q_heads * q_head;
  p.q_head_stride = q_head;
  p.k_stride = k_row;
  p.k_head_stride = s.dim;
  p.lse_stride = s.q_heads;
  p.out_stride = out_row;
  p.scale = 0.37f;
  p.dtype = bf16 ? GLIMPSE_BFLOAT16 : GLIMPSE_FLOAT32;
  expect_ok(glimpse_cuda_glimpse_scores(&p, call()));

  const auto found = out.read();
  for (int64_t n = 0; n < s.count; ++n)
    for (int64_t h = 0; h < s.q_heads; ++h) {
      const float score = found[size(n * out_row + h)];
      const int32_t row = index[size(n)], sequence = seq[size(n)];
      if (row < 0 || row >= s.tokens || sequence < 0 || sequence >= s.sequences) {
        expect(std::isnan(score), "score of row %d, sequence %d: expected NaN, found %g", row, sequence, static_cast<double>(score));
        continue;
      }
      double dot = 0.0;
      const int64_t kv_head = h / (s.q_heads / s.kv_heads);
      for (int64_t d = 0; d < s.dim; ++d)
        dot += static_cast<double>(q[size((sequence * s.q_heads + h) * s.dim + d)]) * k[size((row * s.kv_heads + kv_head) * s.dim + d)];
      const double wanted = dot * static_cast<double>(0.37f) - (with_lse ? lse[size(sequence * s.q_heads + h)] : 0.0f);
      expect(std::fabs(score - wanted) <= 1e-5 * (1 + std::sqrt(static_cast<double>(s.dim))), "score [%d, %d]: expected %g, found %g",
             static_cast<int>(n), static_cast<int>(h), wanted, static_cast<double>(score));
    }
}

void check(const Shape& s) {
  check(s, true, true);
  check(s, true, false);
  check(s, false, true);
}

}  // namespace

TEST(glimpse_scores_7b) { check({2, 60, 45, 28, 4, 128}); }
TEST(glimpse_scores_3b) { check({3, 40, 33, 16, 2, 128}); }
TEST(glimpse_scores_dims) {
  for (const int64_t dim : {8, 64, 80, 96, 136, 264}) check({2, 30, 21, 7, 1, dim});
}
TEST(glimpse_scores_rows_apart) { check({2, 30, 21, 6, 2, 64, 8}); }
TEST(glimpse_scores_not_aligned) {
  check({2, 30, 21, 6, 2, 64, 3});
  check({2, 30, 9, 7, 1, 37});
  check({1, 5, 2, 3, 3, 1});
}
TEST(glimpse_scores_many_heads_of_one) { check({2, 20, 18, 20, 1, 32}); }
TEST(glimpse_scores_sequences_mixed) { check({5, 50, 50, 14, 2, 48, 0, false}); }
TEST(glimpse_scores_one_key) { check({1, 1, 1, 4, 2, 16}); }

}  // namespace glimpse::tests

// SPDX-License-Identifier: Apache-2.0
#include "glimpse/decode_attention.h"

#include <cmath>
#include <limits>
#include <memory>
#include <utility>

#include "cuda/tests/harness.h"

namespace glimpse::tests {
namespace {

struct Sizes {
  std::vector<int32_t> lengths;
  int64_t q_heads, kv_heads, dim, v_dim, block_size;
  int64_t more = 1;  // blocks of a row in the table behind those it uses; they name nothing
  int64_t shift = 0;  // elements in front of the pools, which takes their alignment away
};

const float kNan = std::numeric_limits<float>::quiet_NaN();

// A pool in which everything but the keys of the rows is NaN, and what one query row against them should give.
struct Problem {
  Sizes s;
  int64_t blocks = 2, max_blocks = 0;
  std::vector<float> q, k, v;
  std::vector<int32_t> table;
  float scale = 0.3f;

  explicit Problem(const Sizes& sizes, bool in_bf16) : s(sizes) {
    const auto batch = static_cast<int64_t>(s.lengths.size());
    for (const int32_t length : s.lengths) {
      const int64_t used = (length + s.block_size - 1) / s.block_size;
      blocks += used;
      max_blocks = used > max_blocks ? used : max_blocks;
    }
    max_blocks += s.more;
    q = random_floats(static_cast<size_t>(batch * s.q_heads * s.dim), 1);
    k.assign(static_cast<size_t>(s.shift + blocks * s.block_size * s.kv_heads * s.dim), kNan);
    v.assign(static_cast<size_t>(s.shift + blocks * s.block_size * s.kv_heads * s.v_dim), kNan);
    table.assign(static_cast<size_t>(batch * max_blocks), std::numeric_limits<int32_t>::max());
    int64_t next = blocks - 1;  // from the back, so that neighbours in a row are none in the pool's order
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t j = 0; j < s.lengths[static_cast<size_t>(b)]; ++j) {
        if (j % s.block_size == 0) table[static_cast<size_t>(b * max_blocks + j / s.block_size)] = static_cast<int32_t>(next--);
        fill(k, s.dim, b, j, 2);
        fill(v, s.v_dim, b, j, 3);
      }
    if (in_bf16)
      for (auto* values : {&q, &k, &v})
        for (float& x : *values) x = from_bfloat16(to_bfloat16(x));
  }

  int64_t row_at(int64_t dim, int64_t b, int64_t j) const {
    const int64_t block = table[static_cast<size_t>(b * max_blocks + j / s.block_size)];
    return s.shift + (block * s.block_size + j % s.block_size) * s.kv_heads * dim;
  }
  void fill(std::vector<float>& pool, int64_t dim, int64_t b, int64_t j, uint64_t seed) {
    const std::vector<float> row = random_floats(static_cast<size_t>(s.kv_heads * dim), seed + 10 * static_cast<uint64_t>(b * 100000 + j));
    for (size_t i = 0; i < row.size(); ++i) pool[static_cast<size_t>(row_at(dim, b, j)) + i] = row[i];
  }

  std::vector<float> wanted() const {
    std::vector<float> found;
    for (size_t b = 0; b < s.lengths.size(); ++b)
      for (int64_t h = 0; h < s.q_heads; ++h) {
        const int64_t kv = h / (s.q_heads / s.kv_heads);
        std::vector<double> logits, sums(static_cast<size_t>(s.v_dim), 0.0);
        double top = -1e300, total = 0;
        for (int64_t j = 0; j < s.lengths[b]; ++j) {
          double x = 0;
          for (int64_t d = 0; d < s.dim; ++d)
            x += static_cast<double>(q[(b * static_cast<size_t>(s.q_heads) + static_cast<size_t>(h)) * static_cast<size_t>(s.dim) + static_cast<size_t>(d)]) *
                 static_cast<double>(k[static_cast<size_t>(row_at(s.dim, static_cast<int64_t>(b), j) + kv * s.dim + d)]);
          logits.push_back(x * static_cast<double>(scale));
          top = std::fmax(top, logits.back());
        }
        for (size_t j = 0; j < logits.size(); ++j) {
          const double w = std::exp(logits[j] - top);
          total += w;
          for (int64_t d = 0; d < s.v_dim; ++d)
            sums[static_cast<size_t>(d)] += w * static_cast<double>(v[static_cast<size_t>(row_at(s.v_dim, static_cast<int64_t>(b), static_cast<int64_t>(j)) + kv * s.v_dim + d)]);
        }
        for (const double x : sums) found.push_back(static_cast<float>(logits.empty() ? 0.0 : x / total));
      }
    return found;
  }

  glimpse_decode_attention_params params() const {
    glimpse_decode_attention_params p{};
    p.batch = static_cast<int64_t>(s.lengths.size());
    p.blocks = blocks;
    p.block_size = s.block_size;
    p.max_blocks = p.table_stride = max_blocks;
    p.q_heads = s.q_heads;
    p.kv_heads = s.kv_heads;
    p.dim = p.q_head_stride = p.k_head_stride = s.dim;
    p.v_dim = p.out_head_stride = p.v_head_stride = s.v_dim;
    p.q_stride = s.q_heads * s.dim;
    p.out_stride = s.q_heads * s.v_dim;
    p.k_slot_stride = s.kv_heads * s.dim;
    p.v_slot_stride = s.kv_heads * s.v_dim;
    p.k_block_stride = s.block_size * p.k_slot_stride;
    p.v_block_stride = s.block_size * p.v_slot_stride;
    p.scale = scale;
    return p;
  }
};

void check_ok(glimpse_decode_attention_params& p) {
  expect_ok(glimpse_cuda_decode_attention(&p, call(glimpse_cuda_decode_attention_workspace(&p))));
}

std::vector<float> in_fp32(const Problem& problem) {
  glimpse_decode_attention_params p = problem.params();
  const Buffer<float> q(problem.q), k(problem.k), v(problem.v), out(static_cast<size_t>(p.batch * p.out_stride));
  const Buffer<int32_t> table(problem.table), lengths(problem.s.lengths);
  p.dtype = GLIMPSE_FLOAT32;
  p.q = q.data(), p.k = k.data() + problem.s.shift, p.v = v.data() + problem.s.shift, p.out = out.data();
  p.block_table = table.data(), p.lengths = lengths.data();
  check_ok(p);
  return out.read();
}

std::vector<uint16_t> rounded(const std::vector<float>& values) {
  std::vector<uint16_t> found;
  for (const float x : values) found.push_back(to_bfloat16(x));
  return found;
}

std::vector<float> in_bf16(const Problem& problem) {
  glimpse_decode_attention_params p = problem.params();
  const Buffer<uint16_t> q(rounded(problem.q)), k(rounded(problem.k)), v(rounded(problem.v)), out(static_cast<size_t>(p.batch * p.out_stride));
  const Buffer<int32_t> table(problem.table), lengths(problem.s.lengths);
  p.dtype = GLIMPSE_BFLOAT16;
  p.q = q.data(), p.k = k.data() + problem.s.shift, p.v = v.data() + problem.s.shift, p.out = out.data();
  p.block_table = table.data(), p.lengths = lengths.data();
  check_ok(p);
  std::vector<float> found;
  for (const uint16_t x : out.read()) found.push_back(from_bfloat16(x));
  return found;
}

constexpr std::pair<int, int> kChips[] = {{90, 3}, {90, 132}, {80, 108}};
constexpr std::pair<int, int> kSmallChips[] = {{86, 84}, {89, 128}, {120, 170}};  // 99 KiB of shared memory a block

// By a cluster, by two kernels on a chip that has clusters and on one that has not.
template <size_t N>
void check(const Sizes& sizes, const std::pair<int, int> (&chips)[N]) {
  const Problem exact(sizes, false), coarse(sizes, true);
  const std::vector<float> wanted = exact.wanted(), wanted_coarse = coarse.wanted();
  for (const auto& [capability, processors] : chips) {
    set_chip(capability, processors);
    expect_close(in_fp32(exact), wanted, 4e-6, "float32");
    expect_close(in_bf16(coarse), wanted_coarse, 1e-2, "bfloat16");
  }
}
void check(const Sizes& sizes) { check(sizes, kChips); }

}  // namespace

TEST(decode_attention_as_qwen) { check({{300, 0, 65, 1}, 14, 2, 128, 128, 16}); }
TEST(decode_attention_edges_of_runs) {
  // Capacity 320: four runs of a cluster, three of two kernels.
  std::vector<int32_t> lengths;
  for (const int32_t edge : {16, 64, 128, 192, 256, 304})
    for (const int32_t by : {-1, 0, 1}) lengths.push_back(edge + by);
  check({lengths, 2, 1, 16, 16, 16});
}
TEST(decode_attention_blocks) {
  check({{131, 40}, 4, 2, 32, 32, 1});
  check({{131, 40}, 4, 2, 32, 32, 7});
  check({{131, 40}, 4, 2, 32, 32, 64});
  check({{131, 40}, 4, 2, 32, 32, 500});
}
TEST(decode_attention_groups_and_dimensions) {
  check({{150, 17}, 17, 1, 80, 40, 16});
  check({{150, 17}, 3, 3, 40, 192, 16});
  check({{150, 17}, 16, 2, 256, 256, 16});
  check({{150, 17}, 1, 1, 1, 3, 16});
}
TEST(decode_attention_out_of_line) {
  check({{150, 17}, 4, 2, 37, 19, 16});
  check({{150, 17}, 4, 2, 64, 64, 16, 1, 1});
  check({{150, 17}, 4, 2, 64, 64, 16, 1, 4});
}
TEST(decode_attention_little_shared_memory) {
  for (const int64_t dim : {64, 128, 256}) check({{150, 33, 0}, 7, 1, dim, dim, 16}, kSmallChips);
}
TEST(decode_attention_long_tables) { check({{700, 3, 0}, 4, 2, 64, 64, 16, 200}); }

TEST(decode_attention_row_alone) {
  const Problem all({{700, 3, 250}, 4, 2, 64, 64, 16, 150}, true);
  for (const int capability : {80, 90}) {
    set_chip(capability, 132);
    const std::vector<float> together = in_bf16(all);
    const auto size = static_cast<int64_t>(together.size() / 3);
    for (int64_t b = 0; b < 3; ++b) {
      Problem one = all;
      one.s.lengths = {all.s.lengths[static_cast<size_t>(b)]};
      one.q = {all.q.begin() + b * 4 * 64, all.q.begin() + (b + 1) * 4 * 64};
      one.table = {all.table.begin() + b * all.max_blocks, all.table.begin() + (b + 1) * all.max_blocks};
      expect_equal(in_bf16(one), {together.begin() + b * size, together.begin() + (b + 1) * size}, "row alone");
    }
  }
}

// Nothing waits between calls that share a workspace: what one still reads the next must not overwrite.
TEST(decode_attention_one_after_the_other) {
  const Problem problem({{700, 3, 250}, 4, 2, 64, 64, 16, 150}, false);
  set_chip(90, 132);
  glimpse_decode_attention_params p = problem.params();
  const Buffer<float> q(problem.q), k(problem.k), v(problem.v);
  const Buffer<int32_t> table(problem.table), lengths(problem.s.lengths);
  p.k = k.data(), p.v = v.data(), p.block_table = table.data(), p.lengths = lengths.data();
  const glimpse_cuda_call* const how = call(glimpse_cuda_decode_attention_workspace(&p));
  expect(how->workspace_bytes > 0, "one launch: the workspace is not used");
  // The answer to a call is the question of the next.
  std::vector<std::unique_ptr<Buffer<float>>> outs;
  p.q = q.data();
  for (int i = 0; i < 6; ++i) {
    outs.push_back(std::make_unique<Buffer<float>>(problem.q.size()));
    p.out = outs.back()->data();
    expect_ok(glimpse_cuda_decode_attention(&p, how));
    p.q = p.out;
  }
  Problem expected = problem;
  for (const auto& out : outs) {
    expect_close(out->read(), expected.wanted(), 4e-6, "one after the other");
    expected.q = out->read();
  }
}

// Recorded with one key a row, run with more, none, and with lengths and blocks that cannot be.
TEST(decode_attention_recorded) {
  const Problem full({{640, 333}, 4, 1, 32, 32, 16, 0}, false);
  for (const int capability : {80, 90}) {
    set_chip(capability, 132);
    glimpse_decode_attention_params p = full.params();
    const Buffer<float> q(full.q), k(full.k), v(full.v);
    Buffer<float> out(static_cast<size_t>(p.batch * p.out_stride));
    Buffer<int32_t> table(full.table), lengths(std::vector<int32_t>{1, 1});
    p.q = q.data(), p.k = k.data(), p.v = v.data(), p.out = out.data();
    p.block_table = table.data(), p.lengths = lengths.data();
    const glimpse_cuda_call* const how = call(glimpse_cuda_decode_attention_workspace(&p));
    Graph graph([&] { expect_ok(glimpse_cuda_decode_attention(&p, how)); });
    for (const std::vector<int32_t>& now : {std::vector<int32_t>{1, 1}, {640, 333}, {0, 200}, {129, 0}, {2147483647, -5}}) {
      Problem expected = full;
      for (size_t b = 0; b < 2; ++b) expected.s.lengths[b] = now[b] < 0 ? 0 : now[b] > 640 ? 640 : now[b];
      lengths.write(now);
      out.write(std::vector<float>(out.size(), kNan));
      graph.replay();
      expect_close(out.read(), expected.wanted(), 4e-6, "replayed");
    }
    Problem holes = full;
    holes.s.lengths = {640, 16};
    for (size_t i = 0; i < 40; ++i)
      if (i % 3 != 1) holes.table[i] = i % 2 == 0 ? -1 : static_cast<int32_t>(full.blocks);
    holes.table[40] = std::numeric_limits<int32_t>::min();
    std::vector<int32_t> packed(holes.table.size(), 0);
    size_t there = 0;
    for (size_t i = 0; i < 40; ++i)
      if (i % 3 == 1) packed[there++] = holes.table[i];
    Problem expected = full;
    expected.table = packed;
    expected.s.lengths = {static_cast<int32_t>(16 * there), 0};
    table.write(holes.table);
    lengths.write(holes.s.lengths);
    graph.replay();
    expect_close(out.read(), expected.wanted(), 4e-6, "blocks that are not there");
  }
}

TEST(decode_attention_refuses) {
  Problem problem({{40}, 2, 1, 257, 8, 16}, false);
  glimpse_decode_attention_params p = problem.params();
  expect(glimpse_cuda_decode_attention(&p, call()) == GLIMPSE_UNSUPPORTED, "a head dimension of 257 was taken");
  set_chip(80, 108);
  problem = Problem({{400}, 2, 1, 64, 64, 16}, false);
  p = problem.params();
  expect(glimpse_cuda_decode_attention(&p, call()) == GLIMPSE_INVALID, "a call without workspace was taken");
  p.dtype = static_cast<glimpse_dtype>(3);
  expect(glimpse_cuda_decode_attention(&p, call()) == GLIMPSE_INVALID, "dtype 3 was taken");
  p.dtype = GLIMPSE_BFLOAT16;
  p.batch = 0;
  expect_ok(glimpse_cuda_decode_attention(&p, call()));
}

}  // namespace glimpse::tests

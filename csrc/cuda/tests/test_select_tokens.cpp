// SPDX-License-Identifier: Apache-2.0
#include "glimpse/select_tokens.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>

#include "cuda/tests/harness.h"

namespace glimpse::tests {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();

struct Case {
  std::vector<float> logits;
  std::vector<int32_t> cu_groups{0}, caps, floors, token_rows, cu_seqlens;
  std::vector<uint8_t> forced, row_keep;
  float threshold = 0.0f;
  int64_t capacity = 0;
};

struct Result {
  std::vector<uint8_t> keep;
  std::vector<int32_t> counts, index, cu_out;
};

// By sorting.
Result expected(const Case& c) {
  Result r;
  r.keep.assign(c.logits.size(), 0);
  const auto score = [&](int32_t i) { return std::isnan(c.logits[i]) ? -kInf : c.logits[i]; };
  for (size_t g = 0; g < c.caps.size(); ++g) {
    std::vector<int32_t> best(static_cast<size_t>(c.cu_groups[g + 1] - c.cu_groups[g]));
    std::iota(best.begin(), best.end(), c.cu_groups[g]);
    const auto above = std::count_if(best.begin(), best.end(), [&](int32_t i) { return score(i) > c.threshold; });
    std::stable_sort(best.begin(), best.end(), [&](int32_t a, int32_t b) { return score(a) > score(b); });
    const int64_t most = std::max<int64_t>(std::min<int64_t>(above, c.caps[g]), c.floors[g]);
    for (int64_t i = 0; i < most && i < static_cast<int64_t>(best.size()); ++i) r.keep[best[i]] = 1;
    if (!c.forced.empty())
      for (const int32_t i : best) r.keep[i] |= c.forced[i];
    r.counts.push_back(std::accumulate(r.keep.begin() + c.cu_groups[g], r.keep.begin() + c.cu_groups[g + 1], 0));
  }
  std::vector<uint8_t> stays = c.row_keep;
  for (size_t i = 0; i < r.keep.size(); ++i)
    if (c.token_rows[i] >= 0 && c.token_rows[i] < static_cast<int32_t>(stays.size())) stays[c.token_rows[i]] |= r.keep[i];
  for (size_t row = 0; row < stays.size(); ++row)
    if (stays[row]) r.index.push_back(static_cast<int32_t>(row));
  r.index.resize(static_cast<size_t>(c.capacity), -1);
  for (const int32_t bound : c.cu_seqlens) r.cu_out.push_back(std::accumulate(stays.begin(), stays.begin() + bound, 0));
  return r;
}

// The tensors of a case on the device, of these sizes; their values may change.
struct Call {
  explicit Call(const Case& c)
      : logits(c.logits), cu_groups(c.cu_groups), caps(c.caps), floors(c.floors), token_rows(c.token_rows), cu_seqlens(c.cu_seqlens),
        forced(c.forced), row_keep(c.row_keep), keep(c.logits.size()), counts(c.caps.size()),
        index(static_cast<size_t>(c.capacity)), cu_out(c.cu_seqlens.size()) {
    p.logits = logits.data();
    p.cu_groups = cu_groups.data();
    p.caps = caps.data();
    p.floors = floors.data();
    p.forced = c.forced.empty() ? nullptr : forced.data();
    p.token_rows = token_rows.data();
    p.row_keep = row_keep.data();
    p.cu_seqlens = cu_seqlens.data();
    p.keep = keep.data();
    p.counts = counts.data();
    p.index = index.data();
    p.cu_out = cu_out.data();
    p.tokens = static_cast<int64_t>(c.logits.size());
    p.groups = static_cast<int64_t>(c.caps.size());
    p.rows = static_cast<int64_t>(c.row_keep.size());
    p.sequences = static_cast<int64_t>(c.cu_seqlens.size()) - 1;
    p.capacity = c.capacity;
    p.threshold = c.threshold;
  }
  void write(const Case& c) {
    logits.write(c.logits);
    cu_groups.write(c.cu_groups);
    caps.write(c.caps);
    floors.write(c.floors);
    token_rows.write(c.token_rows);
    cu_seqlens.write(c.cu_seqlens);
    forced.write(c.forced);
    row_keep.write(c.row_keep);
  }
  void launch() { launch(call(glimpse_cuda_select_tokens_workspace(&p))); }
  void launch(const glimpse_cuda_call* how) { expect_ok(glimpse_cuda_select_tokens(&p, how)); }
  void compare(const Result& wanted) {
    expect_equal(keep.read(), wanted.keep, "keep");
    expect_equal(counts.read(), wanted.counts, "counts");
    expect_equal(index.read(), wanted.index, "index");
    expect_equal(cu_out.read(), wanted.cu_out, "cu_seqlens");
  }

  Buffer<float> logits;
  Buffer<int32_t> cu_groups, caps, floors, token_rows, cu_seqlens;
  Buffer<uint8_t> forced, row_keep;
  const Buffer<uint8_t> keep;
  const Buffer<int32_t> counts, index, cu_out;
  glimpse_select_tokens_params p{};
};

// Groups of these sizes, text between them; scores of `levels` values and the odd ones, caps and floors of every kind.
Case drawn(const std::vector<int32_t>& sizes, uint64_t seed, int32_t levels, bool shuffled) {
  Case c;
  const auto draws = random_ints(6 * sizes.size() + 16, 1 << 20, seed);
  size_t next = 0;
  const auto draw = [&](int32_t end) { return draws[next++] % end; };
  for (const int32_t size : sizes) {
    for (int32_t text = draw(4); text > 0; --text) c.row_keep.push_back(1);
    for (int32_t i = 0; i < size; ++i) {
      c.token_rows.push_back(static_cast<int32_t>(c.row_keep.size()));
      c.row_keep.push_back(0);
    }
    if (draw(3) == 0) c.row_keep.push_back(0);  // a row that is nobody's
    c.cu_groups.push_back(c.cu_groups.back() + size);
    c.caps.push_back(std::vector<int32_t>{0, size / 9, size / 3, size, 1000000}[static_cast<size_t>(draw(5))]);
    c.floors.push_back(std::vector<int32_t>{0, 0, 1, size / 2, size + 5}[static_cast<size_t>(draw(5))]);
  }
  const size_t n = c.token_rows.size();
  const auto scores = random_ints(n, levels, seed + 1), odd = random_ints(n, 200, seed + 2), order = random_ints(n, 1 << 30, seed + 3);
  for (size_t i = 0; i < n; ++i) {
    const float specials[5] = {kNan, kInf, -kInf, 0.0f, -0.0f};
    c.logits.push_back(odd[i] < 5 ? specials[odd[i]] : static_cast<float>(scores[i] - levels / 2) / 8.0f);
    if (seed % 2 == 1) c.forced.push_back(odd[i] == 17);
  }
  if (shuffled)
    for (size_t i = n; i > 1; --i) std::swap(c.token_rows[i - 1], c.token_rows[static_cast<size_t>(order[i - 1]) % i]);
  const int32_t rows = static_cast<int32_t>(c.row_keep.size());
  c.cu_seqlens = {0, rows / 3, rows / 3, rows - rows / 7, rows};
  c.threshold = std::vector<float>{-0.5f, 0.0f, 1.0f, kInf, -kInf}[static_cast<size_t>(draw(5))];
  c.capacity = std::vector<int64_t>{rows, rows / 3, rows + 3000, 0}[static_cast<size_t>(draw(4))];
  return c;
}

void check(const Case& c) {
  Call run(c);
  run.launch();
  run.compare(expected(c));
}

void check(const std::vector<int32_t>& sizes, uint64_t seeds) {
  for (uint64_t seed = 0; seed < seeds; ++seed) check(drawn(sizes, 10 * sizes.size() + seed, seed % 3 == 0 ? 9 : 2000, seed % 4 == 2));
}

}  // namespace

TEST(select_tokens_one_group) {
  check({0}, 1);
  check({1}, 2);
  check({31}, 2);
  check({257}, 3);
  check({1023}, 3);
}
TEST(select_tokens_one_large_group) { check({4097}, 1); }
TEST(select_tokens_group_beyond_the_registers) { check({9001}, 1); }
TEST(select_tokens_clusters) {
  check({5, 300}, 3);
  check({40, 0, 33}, 3);
  check({7, 64, 1, 96, 128, 0, 31, 60}, 4);
}
TEST(select_tokens_cluster_of_large_groups) { check({1030, 1040}, 1); }
TEST(select_tokens_several_launches) {
  check({7, 64, 1, 96, 128, 0, 31, 60, 300}, 6);
  check({3000, 3, 1100, 900, 1, 1, 900, 1500, 40}, 1);
}
TEST(select_tokens_without_clusters) {
  set_chip(80, 3);
  check({5, 300}, 2);
  check({40, 0, 33}, 4);
  check({1100, 3, 2100}, 1);  // large blocks in several launches
}
TEST(select_tokens_nothing) {
  Case c;
  c.cu_seqlens = {0};
  check(c);
  c.capacity = 5;
  c.cu_seqlens = {0, 0};
  check(c);
  c.caps = c.floors = {3, 3, 3};  // three blocks, no rows
  c.cu_groups = {0, 0, 0, 0};
  check(c);
}

// All equal: the first ones stay, across warps, tiles and blocks.
TEST(select_tokens_ties) {
  for (const int32_t cap : {33, 4100}) {
    Case c = drawn({5001}, 2, 2, false);
    std::fill(c.logits.begin(), c.logits.end(), 2.5f);
    c.caps = {cap};
    c.floors = {0};
    c.threshold = 1.0f;
    check(c);
  }
}

// Neighbouring floats around the cut: every bit of a key decides.
TEST(select_tokens_last_bit) {
  Case c = drawn({420}, 2, 2, true);
  for (size_t i = 0; i < c.logits.size(); ++i) {
    float x = std::vector<float>{1.0f, -1.0f, 0.0f, 1e-45f, 3e38f}[i % 5];
    for (size_t step = 0; step < i % 7; ++step) x = std::nextafterf(x, i % 2 == 0 ? kInf : -kInf);
    c.logits[i] = x;
  }
  c.threshold = -kInf;
  c.floors = {0};
  for (int32_t cap = 0; cap < 420; cap += 13) {
    c.caps = {cap};
    check(c);
  }
}

// A row outside the packed ones is nobody's.
TEST(select_tokens_rows_outside) {
  for (const size_t groups : {1, 4, 12}) {
    Case c = drawn(std::vector<int32_t>(groups, 50), 4, 100, false);
    c.token_rows[3] = -1;
    c.token_rows[7] = static_cast<int32_t>(c.row_keep.size());
    c.token_rows[11] = 2147483647;
    c.token_rows[12] = -2147483647 - 1;
    c.threshold = -kInf;
    c.caps.assign(groups, 1000);
    check(c);
  }
}

// Captured with groups of one size, replayed with others.
TEST(select_tokens_replay) {
  for (const size_t groups : {1, 3, 10}) {
    const int32_t each = 120;
    Case first = drawn(std::vector<int32_t>(groups, each), 6, 50, false);
    Case then = first;
    then.logits = drawn(std::vector<int32_t>(groups, each), 8, 50, false).logits;
    for (size_t g = 1; g < groups; ++g) then.cu_groups[g] = static_cast<int32_t>(g) + (g > groups / 2 ? each : 0);
    then.caps.assign(groups, 77);
    then.floors.assign(groups, 9);
    std::reverse(then.token_rows.begin(), then.token_rows.end());
    std::reverse(then.row_keep.begin(), then.row_keep.end());
    for (int32_t& row : then.token_rows) row = static_cast<int32_t>(then.row_keep.size()) - 1 - row;
    then.cu_seqlens[1] = 5;
    Call run(first);
    const glimpse_cuda_call* const how = call(glimpse_cuda_select_tokens_workspace(&run.p));
    Graph graph([&] { run.launch(how); });
    graph.replay();
    run.compare(expected(first));
    run.write(then);
    graph.replay();
    run.compare(expected(then));
  }
}

TEST(select_tokens_workspace_too_small) {
  const Case c = drawn(std::vector<int32_t>(10, 5), 4, 100, false);
  Call run(c);
  expect(glimpse_cuda_select_tokens_workspace(&run.p) > 0, "several launches need a workspace");
  expect(glimpse_cuda_select_tokens(&run.p, call()) == GLIMPSE_INVALID, "a workspace of no bytes was taken");
}

}  // namespace glimpse::tests

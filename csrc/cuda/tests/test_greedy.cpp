// SPDX-License-Identifier: Apache-2.0
// farthest_points, greedy_dpp and drop_duplicates against the plain algorithms, on chips with and without clusters, with memory of every kind.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "cuda/tests/harness.h"
#include "glimpse/drop_duplicates.h"
#include "glimpse/farthest_points.h"
#include "glimpse/greedy_dpp.h"

namespace glimpse::tests {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<int32_t> starts_of(const std::vector<int>& sizes) {
  std::vector<int32_t> found{0};
  for (const int size : sizes) found.push_back(found.back() + size);
  return found;
}

using Matrix = std::function<float(size_t i, size_t j)>;
Matrix matrix_at(const std::vector<float>& packed, size_t offset, int n) {
  return [&packed, offset, n](size_t i, size_t j) { return packed[offset + i * static_cast<size_t>(n) + j]; };
}

// Multiples of 1/16, with many ties.
std::vector<float> coarse(size_t count, uint64_t seed) {
  std::vector<float> found;
  for (const int32_t x : random_ints(count, 33, seed)) found.push_back(static_cast<float>(x - 16) / 16);
  return found;
}

size_t entries_of(const std::vector<int>& sizes) {
  size_t found = 0;
  for (const int n : sizes) found += static_cast<size_t>(n) * static_cast<size_t>(n);
  return found;
}

// Tensors may be larger than what the groups take: then a group could be far longer, and its state moves to the workspace.
// (Nothing lies behind the entries that are claimed; to touch one is an error.)
struct Room {
  int64_t longest = -1, tokens = 0, entries = 0;
};

// Runs the launch, then captures it while `lengths` hold nothing, and replays it with what they hold now.
void run_twice(const std::vector<Buffer<int32_t>*>& lengths, const std::function<void()>& launch, const std::function<void()>& check) {
  launch();
  check();
  std::vector<std::vector<int32_t>> values;
  for (auto* buffer : lengths) {
    values.push_back(buffer->read());
    buffer->write(std::vector<int32_t>(buffer->size(), 0));
  }
  Graph graph(launch);
  for (size_t i = 0; i < lengths.size(); ++i) lengths[i]->write(values[i]);
  graph.replay();
  check();
}

// ---- farthest_points -------------------------------------------------------------------------------------------------------

std::vector<int> farthest(const Matrix& s, int n, int count, bool repeat) {
  const size_t size = static_cast<size_t>(n);
  std::vector<float> nearest(size);
  for (size_t j = 0; j < size; ++j) {
    std::vector<float> column;
    for (size_t i = 0; i < size; ++i) column.push_back(1 - s(i, j));
    std::sort(column.begin(), column.end());
    nearest[j] = column[n > 1 ? 1 : 0];
  }
  std::vector<int> picks;
  while (static_cast<int>(picks.size()) < count && n > 0 && (repeat || static_cast<int>(picks.size()) < n)) {
    const size_t pick = static_cast<size_t>(std::max_element(nearest.begin(), nearest.end()) - nearest.begin());
    for (size_t j = 0; j < size; ++j) nearest[j] = picks.empty() ? 1 - s(pick, j) : std::min(nearest[j], 1 - s(pick, j));
    picks.push_back(static_cast<int>(pick));
    if (!repeat)
      for (const int p : picks) nearest[static_cast<size_t>(p)] = -kInfinity;
  }
  return picks;
}

// The memory of a call that picks from groups: matrices `values`, groups that begin at `rows` and have room for picks from `places` on.
struct Picking {
  Picking(const std::vector<float>& values, const std::vector<int32_t>& rows, const std::vector<int32_t>& places, size_t tokens,
          size_t capacity)
      : similarity(values), picks(capacity), cu_seqlens(rows), cu_picks(places), keep(tokens) {}

  template <class Params>
  Params params(const Room& room) const {
    Params p{};
    p.similarity = similarity.data();
    p.cu_seqlens = cu_seqlens.data();
    p.cu_picks = cu_picks.data();
    p.picks = picks.data();
    p.keep = keep.data();
    p.entries = std::max(static_cast<int64_t>(similarity.size()), room.entries);
    p.groups = static_cast<int64_t>(cu_seqlens.size()) - 1;
    p.tokens = static_cast<int64_t>(keep.size());
    p.capacity = static_cast<int64_t>(picks.size());
    p.longest = room.longest;
    return p;
  }

  void expect_result(const std::vector<int32_t>& wanted, const std::vector<uint8_t>& kept) const {
    expect_equal(picks.read(), wanted, "picks");
    expect_equal(keep.read(), kept, "keep");
  }

  const Buffer<float> similarity;
  const Buffer<int32_t> picks;
  Buffer<int32_t> cu_seqlens, cu_picks;
  const Buffer<uint8_t> keep;
};

void check_farthest(const std::vector<int>& sizes, const std::vector<int>& counts, bool repeat, const Room& room = {}) {
  const std::vector<int32_t> rows = starts_of(sizes), places = starts_of(counts);
  const std::vector<float> values = coarse(entries_of(sizes), 3);
  const size_t tokens = std::max(static_cast<size_t>(rows.back()), static_cast<size_t>(room.tokens));
  const size_t capacity = static_cast<size_t>(places.back()) + 2;
  std::vector<int32_t> wanted(capacity, -1);
  std::vector<uint8_t> kept(tokens, 0);
  size_t offset = 0;
  for (size_t g = 0; g < sizes.size(); ++g) {
    const std::vector<int> found = farthest(matrix_at(values, offset, sizes[g]), sizes[g], counts[g], repeat);
    for (size_t i = 0; i < found.size(); ++i) {
      wanted[static_cast<size_t>(places[g]) + i] = rows[g] + found[i];
      kept[static_cast<size_t>(rows[g] + found[i])] = 1;
    }
    offset += static_cast<size_t>(sizes[g]) * static_cast<size_t>(sizes[g]);
  }
  Picking on(values, rows, places, tokens, capacity);
  glimpse_farthest_points_params p = on.params<glimpse_farthest_points_params>(room);
  p.repeat = repeat;
  p.dtype = GLIMPSE_FLOAT32;
  const glimpse_cuda_call* const how = call(glimpse_cuda_farthest_points_workspace(&p));
  run_twice({&on.cu_seqlens, &on.cu_picks}, [&] { expect_ok(glimpse_cuda_farthest_points(&p, how)); }, [&] { on.expect_result(wanted, kept); });
}

// ---- greedy_dpp ------------------------------------------------------------------------------------------------------------

// Classes of tokens that are alike inside and strange to each other; whole relevances. Everything is exact.
void check_classes(const std::vector<int>& sizes, const std::vector<int>& counts, int classes, const Room& room = {}) {
  const std::vector<int32_t> rows = starts_of(sizes), places = starts_of(counts);
  const size_t tokens = std::max(static_cast<size_t>(rows.back()), static_cast<size_t>(room.tokens));
  const size_t capacity = static_cast<size_t>(places.back()) + 1;
  const std::vector<int32_t> label = random_ints(tokens, classes, 5);
  std::vector<float> weight, values;
  for (const int32_t x : random_ints(tokens, 5, 7)) weight.push_back(static_cast<float>(x < 2 ? x - 3 : x));
  std::vector<int32_t> wanted(capacity, -1);
  std::vector<uint8_t> kept(tokens, 0);
  for (size_t g = 0; g < sizes.size(); ++g) {
    const size_t n = static_cast<size_t>(sizes[g]), first = static_cast<size_t>(rows[g]);
    std::vector<size_t> order;
    for (size_t i = 0; i < n; ++i) {
      order.push_back(first + i);
      for (size_t j = 0; j < n; ++j) values.push_back(label[first + i] == label[first + j] ? 1.0f : 0.0f);
    }
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return std::fabs(weight[a]) > std::fabs(weight[b]); });
    std::vector<bool> taken(static_cast<size_t>(classes), false);
    int count = 0;
    for (const size_t i : order) {
      if (taken[static_cast<size_t>(label[i])] || count == counts[g]) continue;
      taken[static_cast<size_t>(label[i])] = true;
      wanted[static_cast<size_t>(places[g] + count++)] = static_cast<int32_t>(i);
      kept[i] = 1;
    }
  }
  Picking on(values, rows, places, tokens, capacity);
  const Buffer<float> relevance(weight);
  glimpse_greedy_dpp_params p = on.params<glimpse_greedy_dpp_params>(room);
  p.relevance = relevance.data();
  p.eps = 1e-5f;
  const glimpse_cuda_call* const how = call(glimpse_cuda_greedy_dpp_workspace(&p));
  run_twice({&on.cu_seqlens, &on.cu_picks}, [&] { expect_ok(glimpse_cuda_greedy_dpp(&p, how)); }, [&] { on.expect_result(wanted, kept); });
}

// The picks of random vectors are the same bit for bit whatever the chip, and each is the best of fp64 or next to it.
std::vector<int32_t> dpp_picks(const std::vector<float>& values, const std::vector<float>& weight, int n, int count) {
  const Picking on(values, {0, n}, {0, count}, static_cast<size_t>(n), static_cast<size_t>(count));
  const Buffer<float> relevance(weight);
  glimpse_greedy_dpp_params p = on.params<glimpse_greedy_dpp_params>({});
  p.relevance = relevance.data();
  p.eps = 1e-5f;
  expect_ok(glimpse_cuda_greedy_dpp(&p, call(glimpse_cuda_greedy_dpp_workspace(&p))));
  return on.picks.read();
}

std::vector<float> cosines(int n, int width, uint64_t seed) {
  const std::vector<float> x = random_floats(static_cast<size_t>(n * width), seed);
  std::vector<float> found;
  const auto dot = [&](int i, int j) {
    double sum = 0;
    for (int d = 0; d < width; ++d) sum += static_cast<double>(x[static_cast<size_t>(i * width + d)]) * x[static_cast<size_t>(j * width + d)];
    return sum;
  };
  std::vector<double> norm;
  for (int i = 0; i < n; ++i) norm.push_back(std::sqrt(dot(i, i)));
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) found.push_back(static_cast<float>(dot(i, j) / norm[static_cast<size_t>(i)] / norm[static_cast<size_t>(j)]));
  return found;
}

void expect_greedy(const std::vector<float>& values, const std::vector<float>& weight, int n, const std::vector<int32_t>& picks) {
  const size_t size = static_cast<size_t>(n);
  std::vector<double> gain, own;
  std::vector<std::vector<double>> factors;
  const auto kernel = [&](size_t i, size_t j) { return static_cast<double>(weight[i]) * values[i * size + j] * weight[j]; };
  for (size_t i = 0; i < size; ++i) gain.push_back(kernel(i, i));
  own = gain;
  for (size_t t = 0; t < picks.size(); ++t) {
    double most = 0;
    for (size_t i = 0; i < size; ++i)
      if (gain[i] > 1e-5 * own[i]) most = std::max(most, gain[i]);
    if (picks[t] < 0) {
      expect(most < 1e-4, "pick %zu: none, though a gain of %g is left", t, most);
      return;
    }
    const size_t pick = static_cast<size_t>(picks[t]);
    expect(gain[pick] >= most * (1 - 1e-4) - 1e-6, "pick %zu: token %zu with gain %g, the best has %g", t, pick, gain[pick], most);
    std::vector<double> c;
    for (size_t j = 0; j < size; ++j) {
      double sum = kernel(pick, j);
      for (const auto& before : factors) sum -= before[pick] * before[j];
      c.push_back(sum / std::sqrt(gain[pick]));
    }
    for (size_t j = 0; j < size; ++j) gain[j] -= c[j] * c[j];
    gain[pick] = -1;
    factors.push_back(c);
  }
}

// ---- drop_duplicates -------------------------------------------------------------------------------------------------------

std::vector<int> rounds(const Matrix& s, std::vector<int> list, int target, int per_round) {
  for (;;) {
    std::vector<int> even, odd;
    for (size_t i = 0; i < list.size(); ++i) (i % 2 == 0 ? even : odd).push_back(list[i]);
    const int drop = std::min({per_round, static_cast<int>(list.size()) - target, static_cast<int>(even.size())});
    if (drop <= 0) return list;
    std::vector<std::pair<float, int>> worth;
    for (const int a : even) {
      float best = -kInfinity;
      for (const int b : odd) best = std::max(best, s(static_cast<size_t>(a), static_cast<size_t>(b)));
      worth.push_back({best, a});
    }
    std::stable_sort(worth.begin(), worth.end(), [](auto& a, auto& b) { return a.first > b.first; });
    list.clear();
    for (size_t i = static_cast<size_t>(drop); i < worth.size(); ++i) list.push_back(worth[i].second);
    list.insert(list.end(), odd.begin(), odd.end());
  }
}

void check_rounds(const std::vector<int>& sizes, const std::vector<int>& lengths, const std::vector<int32_t>& targets, int per_round,
                  const Room& room = {}) {
  const std::vector<int32_t> rows = starts_of(sizes), places = starts_of(lengths);
  const std::vector<float> values = coarse(entries_of(sizes), 11);
  std::vector<int32_t> order, wanted(static_cast<size_t>(places.back()), -1);
  std::vector<uint8_t> kept(std::max(static_cast<size_t>(rows.back()), static_cast<size_t>(room.tokens)), 0);
  size_t offset = 0;
  for (size_t g = 0; g < sizes.size(); ++g) {
    std::vector<int> list;
    for (int i = 0; i < sizes[g]; ++i) list.push_back(i);
    const std::vector<int32_t> swaps = random_ints(list.size() + 1, 1 << 20, g);
    for (size_t i = list.size(); i > 1; --i) std::swap(list[i - 1], list[static_cast<size_t>(swaps[i]) % i]);
    list.resize(static_cast<size_t>(lengths[g]));
    for (const int i : list) order.push_back(rows[g] + i);
    const std::vector<int> left = rounds(matrix_at(values, offset, sizes[g]), list, targets[g], per_round);
    for (size_t i = 0; i < left.size(); ++i) {
      wanted[static_cast<size_t>(places[g]) + i] = rows[g] + left[i];
      kept[static_cast<size_t>(rows[g] + left[i])] = 1;
    }
    offset += static_cast<size_t>(sizes[g]) * static_cast<size_t>(sizes[g]);
  }
  const Buffer<float> similarity(values);
  Buffer<int32_t> cu_seqlens(rows), cu_order(places), stop(targets);
  const Buffer<int32_t> listed(order), survivors(std::max(order.size(), static_cast<size_t>(room.tokens)));
  const Buffer<uint8_t> keep(kept.size());
  glimpse_drop_duplicates_params p{};
  p.similarity = similarity.data();
  p.cu_seqlens = cu_seqlens.data();
  p.order = listed.data();
  p.cu_order = cu_order.data();
  p.targets = stop.data();
  p.survivors = survivors.data();
  p.keep = keep.data();
  p.entries = std::max(static_cast<int64_t>(values.size()), room.entries);
  p.groups = static_cast<int64_t>(sizes.size());
  p.tokens = static_cast<int64_t>(kept.size());
  p.listed = std::max<int64_t>(places.back(), room.tokens);
  p.per_round = per_round;
  p.longest = room.longest;
  p.dtype = GLIMPSE_FLOAT32;
  wanted.resize(survivors.size(), -1);
  const glimpse_cuda_call* const how = call(glimpse_cuda_drop_duplicates_workspace(&p));
  run_twice({&cu_seqlens, &cu_order, &stop}, [&] { expect_ok(glimpse_cuda_drop_duplicates(&p, how)); }, [&] {
    expect_equal(survivors.read(), wanted, "survivors");
    expect_equal(keep.read(), kept, "keep");
  });
}

}  // namespace

TEST(farthest_points_groups) {
  check_farthest({40, 0, 1, 33, 2, 64}, {9, 3, 4, 40, 1, 20}, true);
  check_farthest({40, 0, 1, 33, 2, 64}, {9, 3, 4, 40, 1, 20}, false, {64});
}
TEST(farthest_points_cluster) {
  set_chip(90, 132);
  check_farthest({2052}, {6}, true);   // two blocks
  check_farthest({2103}, {6}, false);  // not a multiple of four
}
TEST(farthest_points_without_clusters) {
  set_chip(80, 108);
  check_farthest({2052, 7}, {6, 3}, true);
}
TEST(farthest_points_bound_far_above) {
  set_chip(90, 132);
  // From the shapes alone a group could be far longer than it is: its team has blocks without columns.
  check_farthest({121, 30}, {4, 2}, true, {-1, 9000, 9000 * 9000ll});
}
TEST(farthest_points_in_the_workspace) {
  set_chip(86, 50);
  // The running minimum, 96 KiB, would have room in shared memory alone; not beside the static variables.
  check_farthest({60, 3}, {6, 2}, true, {-1, 24576, 24576 * 24576ll});
}

TEST(greedy_dpp_groups) {
  check_classes({40, 0, 1, 33, 2, 70}, {9, 3, 4, 40, 1, 20}, 12);
  check_classes({40, 0, 1, 33, 2, 70}, {50, 3, 4, 40, 1, 70}, 1000, {70});
}
TEST(greedy_dpp_cluster) {
  set_chip(90, 132);
  check_classes({600}, {200}, 1000);
  set_chip(90, 3);
  check_classes({600}, {150}, 1000);
}
TEST(greedy_dpp_beyond_shared_memory_and_one_chunk) {
  set_chip(80, 108);
  check_classes({700}, {650}, 100000);
}
TEST(greedy_dpp_several_columns_a_thread) {
  set_chip(86, 50);
  check_classes({2101, 5}, {9, 3}, 1000);
}
TEST(greedy_dpp_in_the_workspace) {
  set_chip(86, 50);
  check_classes({60, 33}, {20, 30}, 50, {-1, 6000, 6000 * 6000ll});
}
TEST(greedy_dpp_same_on_every_chip) {
  const int n = 301, count = 150;
  const std::vector<float> values = cosines(n, 160, 1);
  std::vector<float> weight;
  for (const float x : random_floats(static_cast<size_t>(n), 2)) weight.push_back(0.05f + std::fabs(x));
  set_chip(80, 108);
  const std::vector<int32_t> first = dpp_picks(values, weight, n, count);
  expect_greedy(values, weight, n, first);
  for (const int multiprocessors : {1, 2, 132}) {
    set_chip(90, multiprocessors);
    expect_equal(dpp_picks(values, weight, n, count), first, "picks");
  }
  set_chip(86, 50);
  expect_equal(dpp_picks(values, weight, n, count), first, "picks");
}

TEST(drop_duplicates_groups) {
  check_rounds({50, 0, 1, 30, 30, 9, 64, 17}, {37, 0, 1, 30, 29, 9, 64, 1}, {5, 0, 0, 30, 2, 100, 7, 1}, 8);
  check_rounds({50, 0, 1, 30, 30, 9, 64, 17}, {37, 0, 1, 30, 29, 9, 64, 1}, {36, 2, 1, 1, 0, 4, 16, 0}, 3, {64});
}
TEST(drop_duplicates_cluster) {
  set_chip(90, 132);
  check_rounds({132}, {130}, {122}, 8);  // eight blocks
  set_chip(90, 4);
  check_rounds({100}, {95}, {70}, 8);            // four
  check_rounds({81, 40}, {80, 39}, {60, 5}, 5);  // two a group
}
TEST(drop_duplicates_in_the_workspace) {
  set_chip(86, 50);
  check_rounds({90, 40}, {85, 40}, {50, 7}, 8, {-1, 4200, 4200 * 4200ll});
}

}  // namespace glimpse::tests

// SPDX-License-Identifier: Apache-2.0
// Sources join the target with the largest cosine. One task is a block of sources of one group against all its targets: the
// sources are vector lanes, so that the best one so far and its row are two vectors each, and of the cosines there is never
// more than a tile. Rows without a finite length are in no list and take part in nothing.
#include "glimpse/merge_nearest.h"

#include <stdlib.h>

#include "cpu/attention_core.h"
#include "cpu/segments.h"

namespace glimpse::GLIMPSE_ISA_NS {
namespace {

constexpr int64_t kSources = kKeys;  // of a task
constexpr int64_t kTargets = 192;    // whose products are held at once
constexpr int64_t kDepth = 128;      // cells of a step: those of the sources stay in the first cache
constexpr int64_t kColumns = 1024;   // values of a row that a task adds up
constexpr float kLeastLength = 1e-8f;
// Products of a call up to which one thread does it: waking a second costs as much.
constexpr int64_t kOneThread = int64_t{1} << 18;

struct Plan {
  float* inverse;        // [rows]: one over the length; negative where the row is neither source nor target or has no length
  int32_t* kept;         // [rows]: the targets, rising
  int32_t* given;        // [rows]: the sources of groups with a target, rising
  int32_t* kept_starts;  // [groups + 1]: where those of a group begin
  int32_t* given_starts; // [groups + 1]
  int64_t* tasks;        // [groups + 1]: tasks before each group
  int32_t* order;        // [rows]: the sources by what they joined, those of one target rising
  int32_t* order_starts; // [rows + 1]: where those of a row begin
};

template <class Body>
void for_tasks(int64_t tasks, int64_t products, const Body& body) {
  if (products > kOneThread)
    parallel_for(tasks, body);
  else
    for (int64_t task = 0; task < tasks; ++task) body(task);
}

// ---- lists ---------------------------------------------------------------------------------------------------------

template <class T>
void measure(const glimpse_merge_nearest_params& p, const Plan& plan) {
  const int64_t first = p.cu[0], count = p.cu[p.groups] - first;
  parallel_range(count, 1 + kOneThread / larger<int64_t>(1, p.dim), [&](int64_t begin, int64_t end) {
    for (int64_t row = first + begin; row < first + end; ++row) {
      plan.inverse[row] = -1.0f;
      if (!p.targets[row] && p.sources != nullptr && !p.sources[row]) continue;
      const T* x = static_cast<const T*>(p.metric) + row * p.metric_stride;
      const float length = __builtin_sqrtf(dot(x, x, p.dim));
      if (length <= __FLT_MAX__) plan.inverse[row] = 1.0f / larger(length, kLeastLength);
    }
  });
}

void list_rows(const glimpse_merge_nearest_params& p, const Plan& plan) {
  int32_t kept = 0, given = 0;
  for (int64_t group = 0; group < p.groups; ++group) {
    plan.kept_starts[group] = kept;
    plan.given_starts[group] = given;
    const int32_t before = given;
    for (int32_t row = p.cu[group]; row < p.cu[group + 1]; ++row) {
      if (plan.inverse[row] < 0.0f) continue;
      if (p.targets[row])
        plan.kept[kept++] = row;
      else
        plan.given[given++] = row;
    }
    if (kept == plan.kept_starts[group]) given = before;  // nothing to join
  }
  plan.kept_starts[p.groups] = kept;
  plan.given_starts[p.groups] = given;
}

// ---- the nearest target --------------------------------------------------------------------------------------------

// products[target][source] of `count` targets, from `packed`: the sources as [cell][source].
template <class T>
void multiply_targets(const glimpse_merge_nearest_params& p, const int32_t* targets, int64_t count, const float* packed,
                      int vectors, float* products) {
  constexpr int64_t kElements = kPairs<T> ? 2 : 1;  // of a cell
  float cells[kTileRows * kDepth] __attribute__((aligned(64)));
  const int64_t all = cells_of<T>(p.dim), tiles = (count + kTileRows - 1) / kTileRows;
  int64_t depth = 0;
  do {  // once even for rows without elements
    const int64_t steps = smaller(kDepth, all - depth), element = depth * kElements;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = count * tile / tiles;
      const int height = static_cast<int>(count * (tile + 1) / tiles - first);
      for (int i = 0; i < height; ++i)
        pack_query(static_cast<const T*>(p.metric) + targets[first + i] * p.metric_stride + element,
                   smaller(steps * kElements, p.dim - element), 1.0f, cells + i * kDepth);
      multiply<T>({bytes_of(cells), kDepth * 4, packed + depth * kSources, kSources, steps, nullptr, products + first * kSources,
                   kSources, depth > 0},
                  height, vectors);
    }
    depth += kDepth;
  } while (depth < all);
}

template <class T>
bool find_nearest(const glimpse_merge_nearest_params& p, const Plan& plan, int64_t task) {
  const int64_t group = find_segment(plan.tasks, p.groups, task);
  const int64_t from = plan.given_starts[group] + (task - plan.tasks[group]) * kSources;
  const int count = static_cast<int>(smaller<int64_t>(kSources, plan.given_starts[group + 1] - from));
  const int vectors = (count + kLanes - 1) / kLanes;
  const int64_t packed_floats = round_up(cells_of<T>(p.dim) * kSources, 16);
  float* packed = static_cast<float*>(thread_scratch(static_cast<size_t>((packed_floats + kTargets * kSources) * 4)));
  if (packed == nullptr) return false;
  float* products = packed + packed_floats;
  const T* rows[kSources];
  for (int i = 0; i < count; ++i) rows[i] = static_cast<const T*>(p.metric) + plan.given[from + i] * p.metric_stride;
  pack_keys(rows, count, p.dim, packed);

  vf best[kKeyVectors];
  vi nearest[kKeyVectors];
  for (int j = 0; j < kKeyVectors; ++j) {
    best[j] = splat(-__builtin_inff());
    nearest[j] = splat_i(plan.kept[plan.kept_starts[group]]);
  }
  const int64_t end = plan.kept_starts[group + 1];
  for (int64_t first = plan.kept_starts[group]; first < end; first += kTargets) {
    const int64_t targets = smaller(kTargets, end - first);
    multiply_targets<T>(p, plan.kept + first, targets, packed, vectors, products);
    for (int64_t t = 0; t < targets; ++t) {
      const int32_t row = plan.kept[first + t];
      // a source's own length changes no order, and without it there is one rounding less
      const vf inverse = splat(plan.inverse[row]);
      for (int j = 0; j < vectors; ++j) {
        const vf cosine = load(products + t * kSources + j * kLanes) * inverse;
        const vi nearer = cosine > best[j];
        best[j] = select(nearer, cosine, best[j]);
        nearest[j] = (nearer & splat_i(row)) | (~nearer & nearest[j]);
      }
    }
  }
  for (int i = 0; i < count; ++i) p.nearest[plan.given[from + i]] = nearest[i / kLanes][i % kLanes];
  return true;
}

// ---- sums ----------------------------------------------------------------------------------------------------------

void sort_sources(const glimpse_merge_nearest_params& p, const Plan& plan) {
  memset(plan.order_starts, 0, sizeof(int32_t) * static_cast<size_t>(p.rows + 1));
  const int32_t given = plan.given_starts[p.groups];
  for (int32_t i = 0; i < given; ++i) ++plan.order_starts[p.nearest[plan.given[i]] + 1];
  for (int64_t row = 0; row < p.rows; ++row) plan.order_starts[row + 1] += plan.order_starts[row];
  for (int32_t i = 0; i < given; ++i) plan.order[plan.order_starts[p.nearest[plan.given[i]]]++] = plan.given[i];
  // each start is now the next one's
  for (int64_t row = p.rows; row > 0; --row) plan.order_starts[row] = plan.order_starts[row - 1];
  plan.order_starts[0] = 0;
}

// Columns column .. of a target that sources[0 .. count) joined: `vectors` whole vectors, or part of one.
template <class T, int vectors>
GLIMPSE_INLINE void merge_columns(const glimpse_merge_nearest_params& p, int64_t target, const int32_t* sources, int32_t count,
                                  int64_t column) {
  const int part = static_cast<int>(smaller<int64_t>(kLanes, p.width - column));
  auto fetch = [&](int64_t row, int j) {
    const T* from = static_cast<const T*>(p.values) + row * p.values_stride + column;
    return vectors > 1 || part == kLanes ? load(from + j * kLanes) : load_n(from, part);
  };
  vf total[vectors] = {};
  for (int32_t i = 0; i < count; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) total[j] = total[j] + fetch(sources[i], j);
  T* to = static_cast<T*>(p.out) + target * p.out_stride + column;
  const float number = static_cast<float>(count);
#pragma GCC unroll 8
  for (int j = 0; j < vectors; ++j) {
    const vf own = fetch(target, j);
    const vf merged = p.plus_mean ? own + total[j] / number : (own + total[j]) / (1.0f + number);
    if (vectors > 1 || part == kLanes)
      store(to + j * kLanes, merged);
    else
      store_n(to, merged, part);
  }
}

template <class T>
void merge(const glimpse_merge_nearest_params& p, const Plan& plan) {
  const int64_t parts = (p.width + kColumns - 1) / kColumns, given = plan.given_starts[p.groups];
  for_tasks(plan.kept_starts[p.groups] * parts, given * p.width, [&](int64_t task) {
    const int64_t target = plan.kept[task / parts];
    const int32_t* sources = plan.order + plan.order_starts[target];
    const int32_t count = plan.order_starts[target + 1] - plan.order_starts[target];
    if (count == 0) return;
    int64_t column = task % parts * kColumns;
    const int64_t end = smaller(column + kColumns, p.width);
    for (; column + 8 * kLanes <= end; column += 8 * kLanes) merge_columns<T, 8>(p, target, sources, count, column);
    for (; column < end; column += kLanes) merge_columns<T, 1>(p, target, sources, count, column);
  });
}

template <class T>
bool join(const glimpse_merge_nearest_params& p, const Plan& plan) {
  measure<T>(p, plan);
  list_rows(p, plan);
  count_blocks(plan.given_starts, p.groups, kSources, plan.tasks);
  int64_t products = 0;
  for (int64_t g = 0; g < p.groups; ++g)
    products += static_cast<int64_t>(plan.given_starts[g + 1] - plan.given_starts[g]) *
                (plan.kept_starts[g + 1] - plan.kept_starts[g]) * p.dim;
  bool short_of_memory = false;  // only ever set to true, by whichever thread
  for_tasks(plan.tasks[p.groups], products, [&](int64_t task) {
    if (!find_nearest<T>(p, plan, task)) __atomic_store_n(&short_of_memory, true, __ATOMIC_RELAXED);
  });
  return !short_of_memory;
}

}  // namespace

glimpse_status merge_nearest(const glimpse_merge_nearest_params& p) {
  const glimpse_status status = check_bounds("merge_nearest", "cu_seqlens", p.cu, p.groups, p.rows);
  if (status != GLIMPSE_OK) return status;
  for (int64_t row = 0; row < p.rows; ++row) p.nearest[row] = -1;
  const size_t rows = static_cast<size_t>(p.rows), groups = static_cast<size_t>(p.groups);
  char* memory = static_cast<char*>(malloc(16 * (groups + 1) + 20 * (rows + 1)));
  if (memory == nullptr) return fail(GLIMPSE_OUT_OF_MEMORY, "merge_nearest: no memory for the lists of rows");
  Plan plan;
  plan.tasks = reinterpret_cast<int64_t*>(memory);
  plan.kept_starts = reinterpret_cast<int32_t*>(plan.tasks + groups + 1);
  plan.given_starts = plan.kept_starts + groups + 1;
  plan.kept = plan.given_starts + groups + 1;
  plan.given = plan.kept + rows;
  plan.order = plan.given + rows;
  plan.order_starts = plan.order + rows;
  plan.inverse = reinterpret_cast<float*>(plan.order_starts + rows + 1);
  const bool done = p.metric_dtype == GLIMPSE_BFLOAT16 ? join<bf16>(p, plan) : join<float>(p, plan);
  if (done) {
    sort_sources(p, plan);
    p.dtype == GLIMPSE_BFLOAT16 ? merge<bf16>(p, plan) : merge<float>(p, plan);
  }
  free(memory);
  return done ? GLIMPSE_OK : fail(GLIMPSE_OUT_OF_MEMORY, "merge_nearest: no scratch memory");
}

}  // namespace glimpse::GLIMPSE_ISA_NS

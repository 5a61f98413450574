// SPDX-License-Identifier: Apache-2.0
// Max-min selection in two passes.
//
// The first pick needs the second-smallest distance of every column. Distances fall as similarities rise, rounded or not, so that is the distance
// of the second-highest similarity: two running maxima a column, eight rows of the matrix at a time, and threads that share the columns. Every later pick
// reads one row of the matrix, brings the running minimum up to date and finds its maximum in the same pass; a group's picks follow from each other and stay
// on one thread.
#include "glimpse/farthest_points.h"

#include <float.h>

#include "cpu/greedy.h"

namespace glimpse::GLIMPSE_ISA_NS {
namespace {

constexpr int kRows = 8;             // of the matrix at a time
constexpr int kBlock = 8 * kLanes;   // columns that are searched only if their maximum is the best so far
constexpr int64_t kColumns = 64;     // a thread's share is a multiple of these

GLIMPSE_INLINE vf as_stored(float, vf x) { return x; }
GLIMPSE_INLINE vf as_stored(bf16, vf x) { return rounded_to_bf16(x); }

// 1 - s as torch rounds it. vmax gives its second argument where the first is NaN: that is the least distance.
template <class T>
GLIMPSE_INLINE vf distance(vf s) {
  return vmax(as_stored(T{}, splat(1.0f) - s), splat(-FLT_MAX));
}

// Brings the two highest similarities of each column up to date with `rows` rows, n apart.
template <class T, int rows>
GLIMPSE_INLINE void meet(const T* from, int64_t n, float* most, float* second, int64_t columns) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    const int lanes = static_cast<int>(smaller<int64_t>(kLanes, columns - c));
    vf first = load_some(most + c, lanes), next = load_some(second + c, lanes);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      // NaN, the least distance, becomes the highest similarity: vmin, too, gives its second argument.
      const vf s = vmin(load_some(from + r * n + c, lanes), splat(kInfinity));
      next = vmax(next, vmin(first, s));
      first = vmax(first, s);
    }
    store_some(most + c, first, lanes);
    store_some(second + c, next, lanes);
  }
}

// The second-smallest distance of the columns that begin at `top`; most and second are -infinity before.
template <class T>
void second_nearest(const T* top, int64_t n, float* most, float* second, int64_t columns) {
  int64_t row = 0;
  for (; row + kRows <= n; row += kRows) meet<T, kRows>(top + row * n, n, most, second, columns);
  for (; row < n; ++row) meet<T, 1>(top + row * n, n, most, second, columns);
  for (int64_t c = 0; c < columns; c += kLanes) {
    const int lanes = static_cast<int>(smaller<int64_t>(kLanes, columns - c));
    store_some(second + c, distance<T>(load_some(second + c, lanes)), lanes);
  }
}

// The first column of the largest `nearest`, which is -infinity behind the last one; with a row of the matrix, after that is brought up to date
// with its distances.
template <class T, bool kRow>
int64_t farthest(const T* row, float* nearest, int64_t n) {
  float best = -kInfinity;
  int64_t at = 0;
  for (int64_t block = 0; block < n; block += kBlock) {
    vf most = splat(-kInfinity);
    if (!kRow || n - block >= kBlock) {
#pragma GCC unroll 8
      for (int i = 0; i < kBlock; i += kLanes) {
        vf least = load(nearest + block + i);
        if (kRow) {
          least = vmin(least, distance<T>(load(row + block + i)));
          store(nearest + block + i, least);
        }
        most = vmax(most, least);
      }
    } else {
      for (int64_t c = block; c < n; c += kLanes) {
        const vf read = load_some(row + c, static_cast<int>(smaller<int64_t>(kLanes, n - c)));
        const vf least = vmin(load(nearest + c), distance<T>(read));
        store(nearest + c, least);
        most = vmax(most, least);
      }
    }
    const float found = hmax(most);
    if (found > best) best = found, at = block;
  }
  while (nearest[at] != best) ++at;
  return at;
}

template <class T>
void pick_points(const glimpse_farthest_points_params& p, const Group& group, float* nearest) {
  const T* matrix = static_cast<const T*>(p.similarity) + group.offset;
  const int64_t count = p.repeat != 0 ? group.count : smaller(group.count, group.n);
  if (count == 0) return;
  int64_t pick = farthest<T, false>(nullptr, nearest, group.n);
  // The first choice was made by the distance to any other token; from now on the picked ones count.
  for (int64_t c = 0; c < group.n; ++c) nearest[c] = kInfinity;
  for (int64_t i = 0;; ++i) {
    p.picks[group.place + i] = static_cast<int32_t>(group.first + pick);
    p.keep[group.first + pick] = 1;
    if (i + 1 == count) return;
    if (p.repeat == 0) nearest[pick] = -kInfinity;
    pick = farthest<T, true>(matrix + pick * group.n, nearest, group.n);
  }
}

template <class T>
glimpse_status run(const glimpse_farthest_points_params& p) {
  const Packed packed{"farthest_points", p.cu_seqlens, p.cu_picks, p.entries, p.groups, p.tokens, p.capacity, p.longest};
  if (check_packed(packed, "cu_picks") != GLIMPSE_OK) return GLIMPSE_INVALID;
  clear(p.picks, p.capacity, p.keep, p.tokens);
  // A group's columns, and a block behind them.
  const int64_t room = p.tokens + p.groups * kBlock;
  auto* nearest = static_cast<float*>(thread_scratch(static_cast<size_t>(2 * room) * sizeof(float)));
  if (nearest == nullptr && room > 0)
    return fail(GLIMPSE_OUT_OF_MEMORY, "farthest_points: no scratch memory for %lld tokens", static_cast<long long>(p.tokens));
  for (int64_t i = 0; i < 2 * room; ++i) nearest[i] = -kInfinity;

  int64_t looked_at = 0;
  for (Group group = packed.start(); packed.next(group, p.groups);)
    if (packed.wanted(group, 0)) looked_at += group.n * group.n;
  const int64_t shares = (p.tokens + kColumns - 1) / kColumns;
  parallel_range(shares, 1 + 16 * kRegion * shares / (looked_at + 1), [&](int64_t begin, int64_t end) {
    begin *= kColumns, end *= kColumns;
    for (Group group = packed.start(); packed.next(group, p.groups);) {
      const int64_t from = larger(begin, group.first), to = smaller(end, group.first + group.n);
      if (from >= to || group.count == 0 || !packed.wanted(group, 0)) continue;
      float* second = nearest + from + group.index * kBlock;
      const T* top = static_cast<const T*>(p.similarity) + group.offset + (from - group.first);
      second_nearest(top, group.n, second + room, second, to - from);
    }
  });
  const int64_t work = p.groups > 0 ? p.tokens / p.groups * smaller<int64_t>(p.capacity, p.cu_picks[p.groups]) / 8 : 0;
  parallel_range(p.groups, packed.grain(work), [&](int64_t begin, int64_t end) {
    for (Group group = packed.start(); packed.next(group, end);)
      if (packed.wanted(group, begin)) pick_points<T>(p, group, nearest + group.first + group.index * kBlock);
  });
  return GLIMPSE_OK;
}

}  // namespace

glimpse_status farthest_points(const glimpse_farthest_points_params& p) {
  return p.dtype == GLIMPSE_BFLOAT16 ? run<bf16>(p) : run<float>(p);
}

}  // namespace glimpse::GLIMPSE_ISA_NS

// SPDX-License-Identifier: Apache-2.0
// What the greedy selectors (farthest_points, greedy_dpp, drop_duplicates) share: the groups of packed square matrices.
#pragma once

#include "cpu/vec.h"

namespace glimpse::GLIMPSE_ISA_NS {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr int64_t kRegion = int64_t{1} << 16;  // steps of work that are worth a thread

struct Group {
  int64_t index;
  int64_t first, n;      // rows of the packed tokens
  int64_t offset;        // of its matrix
  int64_t place, count;  // of its picks, or its list
};

struct Packed {
  const char* op;
  const int32_t* cu_seqlens;
  const int32_t* cu_places;  // where the picks, or the list, of each group start
  int64_t entries, groups, tokens, capacity, longest;

  bool holds(int64_t n) const { return longest < 0 || n <= longest; }
  // Groups that are worth a thread, where all of them are `work`.
  int64_t grain(int64_t work) const { return 1 + kRegion * groups / (work + 1); }

  // Where a matrix begins follows from all groups before it, so they are visited from the first one:
  // for (Group group = start(); next(group, end);) if (wanted(group, begin)) ..
  Group start() const { return Group{-1, 0, 0, 0, 0, 0}; }
  bool next(Group& group, int64_t end) const {
    group.offset += group.n * group.n;
    if (++group.index >= end) return false;
    group.first = cu_seqlens[group.index];
    group.n = cu_seqlens[group.index + 1] - group.first;
    group.place = smaller<int64_t>(cu_places[group.index], capacity);
    group.count = smaller<int64_t>(cu_places[group.index + 1], capacity) - group.place;
    return true;
  }
  bool wanted(const Group& group, int64_t begin) const { return group.index >= begin && group.n > 0 && holds(group.n); }
};

// Bounds that ascend, and matrices that all lie within the entries.
inline glimpse_status check_packed(const Packed& p, const char* places) {
  int64_t entries = 0;
  for (int64_t g = 0; g <= p.groups; ++g) {
    const int64_t least = g > 0 ? p.cu_seqlens[g - 1] : 0, end = p.cu_seqlens[g];
    if (end < least || end > (g > 0 ? p.tokens : 0))
      return fail(GLIMPSE_INVALID, "%s: cu_seqlens[%lld]: expected a value in [%lld, %lld], found %lld", p.op, static_cast<long long>(g),
                  static_cast<long long>(least), static_cast<long long>(g > 0 ? p.tokens : 0), static_cast<long long>(end));
    const int64_t least_place = g > 0 ? p.cu_places[g - 1] : 0;
    if (p.cu_places[g] < least_place)
      return fail(GLIMPSE_INVALID, "%s: %s[%lld]: expected at least %lld, found %d", p.op, places, static_cast<long long>(g),
                  static_cast<long long>(least_place), p.cu_places[g]);
    entries += (end - least) * (end - least);
  }
  if (entries > p.entries)
    return fail(GLIMPSE_INVALID, "%s: similarity: expected at least %lld entries for the groups of cu_seqlens, found %lld", p.op,
                static_cast<long long>(entries), static_cast<long long>(p.entries));
  return GLIMPSE_OK;
}

// Every `what` is -1, every `keep` 0.
inline void clear(int32_t* what, int64_t count, uint8_t* keep, int64_t tokens) {
  for (int64_t i = 0; i < count; ++i) what[i] = -1;
  if (tokens > 0) memset(keep, 0, static_cast<size_t>(tokens));
}

// Cuts memory into arrays, each on a cache line of its own; without memory it only counts the bytes.
struct Room {
  unsigned char* memory;
  size_t used = 0;

  template <class X>
  X* of(int64_t count) {
    const size_t at = used;
    used += (static_cast<size_t>(count) * sizeof(X) + 63) / 64 * 64;
    return memory == nullptr ? nullptr : reinterpret_cast<X*>(memory + at);
  }
};

GLIMPSE_INLINE vf load_some(const float* p, int n) { return n == kLanes ? load(p) : load_n(p, n); }
GLIMPSE_INLINE vf load_some(const bf16* p, int n) { return n == kLanes ? load(p) : load_n(p, n); }
GLIMPSE_INLINE void store_some(float* p, vf x, int n) { n == kLanes ? store(p, x) : store_n(p, x, n); }

}  // namespace
}  // namespace glimpse::GLIMPSE_ISA_NS

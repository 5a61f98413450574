// SPDX-License-Identifier: Apache-2.0
// Rows in segments: segment s has the rows bounds[s] .. bounds[s + 1].
#pragma once

#include "cpu/isa.h"

namespace glimpse::GLIMPSE_ISA_NS {
namespace {

// GLIMPSE_INVALID, with words, unless `bounds` [segments + 1] ascends from 0 or more to at most `rows`.
glimpse_status check_bounds(const char* op, const char* name, const int32_t* bounds, int64_t segments, int64_t rows) {
  if (bounds[0] < 0) return fail(GLIMPSE_INVALID, "%s: %s[0]: expected >= 0, found %d", op, name, bounds[0]);
  for (int64_t s = 0; s < segments; ++s)
    if (bounds[s + 1] < bounds[s])
      return fail(GLIMPSE_INVALID, "%s: %s: expected ascending values, found %d after %d", op, name, bounds[s + 1],
                  bounds[s]);
  if (bounds[segments] > rows)
    return fail(GLIMPSE_INVALID, "%s: %s: expected at most %lld rows, found %d", op, name, static_cast<long long>(rows),
                bounds[segments]);
  return GLIMPSE_OK;
}

// Last segment s with starts[s] <= task.
GLIMPSE_INLINE int64_t find_segment(const int64_t* starts, int64_t segments, int64_t task) {
  int64_t low = 0, high = segments;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (starts[middle] <= task ? low : high) = middle;
  }
  return low;
}

// starts[s]: blocks of at most `block` rows before segment s; starts[segments] is their number.
GLIMPSE_INLINE void count_blocks(const int32_t* bounds, int64_t segments, int64_t block, int64_t* starts) {
  starts[0] = 0;
  for (int64_t s = 0; s < segments; ++s)
    starts[s + 1] = starts[s] + (bounds[s + 1] - bounds[s] + block - 1) / block;
}

}  // namespace
}  // namespace glimpse::GLIMPSE_ISA_NS

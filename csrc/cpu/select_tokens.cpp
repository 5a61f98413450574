// SPDX-License-Identifier: Apache-2.0
// Threshold, cap, floor and anchors, then the rows that stay.
//
// The tokens above a threshold are the best ones, as many as there are. So what a group keeps before its forced tokens
// is always its best k, with k = max(min(above, cap), floor). Where k is not the threshold's own count, the k-th best score
// is found by a radix select: scores become unsigned keys of the same order, and four histograms of eight bits narrow
// the cut down from the top. No sorting, no memory, and the same answer whatever the number of threads.
#include "glimpse/select_tokens.h"

#include "cpu/isa.h"

namespace glimpse::GLIMPSE_ISA_NS {
namespace {

// Order-preserving: a < b exactly if key(a) < key(b). NaN gets the key of -inf, -0 that of +0.
GLIMPSE_INLINE uint32_t key_of(float score) {
  const float x = score + 0.0f;  // -0 becomes +0
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) bits = 0xff800000u;
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

struct Cut {
  uint32_t key;  // of the last token that stays
  int64_t ties;  // how many of the tokens with this key stay
};

// Where the best k of n end, 1 <= k <= n.
Cut find_cut(const float* logits, int64_t n, int64_t k) {
  uint32_t prefix = 0, mask = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    int64_t histogram[256] = {};
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t key = key_of(logits[i]);
      if ((key & mask) == prefix) ++histogram[(key >> shift) & 255u];
    }
    int digit = 255;
    for (; digit > 0 && histogram[digit] < k; --digit) k -= histogram[digit];
    prefix |= static_cast<uint32_t>(digit) << shift;
    mask |= 255u << shift;
  }
  return Cut{prefix, k};
}

void select_group(const glimpse_select_tokens_params& p, int64_t group) {
  const int64_t begin = p.cu_groups[group], n = p.cu_groups[group + 1] - begin;
  const float* logits = p.logits + begin;
  uint8_t* keep = p.keep + begin;
  int64_t above = 0;
  for (int64_t i = 0; i < n; ++i) {
    keep[i] = logits[i] > p.threshold;
    above += keep[i];
  }
  int64_t k = above;
  if (k > p.caps[group]) k = p.caps[group] > 0 ? p.caps[group] : 0;
  if (k < p.floors[group]) k = p.floors[group] < n ? p.floors[group] : n;
  if (k >= n || k == 0) {
    memset(keep, k > 0, static_cast<size_t>(n));
  } else if (k != above) {
    Cut cut = find_cut(logits, n, k);
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t key = key_of(logits[i]);
      keep[i] = key > cut.key || (key == cut.key && cut.ties-- > 0);
    }
  }
  int64_t count = k;
  if (p.forced != nullptr) {
    count = 0;
    for (int64_t i = 0; i < n; ++i) {
      keep[i] |= p.forced[begin + i];
      count += keep[i];
    }
  }
  p.counts[group] = static_cast<int32_t>(count);
}

glimpse_status check_bounds(const char* name, const int32_t* cu, int64_t segments, int64_t limit) {
  for (int64_t i = 0; i <= segments; ++i) {
    const int64_t least = i > 0 ? cu[i - 1] : 0;
    if (cu[i] < least || cu[i] > limit)
      return fail(GLIMPSE_INVALID, "select_tokens: %s[%lld]: expected a value in [%lld, %lld], found %d", name,
                  static_cast<long long>(i), static_cast<long long>(least), static_cast<long long>(limit), cu[i]);
  }
  return GLIMPSE_OK;
}

}  // namespace

glimpse_status select_tokens(const glimpse_select_tokens_params& p) {
  if (check_bounds("cu_groups", p.cu_groups, p.groups, p.tokens) != GLIMPSE_OK) return GLIMPSE_INVALID;
  if (check_bounds("cu_seqlens", p.cu_seqlens, p.sequences, p.rows) != GLIMPSE_OK) return GLIMPSE_INVALID;
  if (p.cu_groups[0] != 0 || p.cu_groups[p.groups] != p.tokens)
    return fail(GLIMPSE_INVALID, "select_tokens: cu_groups: expected groups from 0 to %lld, found %d to %d",
                static_cast<long long>(p.tokens), p.cu_groups[0], p.cu_groups[p.groups]);
  for (int64_t i = 0; i < p.tokens; ++i)
    if (p.token_rows[i] < 0 || p.token_rows[i] >= p.rows)
      return fail(GLIMPSE_INVALID, "select_tokens: token_rows[%lld]: expected a row in [0, %lld), found %d",
                  static_cast<long long>(i), static_cast<long long>(p.rows), p.token_rows[i]);
  auto* stays = static_cast<uint8_t*>(thread_scratch(static_cast<size_t>(p.rows) + 1));
  if (stays == nullptr) return fail(GLIMPSE_OUT_OF_MEMORY, "select_tokens: no memory for %lld flags",
                                    static_cast<long long>(p.rows));

  const int64_t grain = p.groups > 0 ? 1 + 8192 * p.groups / (p.tokens + p.groups) : 1;
  parallel_range(p.groups, grain, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) select_group(p, group);
  });

  memcpy(stays, p.row_keep, static_cast<size_t>(p.rows));
  for (int64_t i = 0; i < p.tokens; ++i) stays[p.token_rows[i]] |= p.keep[i];
  int64_t kept = 0, sequence = 0;
  for (int64_t row = 0; row <= p.rows; ++row) {
    for (; sequence <= p.sequences && p.cu_seqlens[sequence] == row; ++sequence)
      p.cu_out[sequence] = static_cast<int32_t>(kept);
    if (row == p.rows || !stays[row]) continue;
    if (kept < p.capacity) p.index[kept] = static_cast<int32_t>(row);
    ++kept;
  }
  for (int64_t i = kept; i < p.capacity; ++i) p.index[i] = -1;
  return GLIMPSE_OK;
}

}  // namespace glimpse::GLIMPSE_ISA_NS

// SPDX-License-Identifier: Apache-2.0
// Threshold, cap, floor and anchors, then the rows that stay.
//
// The tokens above a threshold are the best ones, as many as there are. So what a group keeps before its forced tokens
// is always its best k, with k = max(min(above, cap), floor). Where k is not the threshold's own count, the k-th best score
// is found by a radix select: scores become unsigned keys of the same order, and histograms of their digits narrow the
// cut down from the top; after the first one only the few tokens that share the cut's digit are looked at. The answer is
// exact and the same whatever the number of threads.
#include "glimpse/select_tokens.h"

#include "cpu/isa.h"
#include "cpu/segments.h"

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
  uint32_t key;   // of the last token that stays
  int64_t ties;   // how many of the tokens with this key stay
  int64_t equal;  // how many there are
};

constexpr int kTopBits = 11;

// Where the best k of n end, 1 <= k <= n. `keys` holds n keys and is overwritten.
Cut find_cut(uint32_t* keys, int64_t n, int64_t k) {
  constexpr int kTop = 1 << kTopBits, kTopShift = 32 - kTopBits;
  // Two histograms by turns: scores that are close share a digit, and one counter would wait for itself.
  int32_t top[2][kTop] = {};
  int64_t i = 0;
  for (; i + 2 <= n; i += 2) {
    ++top[0][keys[i] >> kTopShift];
    ++top[1][keys[i + 1] >> kTopShift];
  }
  if (i < n) ++top[0][keys[i] >> kTopShift];
  uint32_t digit = kTop - 1;
  for (; digit > 0; --digit) {
    const int64_t count = top[0][digit] + top[1][digit];
    if (count >= k) break;
    k -= count;
  }
  int64_t candidates = 0;
  for (i = 0; i < n; ++i) {
    const uint32_t key = keys[i];
    keys[candidates] = key;
    candidates += (key >> kTopShift) == digit;
  }
  uint32_t prefix = digit << kTopShift;
  for (int shift = kTopShift; shift > 0;) {
    shift -= 7;
    int32_t histogram[128] = {};
    for (i = 0; i < candidates; ++i) ++histogram[(keys[i] >> shift) & 127u];
    for (digit = 127; digit > 0 && histogram[digit] < k; --digit) k -= histogram[digit];
    int64_t left = 0;
    for (i = 0; i < candidates; ++i) {
      const uint32_t key = keys[i];
      keys[left] = key;
      left += ((key >> shift) & 127u) == digit;
    }
    candidates = left;
    prefix |= digit << shift;
  }
  return Cut{prefix, k, candidates};
}

// Keeps the best k of n; false if there is no memory for the keys.
bool keep_best(const float* logits, uint8_t* keep, int64_t n, int64_t k) {
  auto* keys = static_cast<uint32_t*>(thread_scratch(static_cast<size_t>(n) * sizeof(uint32_t)));
  if (keys == nullptr) return false;
  for (int64_t i = 0; i < n; ++i) keys[i] = key_of(logits[i]);
  const Cut cut = find_cut(keys, n, k);
  for (int64_t i = 0; i < n; ++i) keep[i] = key_of(logits[i]) >= cut.key;
  // Of equals the lower indices stay: take the surplus away from the end.
  int64_t surplus = cut.equal - cut.ties;
  for (int64_t i = n - 1; surplus > 0; --i) {
    const bool tied = key_of(logits[i]) == cut.key;
    keep[i] &= !tied;
    surplus -= tied;
  }
  return true;
}

bool select_group(const glimpse_select_tokens_params& p, int64_t group) {
  const int64_t begin = p.cu_groups[group], n = p.cu_groups[group + 1] - begin;
  const float* logits = p.logits + begin;
  uint8_t* keep = p.keep + begin;
  int32_t above_count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const bool above = logits[i] > p.threshold;
    keep[i] = above;
    above_count += above;
  }
  const int64_t above = above_count;
  int64_t k = above;
  if (k > p.caps[group]) k = p.caps[group] > 0 ? p.caps[group] : 0;
  if (k < p.floors[group]) k = p.floors[group] < n ? p.floors[group] : n;
  if (k >= n || k == 0) {
    if (n > 0) memset(keep, k > 0, static_cast<size_t>(n));
  } else if (k != above && !keep_best(logits, keep, n, k)) {
    return false;
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
  return true;
}

}  // namespace

glimpse_status select_tokens(const glimpse_select_tokens_params& p) {
  if (check_bounds("select_tokens", "cu_groups", p.cu_groups, p.groups, p.tokens) != GLIMPSE_OK) return GLIMPSE_INVALID;
  if (check_bounds("select_tokens", "cu_seqlens", p.cu_seqlens, p.sequences, p.rows) != GLIMPSE_OK) return GLIMPSE_INVALID;
  if (p.cu_groups[0] != 0 || p.cu_groups[p.groups] != p.tokens)
    return fail(GLIMPSE_INVALID, "select_tokens: cu_groups: expected groups from 0 to %lld, found %d to %d",
                static_cast<long long>(p.tokens), p.cu_groups[0], p.cu_groups[p.groups]);
  for (int64_t i = 0; i < p.tokens; ++i)
    if (p.token_rows[i] < 0 || p.token_rows[i] >= p.rows)
      return fail(GLIMPSE_INVALID, "select_tokens: token_rows[%lld]: expected a row in [0, %lld), found %d",
                  static_cast<long long>(i), static_cast<long long>(p.rows), p.token_rows[i]);
  const int64_t grain = p.groups > 0 ? 1 + 16384 * p.groups / (p.tokens + p.groups) : 1;
  bool memory = true;  // only ever set to false, by whichever thread
  parallel_range(p.groups, grain, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group)
      if (!select_group(p, group)) __atomic_store_n(&memory, false, __ATOMIC_RELAXED);
  });
  auto* stays = static_cast<uint8_t*>(thread_scratch(static_cast<size_t>(p.rows) + 1));
  if (stays == nullptr || !memory)
    return fail(GLIMPSE_OUT_OF_MEMORY, "select_tokens: no scratch memory for %lld tokens in %lld rows",
                static_cast<long long>(p.tokens), static_cast<long long>(p.rows));

  if (p.rows > 0) memcpy(stays, p.row_keep, static_cast<size_t>(p.rows));
  for (int64_t i = 0; i < p.tokens; ++i) stays[p.token_rows[i]] |= p.keep[i];
  // Without a branch on whether a row stays: write it, and let the next one overwrite it if it does not.
  int64_t kept = 0, row = 0;
  const auto walk_to = [&](int64_t end) {
    for (; row < end && kept < p.capacity; ++row) {
      p.index[kept] = static_cast<int32_t>(row);
      kept += stays[row];
    }
    for (; row < end; ++row) kept += stays[row];
  };
  for (int64_t sequence = 0; sequence <= p.sequences; ++sequence) {
    walk_to(p.cu_seqlens[sequence]);
    p.cu_out[sequence] = static_cast<int32_t>(kept);
  }
  walk_to(p.rows);
  for (int64_t i = kept; i < p.capacity; ++i) p.index[i] = -1;
  return GLIMPSE_OK;
}

}  // namespace glimpse::GLIMPSE_ISA_NS

// SPDX-License-Identifier: Apache-2.0
// The scan of VScan as it is written: all tokens of a group by falling score, each picked while its window has room. The order comes
// from a radix sort of keys, stable, so that of equals the lower index is first; a scan stops when the budget is used up.
#include "glimpse/window_topk.h"

#include "cpu/segments.h"
#include "cpu/vec.h"

namespace glimpse::GLIMPSE_ISA_NS {
namespace {

// Order-reversing: key(a) < key(b) exactly if a > b. NaN gets the key of -inf, -0 that of +0.
GLIMPSE_INLINE uint32_t falling_key(float score) {
  const float x = score + 0.0f;  // -0 becomes +0
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) bits = 0xff800000u;
  return (bits & 0x80000000u) != 0 ? bits : ~bits & 0x7fffffffu;
}

struct Item {
  uint32_t key;
  int32_t index;
};

constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits, kPasses = 3;

// Sorts `items` by key, stable; returns where the result is, `items` or `other`.
const Item* sorted(Item* items, Item* other, int64_t n) {
  int32_t counts[kPasses][kDigits] = {};
  for (int64_t i = 0; i < n; ++i)
    for (int pass = 0; pass < kPasses; ++pass) ++counts[pass][items[i].key >> (pass * kDigitBits) & (kDigits - 1)];
  for (int pass = 0; pass < kPasses; ++pass) {
    int32_t* count = counts[pass];
    const int shift = pass * kDigitBits;
    if (count[items[0].key >> shift & (kDigits - 1)] == n) continue;  // all the same
    int32_t before = 0;
    for (int digit = 0; digit < kDigits; ++digit) {
      const int32_t here = count[digit];
      count[digit] = before;
      before += here;
    }
    for (int64_t i = 0; i < n; ++i) other[count[items[i].key >> shift & (kDigits - 1)]++] = items[i];
    Item* swap = items;
    items = other;
    other = swap;
  }
  return items;
}

// False if there is no memory.
bool pick_group(const glimpse_window_topk_params& p, int64_t group) {
  const int64_t begin = p.cu_seqlens[group], length = p.cu_seqlens[group + 1] - begin;
  const int64_t height = larger(p.grids[2 * group], 0), width = larger(p.grids[2 * group + 1], 0);
  const int64_t n = smaller(length, height * width), place = p.cu_picks[group];
  const int64_t budget = p.cu_picks[group + 1] - place;
  if (n == 0 || (p.max_seqlen >= 0 && length > p.max_seqlen)) return true;
  const int64_t down = larger<int64_t>(1, height / p.window), across = larger<int64_t>(1, width / p.window);
  const int64_t cap = p.share_up ? (budget + down * across - 1) / (down * across) : budget / (down * across);
  const int64_t most = smaller(budget, p.capacity - place);
  if (cap == 0 || most <= 0) return true;

  const size_t bytes = static_cast<size_t>(n) * (2 * sizeof(Item) + sizeof(int32_t));
  auto* items = static_cast<Item*>(thread_scratch(bytes));
  if (items == nullptr) return false;
  // Picks so far of the window whose first token this is.
  auto* taken = reinterpret_cast<int32_t*>(items + 2 * n);
  for (int64_t i = 0; i < n; ++i) {
    items[i] = Item{falling_key(p.scores[begin + i]), static_cast<int32_t>(i)};
    taken[i] = 0;
  }
  const Item* order = sorted(items, items + n, n);
  for (int64_t i = 0, picked = 0; i < n && picked < most; ++i) {
    const int64_t token = order[i].index;
    const int64_t y = smaller(token / width / p.window, down - 1) * p.window;
    const int64_t x = smaller(token % width / p.window, across - 1) * p.window;
    if (taken[y * width + x] >= cap) continue;
    ++taken[y * width + x];
    p.picks[place + picked++] = static_cast<int32_t>(begin + token);
    p.keep[begin + token] = 1;
  }
  return true;
}

}  // namespace

glimpse_status window_topk(const glimpse_window_topk_params& p) {
  if (check_bounds("window_topk", "cu_seqlens", p.cu_seqlens, p.groups, p.tokens) != GLIMPSE_OK) return GLIMPSE_INVALID;
  if (check_bounds("window_topk", "cu_picks", p.cu_picks, p.groups, INT32_MAX) != GLIMPSE_OK) return GLIMPSE_INVALID;
  for (int64_t i = 0; i < p.capacity; ++i) p.picks[i] = -1;
  if (p.tokens > 0) memset(p.keep, 0, static_cast<size_t>(p.tokens));
  // Waking a thread costs as much as sorting some thousand tokens.
  const int64_t grain = p.groups > 0 ? 1 + 4096 * p.groups / (p.tokens + p.groups) : 1;
  bool memory = true;  // only ever set to false, by whichever thread
  parallel_range(p.groups, grain, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group)
      if (!pick_group(p, group)) __atomic_store_n(&memory, false, __ATOMIC_RELAXED);
  });
  if (!memory)
    return fail(GLIMPSE_OUT_OF_MEMORY, "window_topk: no scratch memory for %lld tokens", static_cast<long long>(p.tokens));
  return GLIMPSE_OK;
}

}  // namespace glimpse::GLIMPSE_ISA_NS

// SPDX-License-Identifier: Apache-2.0
// Rounds of bipartite matching on a list, a group a thread.
//
// Which half a token is in changes from round to round, but its likes do not, and who is dropped never comes back. So every listed token remembers the
// few tokens of the list that are most like it, best first: the first of them in the other half is what a round asks for. Half of all tokens
// are there, so a row of the matrix is read when the token is first asked, and again when most of those that it remembers are gone. In a small group
// nothing is remembered: to read its short rows again costs less.
#include "glimpse/drop_duplicates.h"

#include "cpu/greedy.h"

namespace glimpse::GLIMPSE_ISA_NS {
namespace {

constexpr int kNear = 16;   // that a token remembers
constexpr int kApart = 64;  // sets of columns whose highest similarities tell which ones to remember
constexpr int64_t kShort = 40 * kLanes;  // columns that are read each time
constexpr uint32_t kAllLanes = (uint32_t{1} << kLanes) - 1;

struct Near {
  float value[kNear];  // descending
  int32_t row[kNear];
  int32_t known;  // negative: nothing was read yet. Fewer than kNear: there are no others, or they are all at -infinity
};

// What a group needs. Tokens go by their place in the list at the start, which is another one for each, whatever rows it holds.
struct State {
  int64_t n, length;
  int32_t* rows;                // [length] of the group; -1: a row of no use
  int32_t *list, *spare;        // [length], now and in the next round
  Near* near;                   // [length]
  float *left, *odd;            // [n], 0 for rows that are still listed, that are in the second half; else -infinity
  uint64_t *keys, *other_keys;  // [(length + 1) / 2]
};

// Lanes of a that are greater than those of b, as bits.
GLIMPSE_INLINE uint32_t lanes_above(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpgt_ps(a, b)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(a[i] > b[i]) << i;
  return bits;
#endif
}

// A row's similarities to the marked tokens from column c on; to the others, and behind the last of n columns, they are NaN or -infinity.
template <class T>
GLIMPSE_INLINE vf marked_at(int64_t n, const T* row, const float* marks, int64_t c) {
  if (n - c >= kLanes) return load(row + c) + load(marks + c);
  const int lanes = static_cast<int>(n - c);
  return select(lane_index() < splat_i(lanes), load_n(row + c, lanes) + load_n(marks + c, lanes), splat(-kInfinity));
}

// A number that at least kNear of the row's similarities reach: the kNear-th of the highest ones of kApart sets of columns. -infinity if these do not differ.
template <class T>
float reached(const State& s, const T* row) {
  constexpr int kSets = kApart / kLanes;
  vf most[kSets];
  for (int i = 0; i < kSets; ++i) most[i] = splat(-kInfinity);
  int64_t c = 0;
  for (; c + kApart <= s.n; c += kApart)
#pragma GCC unroll 16
    for (int i = 0; i < kSets; ++i) most[i] = vmax(load(row + c + i * kLanes) + load(s.left + c + i * kLanes), most[i]);
  for (int i = 0; c < s.n; c += kLanes, ++i) most[i] = vmax(marked_at(s.n, row, s.left, c), most[i]);
  float found = kInfinity;
  for (int k = 0; k < kNear && found > -kInfinity; ++k) {
    vf top = most[0];
    for (int i = 1; i < kSets; ++i) top = vmax(top, most[i]);
    found = hmax(top);
    for (int i = 0; i < kSets; ++i) most[i] = select(most[i] == splat(found), splat(-kInfinity), most[i]);
  }
  return found;
}

// Remembers the best of the listed rows.
template <class T>
void read_row(const State& s, const T* row, Near& near) {
  near.known = 0;
  float least = reached(s, row);
  for (int64_t c = 0; c < s.n; c += kLanes) {
    const vf like = marked_at(s.n, row, s.left, c);
    // As many as there is room for that are not below; then those above the last one.
    uint32_t wanted = near.known < kNear ? ~lanes_above(splat(least), like) & kAllLanes : lanes_above(like, splat(least));
    if (wanted == 0) continue;
    float values[kLanes];
    store(values, like);
    for (; wanted != 0; wanted &= wanted - 1) {
      const int lane = __builtin_ctz(wanted);
      const float value = values[lane];
      if (!(value > -kInfinity) || (near.known == kNear && value <= least)) continue;
      int place = near.known < kNear ? near.known++ : kNear - 1;
      for (; place > 0 && near.value[place - 1] < value; --place) {
        near.value[place] = near.value[place - 1];
        near.row[place] = near.row[place - 1];
      }
      near.value[place] = value;
      near.row[place] = static_cast<int32_t>(c + lane);
      if (near.known == kNear) least = near.value[kNear - 1];
    }
  }
}

// The highest of a row's similarities with the second half; vmax gives its second argument where the first is NaN.
template <class T>
float highest(const State& s, const T* row) {
  vf most[4];
  for (int i = 0; i < 4; ++i) most[i] = splat(-kInfinity);
  int64_t c = 0;
  for (; c + 4 * kLanes <= s.n; c += 4 * kLanes)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) most[i] = vmax(load(row + c + i * kLanes) + load(s.odd + c + i * kLanes), most[i]);
  for (int i = 0; c < s.n; c += kLanes, ++i) most[i] = vmax(marked_at(s.n, row, s.odd, c), most[i]);
  return hmax(vmax(vmax(most[0], most[1]), vmax(most[2], most[3])));
}

template <class T>
float redundancy(const State& s, const T* matrix, int32_t token) {
  const int32_t row = s.rows[token];
  if (row < 0) return -kInfinity;
  const T* const from = matrix + static_cast<int64_t>(row) * s.n;
  if (s.n <= kShort) return highest(s, from);
  Near& near = s.near[token];
  for (bool again = false;; again = true) {
    if (near.known < 0) read_row(s, from, near);
    int still_listed = 0;
    for (int i = 0; i < near.known; ++i) {
      if (s.odd[near.row[i]] == 0.0f) return near.value[i];
      still_listed += s.left[near.row[i]] == 0.0f;
    }
    if (near.known < kNear) return -kInfinity;
    if (again || still_listed > kNear / 2) return highest(s, from);
    near.known = -1;
  }
}

// Greater for smaller numbers, so that an ascending order is a falling one. -0 is +0.
GLIMPSE_INLINE uint32_t key_of(float x) {
  x = x + 0.0f;
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return (bits & 0x80000000u) != 0 ? bits : ~(bits | 0x80000000u);
}

// Sorts by the upper halves, digit by digit from the lowest; equals stay in their order. Returns where the result is: one of the two.
uint64_t* sort(uint64_t* keys, uint64_t* other, int64_t count) {
  int32_t starts[4][256] = {};
  for (int64_t i = 0; i < count; ++i)
    for (int digit = 0; digit < 4; ++digit) ++starts[digit][keys[i] >> (32 + 8 * digit) & 255u];
  for (int digit = 0; digit < 4; ++digit) {
    const int shift = 32 + 8 * digit;
    if (starts[digit][keys[0] >> shift & 255u] == count) continue;  // 16-bit numbers have two digits that are all alike
    int32_t sum = 0;
    for (int value = 0; value < 256; ++value) {
      const int32_t here = starts[digit][value];
      starts[digit][value] = sum;
      sum += here;
    }
    for (int64_t i = 0; i < count; ++i) other[starts[digit][keys[i] >> shift & 255u]++] = keys[i];
    uint64_t* const sorted = other;
    other = keys;
    keys = sorted;
  }
  return keys;
}

size_t layout(State& s, void* memory) {
  Room room{static_cast<unsigned char*>(memory)};
  s.rows = room.of<int32_t>(s.length);
  s.list = room.of<int32_t>(s.length);
  s.spare = room.of<int32_t>(s.length);
  s.near = room.of<Near>(s.length);
  s.left = room.of<float>(s.n);
  s.odd = room.of<float>(s.n);
  s.keys = room.of<uint64_t>((s.length + 1) / 2);
  s.other_keys = room.of<uint64_t>((s.length + 1) / 2);
  return room.used;
}

// false if there is no memory.
template <class T>
bool thin_out(const glimpse_drop_duplicates_params& p, const Group& group) {
  State s{};
  s.n = group.n;
  s.length = smaller(group.count, group.n);
  if (s.length == 0) return true;
  void* const memory = thread_scratch(layout(s, nullptr));
  if (memory == nullptr) return false;
  layout(s, memory);
  const int32_t* const order = p.order + group.place;
  const T* const matrix = static_cast<const T*>(p.similarity) + group.offset;
  for (int64_t c = 0; c < s.n; ++c) s.left[c] = s.odd[c] = -kInfinity;
  for (int64_t i = 0; i < s.length; ++i) {
    const int64_t row = order[i] - group.first;
    s.rows[i] = row >= 0 && row < s.n ? static_cast<int32_t>(row) : -1;
    s.list[i] = static_cast<int32_t>(i);
    s.near[i].known = -1;
  }
  // Marks the rows of every `step`-th token from `from` on.
  const auto mark = [&](float* rows, float value, int64_t from, int64_t step) {
    for (int64_t i = from; i < s.length; i += step)
      if (s.rows[s.list[i]] >= 0) rows[s.rows[s.list[i]]] = value;
  };
  mark(s.left, 0.0f, 0, 1);
  const int64_t target = larger(p.targets[group.index], 0);
  for (;;) {
    const int64_t even = (s.length + 1) / 2;
    const int64_t drop = smaller(p.per_round, smaller(s.length - target, even));
    if (drop <= 0) break;
    mark(s.odd, 0.0f, 1, 2);
    int64_t unread = 0;
    if (s.n > kShort)
      for (int64_t i = 0; i < s.length; i += 2) unread += s.near[s.list[i]].known < 0;
    parallel_range(even, 1 + kRegion * even / (unread * s.n + 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int32_t token = s.list[2 * i];
        s.keys[i] = static_cast<uint64_t>(key_of(redundancy(s, matrix, token))) << 32 | static_cast<uint32_t>(token);
      }
    });
    const uint64_t* const sorted = sort(s.keys, s.other_keys, even);
    for (int64_t i = drop; i < even; ++i) s.spare[i - drop] = static_cast<int32_t>(sorted[i] & 0xffffffffu);
    for (int64_t i = 1; i < s.length; i += 2) s.spare[even - drop + i / 2] = s.list[i];
    mark(s.odd, -kInfinity, 1, 2);
    for (int64_t i = 0; i < drop; ++i) {
      const int32_t row = s.rows[sorted[i] & 0xffffffffu];
      if (row >= 0) s.left[row] = -kInfinity;
    }
    int32_t* const old = s.list;
    s.list = s.spare;
    s.spare = old;
    s.length -= drop;
    mark(s.left, 0.0f, 0, 1);  // a row may be listed twice
  }
  for (int64_t i = 0; i < s.length; ++i) {
    p.survivors[group.place + i] = order[s.list[i]];
    if (s.rows[s.list[i]] >= 0) p.keep[group.first + s.rows[s.list[i]]] = 1;
  }
  return true;
}

template <class T>
glimpse_status run(const glimpse_drop_duplicates_params& p) {
  const Packed packed{"drop_duplicates", p.cu_seqlens, p.cu_order, p.entries, p.groups, p.tokens, p.listed, p.longest};
  if (check_packed(packed, "cu_order") != GLIMPSE_OK) return GLIMPSE_INVALID;
  clear(p.survivors, p.listed, p.keep, p.tokens);
  bool memory = true;  // only ever set to false, by whichever thread
  const int64_t work = p.groups > 0 ? p.listed * p.tokens / p.groups : 0;
  parallel_range(p.groups, packed.grain(work), [&](int64_t begin, int64_t end) {
    for (Group group = packed.start(); packed.next(group, end);)
      if (packed.wanted(group, begin) && !thin_out<T>(p, group)) __atomic_store_n(&memory, false, __ATOMIC_RELAXED);
  });
  if (memory) return GLIMPSE_OK;
  return fail(GLIMPSE_OUT_OF_MEMORY, "drop_duplicates: no scratch memory for %lld listed of %lld tokens", static_cast<long long>(p.listed),
              static_cast<long long>(p.tokens));
}

}  // namespace

glimpse_status drop_duplicates(const glimpse_drop_duplicates_params& p) {
  return p.dtype == GLIMPSE_BFLOAT16 ? run<bf16>(p) : run<float>(p);
}

}  // namespace glimpse::GLIMPSE_ISA_NS

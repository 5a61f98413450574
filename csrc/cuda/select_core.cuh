// SPDX-License-Identifier: Apache-2.0
// How a block decides one group of tokens (radix select), and how it writes what follows from the rows that stay (scan).
//
// What a group keeps before its forced tokens is always its best k, k = max(min(above, cap), floor): one number, its cut, decides all.
// Logits become unsigned keys of the same order. Where k is the threshold's own count the cut is the threshold; else histograms of the keys'
// digits narrow it down from the top, and end as soon as a digit's keys are used up exactly, after two digits as a rule. If keys equal
// to the cut are left over, the first of them stay: a warp has neighbouring tokens, so it ranks them by a ballot.
//
// Rows that stay are marked by bits, which threads set with an atomic OR: the order in which they come does not matter.
#pragma once

#include "cuda/block.cuh"
#include "glimpse/select_tokens.h"

namespace glimpse::cuda {

constexpr uint32_t kNoKey = 0;  // below the key of every number
constexpr int kRadixBits = 11;
constexpr int kDigits = 1 << kRadixBits;

// Order-preserving: a < b exactly if key_of(a) < key_of(b). NaN gets the key of -inf, -0 that of +0.
__device__ __forceinline__ uint32_t key_of(float score) {
  uint32_t bits = __float_as_uint(score);
  if ((bits & 0x7fffffffu) > 0x7f800000u) bits = 0xff800000u;
  if (bits == 0x80000000u) bits = 0;
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}

struct Cut {
  uint32_t key;  // all above it stay
  int ties;      // and so many of those with this key
};

struct Digit {
  int digit, above, count;
};

template <int THREADS>
struct GroupShared {
  int histogram[kDigits];
  typename BlockScan<THREADS>::Storage scan;
  Digit found;
};

// The tokens of a group as a block holds them: up to PER of the first THREADS * PER in the registers of a thread, the rest read
// again each time. Each warp has a run of neighbours, lane after lane.
template <int THREADS, int PER>
struct Tokens {
  const float* logits;
  int n, per, first;  // tokens of the group; of a thread in a tile; this thread's first one
  uint32_t keys[PER];

  __device__ __forceinline__ Tokens(const float* given, int count) : logits(given), n(count) {
    const int thread = static_cast<int>(threadIdx.x);
    per = min(PER, ceil_div(n, THREADS));
    first = thread / 32 * (32 * per) + thread % 32;
#pragma unroll
    for (int j = 0; j < PER; ++j) keys[j] = inside(0, j) ? __float_as_uint(__ldg(logits + first + 32 * j)) : 0u;
  }
  // The constructor asks for the logits; what can be done until they are there comes before this.
  __device__ __forceinline__ void arrive() {
#pragma unroll
    for (int j = 0; j < PER; ++j) keys[j] = inside(0, j) ? key_of(__uint_as_float(keys[j])) : kNoKey;
  }
  __device__ __forceinline__ int tile() const { return THREADS * max(per, 1); }
  __device__ __forceinline__ bool inside(int start, int j) const { return j < per && start + first + 32 * j < n; }
  __device__ __forceinline__ void read(int start, uint32_t (&found)[PER]) const {
    float scores[PER];
#pragma unroll
    for (int j = 0; j < PER; ++j) scores[j] = inside(start, j) ? __ldg(logits + start + first + 32 * j) : 0.0f;
#pragma unroll
    for (int j = 0; j < PER; ++j) found[j] = inside(start, j) ? key_of(scores[j]) : kNoKey;
  }
  // Calls f with every key of this thread, and with kNoKey.
  template <class F>
  __device__ __forceinline__ void each(F f) const {
#pragma unroll
    for (int j = 0; j < PER; ++j) f(keys[j]);
#pragma unroll 1
    for (int start = tile(); start < n; start += tile()) {
      uint32_t more[PER];
      read(start, more);
#pragma unroll
      for (int j = 0; j < PER; ++j) f(more[j]);
    }
  }
};

// Where the best k end, 0 < k < n.
template <int THREADS, int PER>
__device__ __forceinline__ Cut find_cut(const Tokens<THREADS, PER>& tokens, int k, GroupShared<THREADS>& shared) {
  constexpr int kOwn = kDigits / THREADS;  // digits of a thread, from the highest down
  const int thread = static_cast<int>(threadIdx.x);
  uint32_t prefix = 0, known = 0;  // the digits of the cut that are known, and which bits these are
#pragma unroll 1
  for (int shift = 32 - kRadixBits;; shift = max(shift - kRadixBits, 0)) {
    const uint32_t digits = ~known >> shift;  // 11, 11 and 10 bits
#pragma unroll
    for (int i = 0; i < kOwn; ++i) shared.histogram[i * THREADS + thread] = 0;
    __syncthreads();
    tokens.each([&](uint32_t key) {
      if ((key & known) == prefix && key != kNoKey) atomicAdd(&shared.histogram[(key >> shift) & digits], 1);
    });
    __syncthreads();
    int own[kOwn], sum = 0, total;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) sum += own[i] = shared.histogram[kDigits - 1 - (thread * kOwn + i)];
    int above = block_exclusive_scan<THREADS>(sum, total, shared.scan);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (above < k && k <= above + own[i]) shared.found = Digit{kDigits - 1 - (thread * kOwn + i), above, own[i]};
      above += own[i];
    }
    __syncthreads();
    const Digit found = shared.found;
    prefix |= static_cast<uint32_t>(found.digit) << shift;
    known |= digits << shift;
    k -= found.above;
    if (k == found.count) return Cut{prefix - 1, 0};
    if (shift == 0) return Cut{prefix, k};
  }
}

// Sets the bits of the rows that stay. Whole warps call it; tokens that are neighbours mostly share a word.
template <class Marks>
__device__ __forceinline__ void mark(Marks& marks, bool stays, int row, int rows) {
  bool live = stays && row >= 0 && row < rows;
  const int word = row >> 5;
  const uint32_t bit = 1u << (row & 31);
  unsigned left = __ballot_sync(kAllLanes, live);
#pragma unroll 1
  for (int round = 0; round < 2 && left != 0; ++round) {
    const int leader = __ffs(static_cast<int>(left)) - 1;
    const int shared_word = __shfl_sync(kAllLanes, word, leader);
    const bool same = live && word == shared_word;
    const uint32_t bits = __reduce_or_sync(kAllLanes, same ? bit : 0u);
    if (static_cast<int>(threadIdx.x) % 32 == leader) atomicOr(marks.at(word), bits);
    live = live && !same;
    left = __ballot_sync(kAllLanes, live);
  }
  if (live) atomicOr(marks.at(word), bit);
}

// Decides a group: its part of `keep`, its count, its marks. marks.prepare() comes while the logits are on their way, marks.ready()
// before the first mark.
template <int THREADS, int PER, class Marks>
__device__ __forceinline__ void select_group(const glimpse_select_tokens_params& p, int group, GroupShared<THREADS>& shared,
                                             Marks& marks) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int all = static_cast<int>(p.tokens), rows = static_cast<int>(p.rows);
  const int begin = min(max(__ldg(p.cu_groups + group), 0), all), end = min(max(__ldg(p.cu_groups + group + 1), begin), all);
  const int cap = __ldg(p.caps + group), floor = __ldg(p.floors + group);
  const int n = end - begin;
  Tokens<THREADS, PER> tokens(p.logits + begin, n);
  const int32_t* const token_rows = p.token_rows + begin;
  const uint8_t* const forced = p.forced != nullptr ? p.forced + begin : nullptr;

  int places[PER];  // of the tokens in the registers
#pragma unroll
  for (int j = 0; j < PER; ++j) places[j] = tokens.inside(0, j) ? __ldg(token_rows + tokens.first + 32 * j) : -1;
  marks.prepare();
  tokens.arrive();

  const uint32_t limit = key_of(p.threshold);
  int above = 0;
  tokens.each([&](uint32_t key) { above += key > limit; });
  above = block_sum<THREADS>(above, shared.scan);
  const int k = max(min(above, max(cap, 0)), min(floor, n));
  Cut cut{limit, 0};
  if (k != above) {  // the same in all threads
    if (k <= 0) {
      cut.key = 0xffffffffu;
    } else if (k >= n) {
      cut.key = kNoKey;
    } else {
      cut = find_cut(tokens, k, shared);
    }
  }

  marks.ready();
  int count = 0, seen = 0;
#pragma unroll 1
  for (int start = 0; start < n; start += tokens.tile()) {
    uint32_t keys[PER];
    if (start == 0) {
#pragma unroll
      for (int j = 0; j < PER; ++j) keys[j] = tokens.keys[j];
    } else {
      tokens.read(start, keys);
#pragma unroll
      for (int j = 0; j < PER; ++j) places[j] = tokens.inside(start, j) ? __ldg(token_rows + start + tokens.first + 32 * j) : -1;
    }
    unsigned anyway = 0;  // bit j: token j is forced
    if (forced != nullptr) {
#pragma unroll
      for (int j = 0; j < PER; ++j)
        if (tokens.inside(start, j)) anyway |= (__ldg(forced + start + tokens.first + 32 * j) != 0 ? 1u : 0u) << j;
    }
    int rank = 0;  // of the next one with the cut's key
    if (cut.ties > 0) {
      int tied = 0, total;
#pragma unroll
      for (int j = 0; j < PER; ++j) tied += __popc(__ballot_sync(kAllLanes, keys[j] == cut.key));
      const int before = block_exclusive_scan<THREADS>(lane == 0 ? tied : 0, total, shared.scan);
      rank = seen + __shfl_sync(kAllLanes, before, 0);
      seen += total;
    }
#pragma unroll
    for (int j = 0; j < PER; ++j) {
      if (j >= tokens.per) break;
      const bool inside = tokens.inside(start, j);
      bool stays = keys[j] > cut.key;
      if (cut.ties > 0) {
        const unsigned tied = __ballot_sync(kAllLanes, keys[j] == cut.key);
        stays = stays || (keys[j] == cut.key && rank + __popc(tied & ((1u << lane) - 1)) < cut.ties);
        rank += __popc(tied);
      }
      stays = inside && (stays || ((anyway >> j) & 1) != 0);
      if (inside) p.keep[begin + start + tokens.first + 32 * j] = stays ? 1 : 0;
      mark(marks, stays, places[j], rows);
      count += stays;
    }
  }
  if (forced != nullptr) count = block_sum<THREADS>(count, shared.scan);
  if (thread == 0) p.counts[group] = forced != nullptr ? count : max(k, 0);
}

// Words of bits that place_rows takes at a time: four of each warp. The thread's own among them, -1 for most.
template <int THREADS>
constexpr int kPlaceTile = THREADS / 8;
__device__ __forceinline__ int word_of_thread() {
  return threadIdx.x % 32 < 4 ? static_cast<int>(threadIdx.x / 32 * 4 + threadIdx.x % 32) : -1;
}

template <int THREADS>
struct PlaceShared {
  typename BlockScan<THREADS>::Storage scan;
  uint32_t words[kPlaceTile<THREADS>];
  int before[kPlaceTile<THREADS>];
};

// Writes what follows from `count` words, the bits of the rows from 32 * first on; `base` rows before these stay. read(i): word i, asked
// by the thread whose word it is. `last`: no rows come behind. `bound`: of the sequence whose number is the thread's.
// A row that goes writes the -1 of its place behind the last that stays, counted from the end.
template <int THREADS, class Word>
__device__ __forceinline__ void place_rows(const glimpse_select_tokens_params& p, Word read, int count, int first, int base, bool last,
                                           int bound, PlaceShared<THREADS>& shared) {
  constexpr int kWords = 4, kTile = kPlaceTile<THREADS>;  // words of a warp and of the block at a time
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, own = thread / 32 * kWords;
  const int rows = static_cast<int>(p.rows), sequences = static_cast<int>(p.sequences), capacity = static_cast<int>(p.capacity);
  int at = 0;
#pragma unroll 1
  do {
    uint32_t word = 0;
    if (word_of_thread() >= 0 && at + word_of_thread() < count) word = read(at + word_of_thread());
    int total;
    const int before = base + block_exclusive_scan<THREADS>(__popc(word), total, shared.scan);
    if (lane < kWords) {
      shared.words[own + lane] = word;
      shared.before[own + lane] = before;
    }
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      const uint32_t bits = __shfl_sync(kAllLanes, word, j);
      const int through = __shfl_sync(kAllLanes, before, j) + __popc(bits & ((1u << lane) - 1));
      const int row = (first + at + own + j) * 32 + lane;
      const bool stays = ((bits >> lane) & 1) != 0;
      const int place = stays ? through : rows - 1 - (row - through);
      if (at + own + j < count && row < rows && place < capacity) p.index[place] = stays ? row : -1;
    }
    __syncthreads();
    const bool end = last && at + kTile >= count;
    const int from = (first + at) * 32, size = min(kTile, max(count - at, 0)) * 32;
    for (int s = thread; s <= sequences; s += THREADS) {
      const int row = min(max(s == thread ? bound : p.cu_seqlens[s], 0), rows) - from;
      if (row >= 0 && row < size) {
        p.cu_out[s] = shared.before[row / 32] + __popc(shared.words[row / 32] & ((1u << (row % 32)) - 1));
      } else if (row >= size && end) {
        p.cu_out[s] = base + total;
      }
    }
    __syncthreads();
    base += total;
    at += kTile;
  } while (at < count);
}

// -1 behind as many entries as there are rows: part `part` of `parts`.
template <int THREADS>
__device__ __forceinline__ void fill_rest(const glimpse_select_tokens_params& p, int part, int parts) {
  const int64_t step = static_cast<int64_t>(parts) * THREADS;
  for (int64_t i = p.rows + static_cast<int64_t>(part) * THREADS + threadIdx.x; i < p.capacity; i += step) p.index[i] = -1;
}

// Sets `count` words to the bits of the rows that stay in any case, from row 32 * first on. A warp asks for BATCH words at a time.
template <int THREADS, int BATCH>
__device__ __forceinline__ void set_bits(const glimpse_select_tokens_params& p, uint32_t* words, int first, int count) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32, rows = static_cast<int>(p.rows);
#pragma unroll 1
  for (int start = warp; start < count; start += THREADS / 32 * BATCH) {
    bool stays[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const int word = start + THREADS / 32 * i, row = (first + word) * 32 + lane;
      stays[i] = word < count && row < rows && __ldg(p.row_keep + row) != 0;
    }
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const int word = start + THREADS / 32 * i;
      const uint32_t bits = __ballot_sync(kAllLanes, stays[i]);
      if (lane == 0 && word < count) words[word] = bits;
    }
  }
}

}  // namespace glimpse::cuda

// SPDX-License-Identifier: Apache-2.0
// What the greedy selectors (farthest_points, greedy_dpp, drop_duplicates) share: a group of the packed matrices, and the best of all
// threads of a team. A team is the block, or the cluster of blocks, that works on one group from its first pick to its last.
#pragma once

#include <float.h>

#include "cuda/kernel.cuh"

namespace glimpse::cuda {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kWarp = 32;
constexpr int kMostCluster = 8;

template <class A>
__host__ __device__ constexpr A smaller(A a, A b) {
  return b < a ? b : a;
}
template <class A>
__host__ __device__ constexpr A larger(A a, A b) {
  return a < b ? b : a;
}

// The longest a group can be, from shapes alone: its matrix is in the entries. `given`: what the caller knows, negative for nothing.
inline int64_t longest_group(int64_t entries, int64_t tokens, int64_t given) {
  int64_t root = 0;
  for (int64_t bit = int64_t{1} << 30; bit > 0; bit >>= 1)
    if ((root + bit) * (root + bit) <= entries) root += bit;
  int64_t found = root < tokens ? root : tokens;
  return given >= 0 && given < found ? given : found;
}

// Blocks of a cluster: `wished`, as far as the chip has clusters and enough multiprocessors for all groups at once. A power of two.
inline unsigned cluster_for(int64_t wished, int64_t groups) {
  unsigned blocks = 1;
  if (chip().capability < 90) return blocks;
  while (blocks < kMostCluster && blocks < wished && groups * blocks * 2 <= chip().multiprocessors) blocks *= 2;
  return blocks;
}

// Four neighbours in one access.
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T x[4];
};

// Greater for greater numbers; -0 is +0. Not for NaN. Never 0.
__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float unordered(uint32_t key) {
  return __uint_as_float((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}

// One comparison for "the higher number, of equals the lower index".
__device__ __forceinline__ uint64_t pack_key(uint32_t value, uint32_t index) {
  return static_cast<uint64_t>(value) << 32 | static_cast<uint32_t>(~index);
}
__device__ __forceinline__ uint32_t key_value(uint64_t key) { return static_cast<uint32_t>(key >> 32); }
__device__ __forceinline__ uint32_t key_index(uint64_t key) { return ~static_cast<uint32_t>(key); }

// The greatest key of the warp, in all lanes; two single-instruction reductions.
__device__ __forceinline__ uint64_t warp_best(uint64_t key) {
  const uint32_t value = __reduce_max_sync(kAll, key_value(key));
  const uint32_t rest = __reduce_max_sync(kAll, key_value(key) == value ? static_cast<uint32_t>(key) : 0u);
  return static_cast<uint64_t>(value) << 32 | rest;
}

// Room for what team_best exchanges: two rounds of one key for each warp of a team.
struct Exchange {
  uint64_t keys[2][kMostCluster * kWarp];
};

// Threads of a team wait for each other; what they wrote before is seen behind it by the team.
template <bool kCluster>
__device__ __forceinline__ void team_sync() {
  if constexpr (kCluster) {
    __syncwarp();  // a warp arrives as one, wherever the compiler left its lanes
    cluster_sync();
  } else {
    __syncthreads();
  }
}

// The greatest key of the team, in every thread, behind one barrier. `round` counts the calls: a warp that is one round ahead writes to
// the other half of the exchange, and two rounds ahead it cannot be.
template <bool kCluster>
__device__ __forceinline__ uint64_t team_best(Exchange& exchange, unsigned round, uint64_t key) {
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  uint64_t* const keys = exchange.keys[round & 1];
  unsigned count = warps;
  key = warp_best(key);
  if constexpr (kCluster) {
    if (lane < cluster_size()) cluster_shared(keys, lane)[cluster_rank() * warps + warp] = key;
    count *= cluster_size();
  } else {
    if (lane == 0) keys[warp] = key;
  }
  team_sync<kCluster>();
  uint64_t best = 0;
  for (unsigned i = lane; i < count; i += kWarp) best = keys[i] > best ? keys[i] : best;
  return warp_best(best);
}

__device__ __forceinline__ int64_t clamped(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// Entries of the matrices of all groups before this one. All lanes of a warp, together.
__device__ __forceinline__ int64_t squares_before(const int32_t* cu_seqlens, int64_t group) {
  int64_t sum = 0;
  for (int64_t g = threadIdx.x % kWarp; g < group; g += kWarp) {
    const int64_t n = static_cast<int64_t>(cu_seqlens[g + 1]) - cu_seqlens[g];
    sum += n * n;
  }
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
  return sum;
}

// Shapes of a launch.
struct Packed {
  const int32_t* cu_seqlens;
  const int32_t* cu_places;  // where the picks, or the list, of each group start
  int64_t entries, groups, tokens, capacity, longest;
};

struct Group {
  int64_t first;   // row of the packed tokens
  int64_t offset;  // of its matrix
  int64_t place;   // of its picks, or its list
  int n, count;    // tokens; picks, or length of the list
};

// Sizes that do not fit the tensors or the launch give a group of no tokens: nothing outside is touched. All lanes of a warp, together.
__device__ __forceinline__ Group group_of(const Packed& packed, int64_t group) {
  Group found{0, 0, 0, 0, 0};
  if (group >= packed.groups) return found;
  found.first = packed.cu_seqlens[group];
  const int64_t end = packed.cu_seqlens[group + 1], n = end - found.first;
  found.place = clamped(packed.cu_places[group], 0, packed.capacity);
  found.count = static_cast<int>(clamped(packed.cu_places[group + 1], found.place, packed.capacity) - found.place);
  found.offset = squares_before(packed.cu_seqlens, group);
  const bool fits = found.first >= 0 && n >= 0 && end <= packed.tokens && n <= packed.longest && found.offset + n * n <= packed.entries;
  found.n = fits ? static_cast<int>(n) : 0;
  return found;
}

// Writes down the picks of a group: one warp of the team, a pick a lane, and to memory 32 at a time. A barrier of a cluster waits for what its threads
// have written to global memory, so to write every pick would make every step longer.
struct Notebook {
  int pick = 0;

  __device__ __forceinline__ void note(const Group& group, int i, int found, int32_t* picks, uint8_t* keep) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    if (lane == i % kWarp) pick = found;
    if (i % kWarp == kWarp - 1) write(group, i + 1, picks, keep);
  }
  // What is noted of `count` picks and not yet written.
  __device__ __forceinline__ void write(const Group& group, int count, int32_t* picks, uint8_t* keep) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, start = (count - 1) / kWarp * kWarp;
    const bool live = start + lane < count;
    const unsigned same = __match_any_sync(kAll, live ? pick : -1);  // a token may be picked again: one lane marks it
    if (!live) return;
    picks[group.place + start + lane] = static_cast<int32_t>(group.first + pick);
    if (__ffs(static_cast<int>(same)) == lane + 1) keep[group.first + pick] = 1;
  }
};

// The block fills the part of `what` that belongs to this group, and with the first and the last one what belongs to none.
template <class T>
__device__ __forceinline__ void fill_group(T* what, T value, const int32_t* cu, int64_t groups, int64_t group, int64_t total) {
  const int64_t begin = group == 0 ? 0 : clamped(cu[group], 0, total);
  const int64_t end = group + 1 >= groups ? total : clamped(cu[group + 1], 0, total);
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) what[i] = value;
}

}  // namespace glimpse::cuda

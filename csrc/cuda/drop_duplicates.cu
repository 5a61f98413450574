// SPDX-License-Identifier: Apache-2.0
// Rounds of bipartite matching in one launch: a team (a block, or a cluster) takes a group's list from beginning to end.
//
// A round has two parts. Rows of A are dealt out to the warps of the team; a warp reads its row of the matrix as it lies, 16 bytes a lane, and takes
// the highest among the columns that a bit mask of B lets through. What it found goes, as a key, to every block of the team: one barrier. Then every
// block sorts the same keys and writes the same new list for itself: lists and masks are never exchanged.
#include "glimpse/drop_duplicates.h"

#include "cuda/greedy_core.cuh"

namespace glimpse::cuda {
namespace {

constexpr int kMostThreads = 512;
constexpr int kFlight = 4;  // loads that a lane has under way

// What a block has, in shared memory or in the workspace.
struct Layout {
  int64_t most;         // tokens of a list
  int64_t keys;         // of a half: a power of two, at least (most + 1) / 2
  int64_t words;        // of the mask
  __host__ __device__ size_t bytes() const { return static_cast<size_t>(2 * keys * 8 + (2 * most + words + 3) / 4 * 4 * 4); }
};

enum class Team { cluster, block, block_on_workspace };  // the first two have all in shared memory

template <class T>
struct alignas(16) Run {
  T x[16 / sizeof(T)];
};

// The highest of a row's entries whose columns are in the mask; NaN does not count, and -infinity is what is left of nothing. A warp, together.
template <class T, bool kWide>
__device__ __forceinline__ uint32_t highest(const T* row, const uint32_t* mask, int n) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  float best = -INFINITY;
  if constexpr (kWide) {
    constexpr int kRun = static_cast<int>(16 / sizeof(T));
    const int runs = n / kRun;
    for (int run = lane; run < runs; run += kFlight * kWarp) {
      Run<T> x[kFlight];
      uint32_t bits[kFlight];
#pragma unroll
      for (int f = 0; f < kFlight; ++f) {
        const int column = (run + f * kWarp) * kRun;
        bits[f] = run + f * kWarp < runs ? mask[column / 32] >> (column % 32) & ((1u << kRun) - 1) : 0;
      }
#pragma unroll
      for (int f = 0; f < kFlight; ++f)
        if (bits[f] != 0) x[f] = *reinterpret_cast<const Run<T>*>(row + (run + f * kWarp) * kRun);
#pragma unroll
      for (int f = 0; f < kFlight; ++f)
        if (bits[f] != 0)
#pragma unroll
          for (int i = 0; i < kRun; ++i) best = fmaxf(best, (bits[f] >> i & 1) != 0 ? to_float(x[f].x[i]) : -INFINITY);
    }
  } else {
    for (int column = lane; column < n; column += kFlight * kWarp) {
      T x[kFlight];
      bool live[kFlight];
#pragma unroll
      for (int f = 0; f < kFlight; ++f) {
        const int at = column + f * kWarp;
        live[f] = at < n && (mask[at / 32] >> (at % 32) & 1) != 0;
        if (live[f]) x[f] = row[at];
      }
#pragma unroll
      for (int f = 0; f < kFlight; ++f)
        if (live[f]) best = fmaxf(best, to_float(x[f]));
    }
  }
  return __reduce_max_sync(kAll, ordered(best));
}

// Sorts `size` keys, a power of two, greatest first. The block, together, with a barrier at the end. A warp's threads have pairs inside the same 64
// keys as long as partners are at most 32 apart: then they wait for each other alone.
__device__ __forceinline__ void sort_down(uint64_t* keys, int size) {
  const int threads = static_cast<int>(blockDim.x);
  for (int run = 2; run <= size; run *= 2) {
    for (int apart = run / 2; apart > 0; apart /= 2) {
      for (int pair = static_cast<int>(threadIdx.x); pair < size / 2; pair += threads) {
        const int low = 2 * pair - (pair & (apart - 1)), high = low + apart;
        const uint64_t a = keys[low], b = keys[high];
        if (((low & run) == 0) ? a < b : b < a) {
          keys[low] = b;
          keys[high] = a;
        }
      }
      const bool next_is_near = apart > 1 ? apart / 2 <= kWarp : run <= kWarp;
      if (apart <= kWarp && next_is_near && !(apart == 1 && run == size))
        __syncwarp();
      else
        __syncthreads();
    }
  }
  if (size < 2) __syncthreads();
}

template <class T, Team kTeam>
__global__ void __launch_bounds__(kMostThreads, 1)
    drop_duplicates_kernel(const T* __restrict__ similarity, const int32_t* __restrict__ order, const int32_t* targets, int32_t* survivors,
                           uint8_t* keep, unsigned char* workspace, const Packed packed, const Layout layout, int64_t per_round) {
  constexpr bool kCluster = kTeam == Team::cluster;
  const unsigned blocks = kCluster ? cluster_size() : 1, rank = kCluster ? cluster_rank() : 0;
  const int64_t index = blockIdx.x / blocks;
  const Group group = group_of(packed, index);
  const int n = group.n, thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int warp = static_cast<int>(rank) * (threads / kWarp) + thread / kWarp, warps = static_cast<int>(blocks) * (threads / kWarp);
  unsigned char* memory;
  if constexpr (kTeam == Team::block_on_workspace)
    memory = workspace + static_cast<int64_t>(blockIdx.x) * layout.bytes();
  else
    memory = dynamic_shared();
  uint64_t* const halves = reinterpret_cast<uint64_t*>(memory);
  int32_t* list = reinterpret_cast<int32_t*>(halves + 2 * layout.keys);
  int32_t* spare = list + layout.most;
  uint32_t* const mask = reinterpret_cast<uint32_t*>(spare + layout.most);
  const T* const matrix = similarity + group.offset;
  constexpr int kRun = static_cast<int>(16 / sizeof(T));
  const bool wide = n % kRun == 0 && reinterpret_cast<uintptr_t>(matrix) % 16 == 0;

  if (rank == 0) {
    fill_group(keep, uint8_t{0}, packed.cu_seqlens, packed.groups, index, packed.tokens);
    fill_group(survivors, int32_t{-1}, packed.cu_places, packed.groups, index, packed.capacity);
  }
  // The list holds rows of the group; what is in it of other rows stays as it is, and is never used as an index.
  int length = static_cast<int>(smaller<int64_t>(smaller(group.count, n), layout.most));
  const auto inside = [n](int32_t row) { return static_cast<uint32_t>(row) < static_cast<uint32_t>(n); };
  const uint32_t first = static_cast<uint32_t>(group.first);
  const auto put = [&](int32_t* to, int i, int32_t row) {
    to[i] = row;
    if (i % 2 == 1 && inside(row)) atomicOr(&mask[row / 32], 1u << (row % 32));
  };
  const int words = (n + 31) / 32;
  for (int i = thread; i < words; i += threads) mask[i] = 0;
  __syncthreads();
  for (int i = thread; i < length; i += threads)
    put(list, i, static_cast<int32_t>(static_cast<uint32_t>(order[group.place + i]) - first));
  const int64_t target = length == 0 ? 0 : larger(targets[index], 0);
  if constexpr (kCluster) team_sync<true>();  // all blocks are there before one writes to another

  for (unsigned round = 0;; ++round) {
    const int even = (length + 1) / 2;
    const int drop = static_cast<int>(smaller(per_round, smaller<int64_t>(length - target, even)));
    if (drop <= 0) break;
    uint64_t* const keys = halves + (round & 1) * layout.keys;
    __syncthreads();  // the list and its mask are complete
    for (int a = warp; a < even; a += warps) {
      const int32_t row = list[2 * a];
      const T* const from = matrix + static_cast<int64_t>(inside(row) ? row : 0) * n;
      // A row of no columns has -infinity.
      const int columns = inside(row) ? n : 0;
      const uint64_t key = pack_key(wide ? highest<T, true>(from, mask, columns) : highest<T, false>(from, mask, columns), static_cast<uint32_t>(a));
      const unsigned lane = threadIdx.x % kWarp;
      if constexpr (kCluster) {
        if (lane < blocks) cluster_shared(keys, lane)[a] = key;
      } else {
        if (lane == 0) keys[a] = key;
      }
    }
    int size = 1;
    while (size < even) size *= 2;
    for (int i = even + thread; i < size; i += threads) keys[i] = 0;  // behind all others
    team_sync<kCluster>();
    for (int i = thread; i < words; i += threads) mask[i] = 0;
    sort_down(keys, size);
    for (int i = drop + thread; i < even; i += threads) put(spare, i - drop, list[2 * static_cast<int>(key_index(keys[i]))]);
    for (int i = thread; i < length - even; i += threads) put(spare, even - drop + i, list[2 * i + 1]);
    int32_t* const old = list;
    list = spare;
    spare = old;
    length -= drop;
  }
  if (rank != 0) return;
  __syncthreads();
  for (int i = thread; i < length; i += threads) {
    survivors[group.place + i] = static_cast<int32_t>(static_cast<uint32_t>(list[i]) + first);
    if (inside(list[i])) keep[group.first + list[i]] = 1;
  }
}

// How a launch is cut: from shapes alone.
struct Cut {
  int64_t longest;
  Layout layout;
  unsigned blocks, threads;
  bool shared;
};

Cut cut(const glimpse_drop_duplicates_params& p) {
  Cut found;
  found.longest = longest_group(p.entries, p.tokens, p.longest);
  found.layout.most = smaller(found.longest, p.listed);
  found.layout.keys = 2;
  while (2 * found.layout.keys < found.layout.most + 1) found.layout.keys *= 2;
  found.layout.words = ceil_div<int64_t>(found.longest, 32);
  found.shared = found.layout.bytes() <= most_shared(0);
  // A warp for every row of A if there are so many.
  const int64_t wanted = larger<int64_t>(1, ceil_div<int64_t>(found.layout.most, 2)) * kWarp;
  found.blocks = found.shared ? cluster_for(ceil_div<int64_t>(wanted, kMostThreads), p.groups) : 1;
  found.threads = static_cast<unsigned>(smaller<int64_t>(kMostThreads, larger<int64_t>(4 * kWarp, ceil_div<int64_t>(wanted, found.blocks * kWarp) * kWarp)));
  return found;
}

size_t workspace_bytes(const glimpse_drop_duplicates_params& p, const Cut& found) {
  return found.shared ? 0 : static_cast<size_t>(larger<int64_t>(1, p.groups)) * found.layout.bytes();
}

template <class T>
glimpse_status run(const glimpse_drop_duplicates_params& p, const glimpse_cuda_call& call) {
  const Cut found = cut(p);
  if (call.workspace_bytes < workspace_bytes(p, found))
    return fail(GLIMPSE_INVALID, "drop_duplicates: workspace: expected %zu bytes, found %zu", workspace_bytes(p, found), call.workspace_bytes);
  const Packed packed{p.cu_seqlens, p.cu_order, p.entries, p.groups, p.tokens, p.listed, found.longest};
  Launch how;
  how.grid.x = static_cast<unsigned>(larger<int64_t>(1, p.groups)) * found.blocks;
  how.block.x = found.threads;
  how.cluster = found.blocks;
  how.shared = found.shared ? found.layout.bytes() : 0;
  how.stream = call.stream;
  const auto kernel = !found.shared      ? drop_duplicates_kernel<T, Team::block_on_workspace>
                      : found.blocks > 1 ? drop_duplicates_kernel<T, Team::cluster>
                                         : drop_duplicates_kernel<T, Team::block>;
  return launch("drop_duplicates", how, kernel, static_cast<const T*>(p.similarity), p.order, p.targets, p.survivors, p.keep,
                static_cast<unsigned char*>(call.workspace), packed, found.layout, p.per_round);
}

}  // namespace
}  // namespace glimpse::cuda

extern "C" size_t glimpse_cuda_drop_duplicates_workspace(const glimpse_drop_duplicates_params* p) {
  return glimpse::cuda::workspace_bytes(*p, glimpse::cuda::cut(*p));
}

extern "C" glimpse_status glimpse_cuda_drop_duplicates(const glimpse_drop_duplicates_params* p, const glimpse_cuda_call* call) {
  using namespace glimpse::cuda;
  return by_dtype("drop_duplicates", p->dtype, [&](auto zero) { return run<decltype(zero)>(*p, *call); });
}

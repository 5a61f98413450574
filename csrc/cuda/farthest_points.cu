// SPDX-License-Identifier: Apache-2.0
// Max-min selection in two launches.
//
// The first pick needs the whole matrix once (the second-smallest distance of every column), so all multiprocessors read it: a block
// has 32 columns, its warps share the rows. Every later pick needs one row of the matrix, the running minimum and an argmax: a chain of latencies,
// for which a group has one team from beginning to end. A step of the chain is the row (a trip to the second-level cache), a comparison a column, two warp
// reductions, one barrier. The second launch comes early and sets up while the first one still runs.
#include "glimpse/farthest_points.h"

#include "cuda/greedy_core.cuh"

namespace glimpse::cuda {
namespace {

constexpr int kRows = 16;   // warps of a block that share the rows of 32 columns
constexpr int kFlight = 8;  // loads that such a warp has under way
constexpr int kBatch = 4;   // fours of columns that a thread of the second launch has under way
constexpr int kMostThreads = 512;

// 1 - s as torch rounds it; what is no number is the least distance.
template <class T>
__device__ __forceinline__ float distance(T s) {
  return fmaxf(to_float(from_float<T>(1.0f - to_float(s))), -FLT_MAX);
}

struct Two {
  float least, second;
};
struct Twos {
  Two found[kRows][kWarp];
};
__device__ __forceinline__ void add(Two& two, float x) {
  two.second = fminf(two.second, fmaxf(two.least, x));
  two.least = fminf(two.least, x);
}

// nearest [tokens]: the second-smallest distance of each column, the only one of a group of one token.
template <class T>
__global__ void __launch_bounds__(kRows* kWarp) farthest_points_nearest_kernel(const T* similarity, float* nearest, const Packed packed) {
  let_next_grid_start();  // which sets up, and waits for the end of this one before it reads
  SHARED(Twos, all);
  auto& found = all.found;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarp, column = first + lane;

  // The group of the block's first column, by bisection; a lane goes on from there to its own.
  int64_t low = 0, high = packed.groups;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (packed.cu_seqlens[middle + 1] <= first)
      low = middle + 1;
    else
      high = middle;
  }
  if (low == packed.groups) return;
  int64_t offset = squares_before(packed.cu_seqlens, low), begin = 0, n = 0;
  for (int64_t g = low; g < packed.groups; ++g) {
    begin = packed.cu_seqlens[g];
    n = packed.cu_seqlens[g + 1] - begin;
    if (column < begin + n) break;
    offset += n * n;
    n = 0;
  }
  if (column < begin || column >= packed.tokens || n > packed.longest || offset + n * n > packed.entries) n = 0;

  const T* const top = similarity + offset + (column - begin);
  Two two{INFINITY, INFINITY};
  int64_t row = warp;
  for (; row + (kFlight - 1) * kRows < n; row += kFlight * kRows) {
    T x[kFlight];
#pragma unroll
    for (int i = 0; i < kFlight; ++i) x[i] = top[(row + i * kRows) * n];
#pragma unroll
    for (int i = 0; i < kFlight; ++i) add(two, distance(x[i]));
  }
  for (; row < n; row += kRows) add(two, distance(top[row * n]));
  found[warp][lane] = two;
  __syncthreads();
  if (warp != 0 || n == 0) return;
#pragma unroll
  for (int other = 1; other < kRows; ++other) {
    add(two, found[other][lane].least);
    add(two, found[other][lane].second);
  }
  nearest[column] = n == 1 ? two.least : two.second;
}

template <class T, bool kWide>
__device__ __forceinline__ void load_four(T (&to)[4], const T* row, int column, int n) {
  if constexpr (kWide) {
    const Four<T> four = *reinterpret_cast<const Four<T>*>(row + column);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = four.x[i];
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = row[column + i < n ? column + i : n - 1];
  }
}

struct Share {        // of one thread: fours of columns
  int column, step;   // the first one; from one to the next
  int stride;         // between fours of `state`
  float* state;       // the running minimum, the thread's own part
};

// Brings the running minimum up to date with the row of `pick`, and finds the thread's best column.
template <class T, bool kWide>
__device__ __forceinline__ uint64_t visit(const T* row, const Share& share, int n, int pick, bool start, bool repeat) {
  float best = -INFINITY;
  int where = -1;
  float* state = share.state;
  for (int column = share.column; column < n; column += kBatch * share.step) {
    T x[kBatch][4];
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
      if (column + b * share.step < n) load_four<T, kWide>(x[b], row, column + b * share.step, n);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int from = column + b * share.step;
      if (from >= n) break;
      Four<float> least = *reinterpret_cast<const Four<float>*>(state);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float d = distance(x[b][i]);
        if (!repeat && from + i == pick) d = -INFINITY;
        least.x[i] = start ? d : fminf(least.x[i], d);
        if (from + i < n && least.x[i] > best) best = least.x[i], where = from + i;  // columns ascend: the first of equals stays
      }
      *reinterpret_cast<Four<float>*>(state) = least;
      state += share.stride;
    }
  }
  return where < 0 ? 0 : pack_key(ordered(best), static_cast<uint32_t>(where));
}

// states: NULL if a block's part of the running minimum has room in its shared memory, else `part` numbers for each block.
template <class T, bool kCluster>
__global__ void __launch_bounds__(kMostThreads, 1)
    farthest_points_kernel(const T* __restrict__ similarity, const float* nearest, float* states, int64_t part, int32_t* picks,
                           uint8_t* keep, const Packed packed, bool repeat) {
  SHARED(Exchange, exchange);
  const unsigned blocks = kCluster ? cluster_size() : 1, rank = kCluster ? cluster_rank() : 0;
  const int64_t index = blockIdx.x / blocks;
  const Group group = group_of(packed, index);
  const int n = group.n;
  const int count = n == 0 ? 0 : repeat ? group.count : smaller(group.count, n);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  Share share;
  share.column = 4 * (static_cast<int>(rank) * threads + thread);
  share.step = 4 * static_cast<int>(blocks) * threads;
  share.stride = 4 * threads;
  share.state = (states != nullptr ? states + static_cast<int64_t>(blockIdx.x) * part : reinterpret_cast<float*>(dynamic_shared())) + 4 * thread;
  const T* const matrix = similarity + group.offset;
  const bool wide = n % 4 == 0 && reinterpret_cast<uintptr_t>(matrix) % sizeof(Four<T>) == 0;
  if (rank == 0) {
    fill_group(keep, uint8_t{0}, packed.cu_seqlens, packed.groups, index, packed.tokens);
    fill_group(picks, int32_t{-1}, packed.cu_places, packed.groups, index, packed.capacity);
  }
  if constexpr (kCluster) team_sync<true>();  // all blocks are there before one writes to another
  wait_for_previous_grid();
  if (count == 0) return;

  uint64_t best = 0;
  for (int column = share.column; column < n; column += share.step)
    for (int i = 0; i < 4 && column + i < n; ++i) {
      const uint64_t key = pack_key(ordered(nearest[group.first + column + i]), static_cast<uint32_t>(column + i));
      best = key > best ? key : best;
    }
  const bool writes = rank == 0 && thread < kWarp;
  Notebook notebook;
  for (int i = 0; i < count; ++i) {
    // Its barrier also lies between the filling above and the first pick.
    const int pick = static_cast<int>(key_index(team_best<kCluster>(exchange, static_cast<unsigned>(i), best)));
    if (writes) notebook.note(group, i, pick, picks, keep);
    if (i + 1 == count) break;
    const T* const row = matrix + static_cast<int64_t>(pick) * n;
    best = wide ? visit<T, true>(row, share, n, pick, i == 0, repeat) : visit<T, false>(row, share, n, pick, i == 0, repeat);
  }
  if (writes && count % kWarp != 0) notebook.write(group, count, picks, keep);
}

// How a launch is cut: from shapes alone.
struct Cut {
  int64_t longest;
  unsigned blocks, threads;  // of a team, of a block
  int64_t part;              // numbers of the running minimum in a block
  bool shared;               // whether they have room in shared memory
};

Cut cut(const glimpse_farthest_points_params& p) {
  Cut found;
  found.longest = longest_group(p.entries, p.tokens, p.longest);
  // A barrier of a cluster costs about what 2048 columns do.
  found.blocks = cluster_for(ceil_div<int64_t>(found.longest, 2048), p.groups);
  const int64_t fours = ceil_div<int64_t>(ceil_div<int64_t>(found.longest, 4), found.blocks);
  found.threads = static_cast<unsigned>(smaller<int64_t>(kMostThreads, larger<int64_t>(2 * kWarp, ceil_div<int64_t>(fours, kWarp) * kWarp)));
  found.part = ceil_div<int64_t>(fours, found.threads) * found.threads * 4;
  found.shared = static_cast<size_t>(found.part) * sizeof(float) <= most_shared(sizeof(Exchange));
  return found;
}

size_t nearest_bytes(const glimpse_farthest_points_params& p) { return static_cast<size_t>(ceil_div<int64_t>(p.tokens, 4)) * 16; }

template <class T>
glimpse_status run(const glimpse_farthest_points_params& p, const glimpse_cuda_call& call) {
  const Cut how_cut = cut(p);
  const Packed packed{p.cu_seqlens, p.cu_picks, p.entries, p.groups, p.tokens, p.capacity, how_cut.longest};
  const T* const similarity = static_cast<const T*>(p.similarity);
  float* const nearest = static_cast<float*>(call.workspace);
  Launch how;
  how.stream = call.stream;
  if (p.tokens > 0) {
    how.grid.x = static_cast<unsigned>(ceil_div<int64_t>(p.tokens, kWarp));
    how.block.x = kRows * kWarp;
    const glimpse_status status = launch("farthest_points", how, farthest_points_nearest_kernel<T>, similarity, nearest, packed);
    if (status != GLIMPSE_OK) return status;
  }
  how.grid.x = static_cast<unsigned>(larger<int64_t>(1, p.groups)) * how_cut.blocks;
  how.block.x = how_cut.threads;
  how.cluster = how_cut.blocks;
  how.shared = how_cut.shared ? static_cast<size_t>(how_cut.part) * sizeof(float) : 0;
  how.dependent = p.tokens > 0;
  float* const states = how_cut.shared ? nullptr : nearest + nearest_bytes(p) / sizeof(float);
  const auto kernel = how_cut.blocks > 1 ? farthest_points_kernel<T, true> : farthest_points_kernel<T, false>;
  return launch("farthest_points", how, kernel, similarity, nearest, states, how_cut.part, p.picks, p.keep, packed, p.repeat != 0);
}

}  // namespace
}  // namespace glimpse::cuda

extern "C" size_t glimpse_cuda_farthest_points_workspace(const glimpse_farthest_points_params* p) {
  using namespace glimpse::cuda;
  const Cut found = cut(*p);
  const int64_t blocks = larger<int64_t>(1, p->groups) * found.blocks;
  return nearest_bytes(*p) + (found.shared ? 0 : static_cast<size_t>(blocks * found.part) * sizeof(float));
}

extern "C" glimpse_status glimpse_cuda_farthest_points(const glimpse_farthest_points_params* p, const glimpse_cuda_call* call) {
  using namespace glimpse::cuda;
  if (call->workspace_bytes < glimpse_cuda_farthest_points_workspace(p))
    return glimpse::fail(GLIMPSE_INVALID, "farthest_points: workspace: expected %zu bytes, found %zu",
                         glimpse_cuda_farthest_points_workspace(p), call->workspace_bytes);
  return by_dtype("farthest_points", p->dtype, [&](auto zero) { return run<decltype(zero)>(*p, *call); });
}

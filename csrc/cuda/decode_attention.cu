// SPDX-License-Identifier: Apache-2.0
// Flash-Decoding (Dao et al. 2023) for few rows, where a step is waiting: for a length, then the block table, then keys and values.
//
// A row's keys are cut into runs, a block each; its warps take tiles of sixteen keys in turn, each warp through a pipeline of its own of
// asynchronous 16-byte copies into shared memory, so that no barrier stands between the first key and the last: registers could not hold
// the 16 to 24 KiB a warp that keep the memory busy. Keys and values are read once for up to eight query heads.
//
// Runs of a row are joined in ascending order: up to eight of them by their own blocks, which then are a cluster (capability 9.0), through
// each other's shared memory, in the one launch; more of them, or without clusters, by a second kernel that is already waiting when
// the first ends. How many runs there are follows from the capacity, the heads and the chip, and from neither lengths nor the batch: a
// row alone has, bit for bit, the values of the row in a batch, and what was recorded with short rows serves long ones. Every row is cut
// into equal runs by its length, short rows into fewer.
#include "glimpse/decode_attention.h"

#include "cuda/decode_core.cuh"

namespace glimpse::cuda {
namespace {

using namespace decode;

constexpr int kMinRun = 128;          // keys of a run of a row that fills its capacity, at least, if the runs are of one cluster
constexpr int64_t kClusterKeys = 2048;  // capacity up to which one cluster reads a row as fast as the whole chip could, and a join
constexpr int kMostCluster = 8;
constexpr int kMostRuns = 128;
constexpr int kJoinWarps = 8;
constexpr float kLog2E = 1.4426950408889634f;

struct Pool {
  const void* data;
  int64_t block_stride, slot_stride, head_stride;
  int dim;
  bool wide;  // rows begin at multiples of 16 bytes and have a multiple of 16 bytes
};

struct Problem {
  const void* q;
  Pool k, v;
  void* out;
  float* parts;  // of each line of each run: `heads` rows of 4 * quads sums, kHeads tops, kHeads totals
  const int32_t* table;
  const int32_t* lengths;
  int64_t q_stride, q_head_stride, table_stride, out_stride, out_head_stride;
  int64_t blocks;
  int block_size, capacity;
  int group, chunks, heads;  // query heads of a kv head; in so many chunks; of so many heads, the last may have fewer
  int lines;                 // kv heads times chunks
  int runs, quads;
  float scale;  // of the logits in base 2
};

template <class T, int DIM>
struct Shape {
  static constexpr int kStage = 2 * Tile<T, DIM>::kBytes;
  static constexpr int kWarps = kStage > 16384 ? 2 : 4;  // of a block; less where the chip has no room for so many
  static constexpr int kThreads = 32 * kWarps;
  // 64 to 96 KiB a block: two of them on a multiprocessor of capability 9.0. Rows of 512 bytes and more take 128 KiB.
  static constexpr int kStages = kStage <= 4096 ? 4 : kStage <= 8192 ? 3 : 2;
  static constexpr size_t kQueryBytes = kHeads * kQueryRow<DIM> * sizeof(T);
  static constexpr size_t shared(int warps) { return kQueryBytes + static_cast<size_t>(warps) * kStages * kStage; }
  static_assert(kStage >= kHeads * kSumRow<DIM> * 4, "a stage holds a warp's sums");
};

// What else the warps of a block have in shared memory.
template <class T, int DIM>
struct Notes {
  static constexpr int kWarps = Shape<T, DIM>::kWarps;
  typename Core<T, DIM>::Scratch scratch[kWarps];
  float tops[kWarps][kHeads], totals[kWarps][kHeads];
  float run_top[kHeads], run_total[kHeads];  // of the whole run
  unsigned live[kWarps][Shape<T, DIM>::kStages];
};

// A row of this length: runs of `size` keys, a multiple of `unit`, and `used` of them.
struct Cut {
  unsigned size, used;
};
__device__ __forceinline__ Cut cut(unsigned length, unsigned runs, unsigned unit) {
  const unsigned size = ceil_div(ceil_div(length, unit), runs) * unit;
  return {size, length == 0 ? 0 : ceil_div(length, size)};
}
__device__ __forceinline__ unsigned length_of(const Problem& p, int64_t row) {
  return static_cast<unsigned>(min(max(p.lengths[row], 0), p.capacity));
}

struct Line {
  int64_t row;
  int kv_head, first_head, heads;
};
__device__ __forceinline__ Line line_of(const Problem& p, unsigned line) {
  const int within = static_cast<int>(line % static_cast<unsigned>(p.lines)), chunk = within % p.chunks, kv_head = within / p.chunks;
  return {line / static_cast<unsigned>(p.lines), kv_head, kv_head * p.group + chunk * p.heads, min(p.heads, p.group - chunk * p.heads)};
}

template <class T, int AT_ONCE>
__device__ __forceinline__ void write(const Problem& p, const Line& line, int head, int quad, const Joined<AT_ONCE>& joined) {
  T* const to = static_cast<T*>(p.out) + line.row * p.out_stride + (line.first_head + head) * p.out_head_stride + 4 * quad;
#pragma unroll
  for (int e = 0; e < 4; ++e)
    if (4 * quad + e < p.v.dim) to[e] = from_float<T>(joined.divided(e));
}

// One warp's way from the pool to its tiles in shared memory.
template <class T, int DIM>
class Loader {
 public:
  using Rows = Tile<T, DIM>;

  __device__ __forceinline__ Loader(const Problem& p, const Line& line, unsigned end)
      : p_(p), table_(p.table + line.row * p.table_stride), end_(end), lane_(threadIdx.x & 31) {
    k_ = static_cast<const T*>(p.k.data) + line.kv_head * p.k.head_stride;
    v_ = static_cast<const T*>(p.v.data) + line.kv_head * p.v.head_stride;
  }

  // The block of this lane's key in the tile from `first` on.
  __device__ __forceinline__ int entry(unsigned first) const {
    const unsigned key = first + lane_;
    return lane_ < kTileKeys && key < end_ ? __ldg(table_ + key / static_cast<unsigned>(p_.block_size)) : -1;
  }

  // Starts the copies of a tile. Returns its live keys: those before the end whose block there is.
  __device__ __forceinline__ unsigned start(unsigned char* stage, unsigned first, int entry) const {
    const bool live = entry >= 0 && entry < p_.blocks;
    const int64_t block = entry, slot = (first + lane_) % static_cast<unsigned>(p_.block_size);
    const int64_t k_at = live ? block * p_.k.block_stride + slot * p_.k.slot_stride : -1;
    const int64_t v_at = live ? block * p_.v.block_stride + slot * p_.v.slot_stride : -1;
    copy(stage, k_, k_at, p_.k);
    copy(stage + Rows::kBytes, v_, v_at, p_.v);
    return __ballot_sync(kWarp, live);
  }

 private:
  __device__ __forceinline__ void copy(unsigned char* tile, const T* from, int64_t mine, const Pool& pool) const {
    constexpr int kSteps = kTileKeys * Rows::kChunks / 32;
    if (pool.wide) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const int index = lane_ + 32 * i, row = index / Rows::kChunks, chunk = index % Rows::kChunks;
        const int64_t at = __shfl_sync(kWarp, mine, row);
        const bool live = at >= 0 && chunk * Rows::kElements < pool.dim;
        copy_async_16(tile + Rows::place(row, chunk), live ? from + at + chunk * Rows::kElements : from, live);
      }
      return;
    }
#pragma unroll 1
    for (int i = 0; i < kSteps; ++i) {
      const int index = lane_ + 32 * i, row = index / Rows::kChunks, chunk = index % Rows::kChunks;
      const int64_t at = __shfl_sync(kWarp, mine, row);
      T* const to = reinterpret_cast<T*>(tile + Rows::place(row, chunk));
#pragma unroll
      for (int e = 0; e < Rows::kElements; ++e) {
        const int d = chunk * Rows::kElements + e;
        to[e] = at >= 0 && d < pool.dim ? from[at + d] : from_float<T>(0.0f);
      }
    }
  }

  const Problem& p_;
  const T* k_;
  const T* v_;
  const int32_t* table_;
  unsigned end_;
  int lane_;
};

template <class T, int DIM>
__global__ void __launch_bounds__(Shape<T, DIM>::kThreads, 1) decode_attention_kernel(const __grid_constant__ Problem p) {
  using S = Shape<T, DIM>;
  using SharedNotes = Notes<T, DIM>;
  constexpr int kStages = S::kStages;
  SHARED(SharedNotes, notes);
  T* const queries = reinterpret_cast<T*>(dynamic_shared());
  unsigned char* const stages = dynamic_shared() + S::kQueryBytes;

  let_next_grid_start();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int threads = static_cast<int>(blockDim.x), warps = threads / 32;
  const auto unit = static_cast<unsigned>(kTileKeys * warps);
  const unsigned run = blockIdx.x % static_cast<unsigned>(p.runs), line_index = blockIdx.x / static_cast<unsigned>(p.runs);
  const Line line = line_of(p, line_index);
  const unsigned length = length_of(p, line.row);
  const Cut row = cut(length, static_cast<unsigned>(p.runs), unit);
  if (run >= max(row.used, 1u)) return;
  if (length == 0) {
    for (int i = thread; i < line.heads * p.quads; i += threads) write<T>(p, line, i / p.quads, i % p.quads, Joined<1>{});
    return;
  }

  const unsigned begin = run * row.size, end = min(begin + row.size, length);
  const unsigned first = begin + static_cast<unsigned>(warp * kTileKeys);
  const int count = first < end ? static_cast<int>(ceil_div(end - first, unit)) : 0;
  unsigned char* const own = stages + warp * (kStages * S::kStage);
  const Loader<T, DIM> loader(p, line, end);
  int entry = loader.entry(first);  // always of the next tile to start
  // Queries travel while the table does.
  const auto query = [&](int index) {
    const int head = index / DIM, d = index % DIM;
    const bool there = head < line.heads && d < p.k.dim;
    return there ? static_cast<const T*>(p.q)[line.row * p.q_stride + (line.first_head + head) * p.q_head_stride + d]
                 : from_float<T>(0.0f);
  };
  constexpr int kMine = kHeads * DIM / S::kThreads;
  T mine[kMine];
#pragma unroll
  for (int i = 0; i < kMine; ++i) mine[i] = query(thread + i * threads);
#pragma unroll 1  // short code arrives sooner
  for (int i = 0; i < kStages - 1; ++i) {
    const unsigned at = first + static_cast<unsigned>(i) * unit;
    const int next = loader.entry(at + unit);
    if (i < count) {
      const unsigned live = loader.start(own + i * S::kStage, at, entry);
      if (lane == 0) notes.live[warp][i] = live;
    }
    copy_async_commit();
    entry = next;
  }
  const auto keep = [&](int index, T x) { queries[index / DIM * kQueryRow<DIM> + index % DIM] = x; };
#pragma unroll
  for (int i = 0; i < kMine; ++i) keep(thread + i * threads, mine[i]);
  for (int index = thread + kMine * threads; index < kHeads * DIM; index += threads) keep(index, query(index));
  __syncthreads();

  Core<T, DIM> core(queries, p.scale, notes.scratch[warp]);
  int stage = 0, free = kStages - 1;
  for (int i = 0; i < count; ++i) {
    copy_async_wait<kStages - 2>();
    __syncwarp();  // tile i is there for all lanes, and they have left the one before
    const unsigned at = first + static_cast<unsigned>(i + kStages - 1) * unit;
    const int next = loader.entry(at + unit);
    if (i + kStages - 1 < count) {
      const unsigned live = loader.start(own + free * S::kStage, at, entry);
      if (lane == 0) notes.live[warp][free] = live;
    }
    copy_async_commit();
    entry = next;
    const unsigned char* const tile = own + stage * S::kStage;
    core.take(tile, tile + Tile<T, DIM>::kBytes, notes.live[warp][stage]);
    stage = stage + 1 == kStages ? 0 : stage + 1;
    free = free + 1 == kStages ? 0 : free + 1;
  }
  copy_async_wait<0>();
  __syncwarp();
  core.finish(notes.tops[warp], notes.totals[warp], reinterpret_cast<float*>(own));
  __syncthreads();

  // The warps' parts are the run's.
  float* const run_sums = reinterpret_cast<float*>(stages + S::kStage);  // behind the sums of the first warp
  const bool clustered = cluster_size() > 1;
  float* const part = p.parts + (static_cast<int64_t>(line_index) * p.runs + run) * (p.heads * p.quads * 4 + 2 * kHeads);
  for (int i = thread; i < line.heads * p.quads; i += threads) {
    const int head = i / p.quads, quad = i % p.quads;
    Joined<S::kWarps> joined;
    joined.add(0, warps, 1, [&](int w) {
      const float* const sums = reinterpret_cast<const float*>(stages + w * (kStages * S::kStage));
      return Part{notes.tops[w][head], notes.totals[w][head],
                  *reinterpret_cast<const float4*>(sums + head * kSumRow<DIM> + 4 * quad)};
    });
    if (row.used == 1) {
      write<T>(p, line, head, quad, joined);
      continue;
    }
    float* const to = clustered ? run_sums + head * DIM + 4 * quad : part + 4 * i;
    *reinterpret_cast<float4*>(to) = make_float4(joined.sums[0], joined.sums[1], joined.sums[2], joined.sums[3]);
    if (quad == 0) {
      (clustered ? notes.run_top : part + p.heads * p.quads * 4)[head] = joined.top;
      (clustered ? notes.run_total : part + p.heads * p.quads * 4 + kHeads)[head] = joined.total;
    }
  }
  if (row.used == 1 || !clustered) return;

  cluster_sync();
  const int used = static_cast<int>(row.used);
  for (int i = static_cast<int>(run) * threads + thread; i < line.heads * p.quads; i += used * threads) {
    const int head = i / p.quads, quad = i % p.quads;
    Joined<kMostCluster> joined;
    joined.add(0, used, 1, [&](int r) {
      const unsigned rank = static_cast<unsigned>(r);
      return Part{*cluster_shared(notes.run_top + head, rank), *cluster_shared(notes.run_total + head, rank),
                  *reinterpret_cast<const float4*>(cluster_shared(run_sums + head * DIM + 4 * quad, rank))};
    });
    write<T>(p, line, head, quad, joined);
  }
  cluster_leave();  // nobody ends while others read its memory
}

// A block for each query head: its warps take runs in turn, and the first of them joins what they have.
template <class T>
__global__ void __launch_bounds__(32 * kJoinWarps) join_kernel(const __grid_constant__ Problem p, const int unit) {
  struct Shared {
    alignas(16) float sums[kJoinWarps][32][4];
    float tops[kJoinWarps], totals[kJoinWarps];
  };
  SHARED(Shared, shared);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const unsigned line_index = blockIdx.x / static_cast<unsigned>(p.heads);
  const int head = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.heads));
  const Line line = line_of(p, line_index);
  // Lengths were there before the first kernel began. What that kernel writes is there behind the wait, which no block may leave out: the
  // launch after this one counts on both.
  const Cut row = cut(length_of(p, line.row), static_cast<unsigned>(p.runs), static_cast<unsigned>(unit));
  wait_for_previous_grid();
  if (head >= line.heads || row.used <= 1) return;
  const int64_t stride = p.heads * p.quads * 4 + 2 * kHeads;
  const float* const parts = p.parts + static_cast<int64_t>(line_index) * p.runs * stride;
  for (int start = 0; start < p.quads; start += 32) {
    const int quad = start + lane, here = min(quad, p.quads - 1);
    Joined<4> joined;
    joined.add(warp, static_cast<int>(row.used), kJoinWarps, [&](int r) {
      const float* const part = parts + r * stride;
      const float* const tops = part + p.heads * p.quads * 4;
      return Part{__ldcg(tops + head), __ldcg(tops + kHeads + head),
                  __ldcg(reinterpret_cast<const float4*>(part + (head * p.quads + here) * 4))};
    });
    *reinterpret_cast<float4*>(shared.sums[warp][lane]) =
        make_float4(joined.sums[0], joined.sums[1], joined.sums[2], joined.sums[3]);
    if (lane == 0) {
      shared.tops[warp] = joined.top;
      shared.totals[warp] = joined.total;
    }
    __syncthreads();
    if (warp == 0 && quad < p.quads) {
      Joined<kJoinWarps> whole;
      whole.add(0, kJoinWarps, 1, [&](int w) {
        return Part{shared.tops[w], shared.totals[w], *reinterpret_cast<const float4*>(shared.sums[w][lane])};
      });
      write<T>(p, line, head, quad, whole);
    }
    __syncthreads();
  }
}

struct Plan {
  int64_t group, chunks, heads, lines, runs, quads, capacity;
  bool cluster;
  size_t workspace;  // bytes
};

Plan plan_of(const glimpse_decode_attention_params& p) {
  Plan plan{};
  plan.group = p.q_heads / p.kv_heads;
  plan.heads = ceil_div(plan.group, ceil_div(plan.group, int64_t{kHeads}));
  plan.chunks = ceil_div(plan.group, plan.heads);
  plan.lines = p.kv_heads * plan.chunks;
  plan.quads = ceil_div(p.v_dim, int64_t{4});
  const int64_t most = INT32_MAX;
  plan.capacity = p.block_size > 0 && p.max_blocks > most / p.block_size ? most : p.max_blocks * p.block_size;
  // Runs that one row needs to keep the whole chip at work, and runs that are worth their join.
  const int64_t wanted = chip().multiprocessors / plan.lines;
  const int64_t worth = plan.capacity > kMinRun ? ceil_div(plan.capacity, int64_t{kMinRun}) : 1;
  plan.cluster = chip().capability >= 90 && (plan.capacity <= kClusterKeys || wanted <= kMostCluster);
  if (plan.cluster) {
    plan.runs = 1;
    while (plan.runs < worth && plan.runs < kMostCluster) plan.runs *= 2;
  } else {
    const int64_t enough = wanted < kMostCluster ? kMostCluster : wanted > kMostRuns ? kMostRuns : wanted;
    plan.runs = worth < enough ? worth : enough;
    if (plan.runs > 1)
      plan.workspace = static_cast<size_t>(p.batch * plan.lines * plan.runs * (plan.heads * plan.quads * 4 + 2 * kHeads)) * sizeof(float);
  }
  return plan;
}

bool nothing_to_do(const glimpse_decode_attention_params& p) {
  return p.batch == 0 || p.q_heads == 0 || p.kv_heads == 0 || p.v_dim == 0;
}

bool is_wide(const void* data, int64_t dim, int64_t size, int64_t block, int64_t slot, int64_t head) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && dim * size % 16 == 0 && block * size % 16 == 0 && slot * size % 16 == 0 &&
         head * size % 16 == 0;
}

template <class T, int DIM>
glimpse_status run(const Problem& problem, const Plan& plan, int64_t batch, const glimpse_cuda_call& call) {
  using S = Shape<T, DIM>;
  int warps = S::kWarps;
  while (warps > 1 && S::shared(warps) > most_shared(sizeof(Notes<T, DIM>))) warps /= 2;
  Launch how;
  how.grid.x = static_cast<unsigned>(batch * plan.lines * plan.runs);
  how.block.x = static_cast<unsigned>(32 * warps);
  how.shared = S::shared(warps);
  how.stream = call.stream;
  how.cluster = plan.cluster ? static_cast<unsigned>(plan.runs) : 1;
  const glimpse_status status = launch("decode_attention", how, decode_attention_kernel<T, DIM>, problem);
  if (status != GLIMPSE_OK || plan.cluster || plan.runs == 1) return status;
  Launch join;
  join.grid.x = static_cast<unsigned>(batch * plan.lines * plan.heads);
  join.block.x = 32 * kJoinWarps;
  join.stream = call.stream;
  join.dependent = true;
  return launch("decode_attention", join, join_kernel<T>, problem, kTileKeys * warps);
}

template <class T>
glimpse_status run(const glimpse_decode_attention_params& p, const glimpse_cuda_call& call) {
  const int64_t widest = p.dim > p.v_dim ? p.dim : p.v_dim;
  if (widest > 256)
    return fail(GLIMPSE_UNSUPPORTED, "decode_attention: q, v_pool: expected head dimensions of at most 256, found %lld and %lld",
                static_cast<long long>(p.dim), static_cast<long long>(p.v_dim));
  if (nothing_to_do(p)) return GLIMPSE_OK;
  const Plan plan = plan_of(p);
  if (call.workspace_bytes < plan.workspace)
    return fail(GLIMPSE_INVALID, "decode_attention: workspace: expected %zu bytes, found %zu", plan.workspace, call.workspace_bytes);
  if (p.batch > INT32_MAX / (plan.lines * (plan.runs > plan.heads ? plan.runs : plan.heads)))
    return fail(GLIMPSE_UNSUPPORTED, "decode_attention: q: expected fewer rows and heads, found %lld rows of %lld",
                static_cast<long long>(p.batch), static_cast<long long>(p.q_heads));
  Problem problem{};
  problem.q = p.q;
  problem.k = {p.k, p.k_block_stride, p.k_slot_stride, p.k_head_stride, static_cast<int>(p.dim),
               is_wide(p.k, p.dim, sizeof(T), p.k_block_stride, p.k_slot_stride, p.k_head_stride)};
  problem.v = {p.v, p.v_block_stride, p.v_slot_stride, p.v_head_stride, static_cast<int>(p.v_dim),
               is_wide(p.v, p.v_dim, sizeof(T), p.v_block_stride, p.v_slot_stride, p.v_head_stride)};
  problem.out = p.out;
  problem.parts = static_cast<float*>(call.workspace);
  problem.table = p.block_table;
  problem.lengths = p.lengths;
  problem.q_stride = p.q_stride;
  problem.q_head_stride = p.q_head_stride;
  problem.table_stride = p.table_stride;
  problem.out_stride = p.out_stride;
  problem.out_head_stride = p.out_head_stride;
  problem.blocks = p.blocks;
  problem.block_size = static_cast<int>(p.block_size < 1 ? 1 : p.block_size < INT32_MAX ? p.block_size : INT32_MAX);
  problem.capacity = static_cast<int>(plan.capacity);
  problem.group = static_cast<int>(plan.group);
  problem.chunks = static_cast<int>(plan.chunks);
  problem.heads = static_cast<int>(plan.heads);
  problem.lines = static_cast<int>(plan.lines);
  problem.runs = static_cast<int>(plan.runs);
  problem.quads = static_cast<int>(plan.quads);
  problem.scale = p.scale * kLog2E;
  return widest <= 64    ? run<T, 64>(problem, plan, p.batch, call)
         : widest <= 128 ? run<T, 128>(problem, plan, p.batch, call)
                         : run<T, 256>(problem, plan, p.batch, call);
}

}  // namespace
}  // namespace glimpse::cuda

extern "C" size_t glimpse_cuda_decode_attention_workspace(const glimpse_decode_attention_params* p) {
  return glimpse::cuda::nothing_to_do(*p) ? 0 : glimpse::cuda::plan_of(*p).workspace;
}

extern "C" glimpse_status glimpse_cuda_decode_attention(const glimpse_decode_attention_params* p, const glimpse_cuda_call* call) {
  using namespace glimpse::cuda;
  return by_dtype("decode_attention", p->dtype, [&](auto zero) { return run<decltype(zero)>(*p, *call); });
}

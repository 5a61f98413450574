// SPDX-License-Identifier: Apache-2.0
// Greedy inference of a determinantal point process in one launch: a team (a block, or a cluster) takes a group from its first pick to
// its last. Columns are dealt out four at a time; a thread has the gains of its columns, and of every pick before their entries of the vector c.
//
// A step: the best gain of the team (one barrier); the c of the pick, which lie with the thread that owns its column, are brought to every
// block (a second barrier); each column takes the product of its own c with these. The last is what grows, with picks times tokens a
// step, so c fill the shared memory of all blocks of the team first, and go to the workspace only beyond that. Their sum is in four parts by the number of the pick,
// joined in one order: it is the same however many blocks there are and wherever c lie.
#include "glimpse/greedy_dpp.h"

#include "cuda/greedy_core.cuh"

namespace glimpse::cuda {
namespace {

constexpr int kMostThreads = 512;
constexpr int kChunk = 512;       // c of a pick brought to a block at once
constexpr int kParts = 4;         // partial sums
constexpr int kFlight = 8;        // rows of c that a thread has under way

struct Layout {
  int fours;         // of columns that a thread may have
  int part;          // columns of a block: 4 * fours * threads
  int shared_rows;   // of c in shared memory, a multiple of kParts
  bool own_state;    // gains and floors are in shared memory, else in the workspace
  int64_t stride;    // between the rows of c in the workspace
};

struct Chosen {  // c of the pick: a chunk of them, and the next
  float factors[2][kChunk];
};

struct Memory {
  float *gain, *floor;  // [part]
  float* near;          // [shared_rows, part], c of the first picks
  float* far;           // [.., stride], all of the group's rows in the workspace, by column of the group
};

__device__ __forceinline__ float entry(float relevance, float similarity, float other) {
  return __fmul_rn(__fmul_rn(relevance, similarity), other);
}

// acc[part] += sum over the rows `from` to `to` of factor * row, row s to the part s % kParts; `from` is a multiple of kParts. Rows are `stride` apart.
__device__ __forceinline__ void accumulate(Four<float> (&acc)[kParts], const float* rows, int64_t stride, const float* factors, int count) {
  int s = 0;
  for (; s + kFlight <= count; s += kFlight) {
    Four<float> c[kFlight];
#pragma unroll
    for (int i = 0; i < kFlight; ++i) c[i] = *reinterpret_cast<const Four<float>*>(rows + (s + i) * stride);
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      const float factor = factors[s + i];
#pragma unroll
      for (int k = 0; k < 4; ++k) acc[i % kParts].x[k] = fmaf(factor, c[i].x[k], acc[i % kParts].x[k]);
    }
  }
#pragma unroll
  for (int i = 0; i < kFlight; ++i) {
    if (s + i >= count) break;
    const Four<float> c = *reinterpret_cast<const Four<float>*>(rows + (s + i) * stride);
    const float factor = factors[s + i];
#pragma unroll
    for (int k = 0; k < 4; ++k) acc[i % kParts].x[k] = fmaf(factor, c.x[k], acc[i % kParts].x[k]);
  }
}

template <bool kCluster>
__global__ void __launch_bounds__(kMostThreads, 1)
    greedy_dpp_kernel(const float* __restrict__ similarity, const float* __restrict__ relevance, float* states, float* factors,
                      int32_t* picks, uint8_t* keep, const Packed packed, const Layout layout, float eps) {
  SHARED(Exchange, exchange);
  SHARED(Chosen, chosen);
  const unsigned blocks = kCluster ? cluster_size() : 1, rank = kCluster ? cluster_rank() : 0;
  const int64_t index = blockIdx.x / blocks;
  const Group group = group_of(packed, index);
  const int n = group.n, count = smaller(group.count, n);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int begin = 4 * (static_cast<int>(rank) * threads + thread), step = 4 * static_cast<int>(blocks) * threads;
  const int64_t part = layout.part;

  Memory memory;
  float* const shared = reinterpret_cast<float*>(dynamic_shared());
  memory.gain = layout.own_state ? shared : states + static_cast<int64_t>(blockIdx.x) * 2 * part;
  memory.floor = memory.gain + part;
  memory.near = layout.own_state ? shared + 2 * part : shared;
  memory.far = factors + group.place * layout.stride;
  const float* const matrix = similarity + group.offset;
  const float* const quality = relevance + group.first;

  if (rank == 0) {
    fill_group(keep, uint8_t{0}, packed.cu_seqlens, packed.groups, index, packed.tokens);
    fill_group(picks, int32_t{-1}, packed.cu_places, packed.groups, index, packed.capacity);
  }
  // Key 0: not to be picked. A thread's columns are at begin + f * step, its numbers about them at 4 * (f * threads + thread).
  uint64_t best = 0;
  for (int column = begin, own = 4 * thread; column < n; column += step, own += 4 * threads)
    for (int i = 0; i < 4; ++i) {
      const int j = column + i < n ? column + i : n - 1;
      const float gain = entry(quality[j], matrix[static_cast<int64_t>(j) * n + j], quality[j]), floor = eps * gain;
      memory.gain[own + i] = gain;
      memory.floor[own + i] = floor;
      const uint64_t key = gain > floor && column + i < n ? pack_key(ordered(gain), static_cast<uint32_t>(j)) : 0;
      best = key > best ? key : best;
    }
  if constexpr (kCluster) team_sync<true>();  // all blocks are there before one writes to another
  const bool wide = n % 4 == 0 && reinterpret_cast<uintptr_t>(matrix) % sizeof(Four<float>) == 0;

  const bool writes = rank == 0 && thread < kWarp;
  Notebook notebook;
  int done = 0;
  unsigned chunk = 0;  // counts the uses of `chosen`, for its two halves
  for (int t = 0; t < count; ++t) {
    // Its barrier also lies between the filling above and the first pick, and between a step's c and the next step's reading of them.
    const uint64_t found = team_best<kCluster>(exchange, static_cast<unsigned>(t), best);
    if (found == 0) break;
    const int pick = static_cast<int>(key_index(found));
    if (writes) notebook.note(group, t, pick, picks, keep);
    if (++done == count) break;

    const float root = __fsqrt_rn(unordered(key_value(found))), own_quality = quality[pick];
    const float* const row = matrix + static_cast<int64_t>(pick) * n;
    // The owner of the pick's column.
    const int four = pick / 4, team_threads = static_cast<int>(blocks) * threads;
    const int owner = four % team_threads / threads;
    const int place = 4 * (four / team_threads * threads + four % threads) + pick % 4;
    const float* near = memory.near;
    if constexpr (kCluster) {
      if (layout.shared_rows > 0) near = cluster_shared(memory.near, static_cast<unsigned>(owner));
    }

    best = 0;
    for (int column = begin, own = 4 * thread, f = 0; f < layout.fours; column += step, own += 4 * threads, ++f) {
      // Whole blocks come along, as they meet at the barriers below; a column behind the last one reads and writes nothing.
      const bool live = column < n;
      Four<float> k{{0, 0, 0, 0}}, q{{0, 0, 0, 0}};
      if (live) {
        if (wide) {
          k = *reinterpret_cast<const Four<float>*>(row + column);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) k.x[i] = row[column + i < n ? column + i : n - 1];
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) q.x[i] = quality[column + i < n ? column + i : n - 1];
      }
      Four<float> acc[kParts];
#pragma unroll
      for (int i = 0; i < kParts; ++i) acc[i] = Four<float>{{0, 0, 0, 0}};
      for (int s = 0; s < t; s += kChunk, ++chunk) {
        const int size = smaller(kChunk, t - s);
        float* const factor = chosen.factors[chunk & 1];
        for (int i = thread; i < size; i += threads)
          factor[i] = s + i < layout.shared_rows ? near[(s + i) * part + place] : memory.far[(s + i) * layout.stride + pick];
        __syncthreads();
        if (live) {
          const int inside = smaller(size, larger(0, layout.shared_rows - s));
          accumulate(acc, memory.near + s * part + own, part, factor, inside);
          accumulate(acc, memory.far + (s + inside) * layout.stride + column, layout.stride, factor + inside, size - inside);
        }
      }
      if (!live) continue;
      Four<float> gain = *reinterpret_cast<const Four<float>*>(memory.gain + own), c;
      const Four<float> floor = *reinterpret_cast<const Four<float>*>(memory.floor + own);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float sum = __fadd_rn(__fadd_rn(acc[0].x[i], acc[1].x[i]), __fadd_rn(acc[2].x[i], acc[3].x[i]));
        c.x[i] = __fdiv_rn(__fsub_rn(entry(own_quality, k.x[i], q.x[i]), sum), root);
        gain.x[i] = column + i == pick ? -INFINITY : __fsub_rn(gain.x[i], __fmul_rn(c.x[i], c.x[i]));
        const uint64_t key = gain.x[i] > floor.x[i] && column + i < n ? pack_key(ordered(gain.x[i]), static_cast<uint32_t>(column + i)) : 0;
        best = key > best ? key : best;
      }
      *reinterpret_cast<Four<float>*>(memory.gain + own) = gain;
      float* const to = t < layout.shared_rows ? memory.near + t * part + own : memory.far + t * layout.stride + column;
      *reinterpret_cast<Four<float>*>(to) = c;
    }
  }
  if (writes && done % kWarp != 0) notebook.write(group, done, picks, keep);
}

// How a launch is cut: from shapes alone.
struct Cut {
  int64_t longest, rows;     // tokens, picks that one group can have
  unsigned blocks, threads;  // of a team, of a block
  Layout layout;
  size_t shared;             // bytes
};

Cut cut(const glimpse_greedy_dpp_params& p) {
  Cut found;
  found.longest = longest_group(p.entries, p.tokens, p.longest);
  found.rows = smaller(found.longest, p.capacity);
  const int64_t groups = larger<int64_t>(1, p.groups);
  // As many blocks as make room in shared memory for the c of the average group.
  const size_t most = most_shared(sizeof(Exchange) + sizeof(Chosen));
  const int64_t wanted = ceil_div(found.rows, groups) * ceil_div(p.tokens, groups) * static_cast<int64_t>(sizeof(float));
  found.blocks = cluster_for(ceil_div<int64_t>(wanted, static_cast<int64_t>(most)), groups);
  const int64_t fours = ceil_div<int64_t>(ceil_div<int64_t>(found.longest, 4), found.blocks);
  found.threads = static_cast<unsigned>(smaller<int64_t>(kMostThreads, larger<int64_t>(2 * kWarp, ceil_div<int64_t>(fours, kWarp) * kWarp)));
  Layout& layout = found.layout;
  layout.fours = static_cast<int>(ceil_div<int64_t>(fours, found.threads));
  layout.part = layout.fours * static_cast<int>(found.threads) * 4;
  layout.stride = ceil_div<int64_t>(found.longest, 4) * 4;
  const size_t state = 2 * static_cast<size_t>(layout.part) * sizeof(float);
  layout.own_state = state <= most / 2;
  found.shared = layout.own_state ? state : 0;
  const int64_t room = static_cast<int64_t>((most - found.shared) / sizeof(float)) / larger(1, layout.part);
  layout.shared_rows = static_cast<int>(smaller(room, ceil_div<int64_t>(found.rows, kParts) * kParts)) / kParts * kParts;
  found.shared += static_cast<size_t>(layout.shared_rows) * static_cast<size_t>(layout.part) * sizeof(float);
  return found;
}

size_t factor_bytes(const glimpse_greedy_dpp_params& p, const Cut& found) {
  // A group has at most `rows` picks, so where all of them are in shared memory there is nothing else.
  return found.layout.shared_rows >= found.rows ? 0 : static_cast<size_t>(p.capacity * found.layout.stride) * sizeof(float);
}
size_t state_bytes(const glimpse_greedy_dpp_params& p, const Cut& found) {
  const int64_t blocks = larger<int64_t>(1, p.groups) * found.blocks;
  return found.layout.own_state ? 0 : static_cast<size_t>(blocks * 2 * found.layout.part) * sizeof(float);
}

}  // namespace
}  // namespace glimpse::cuda

extern "C" size_t glimpse_cuda_greedy_dpp_workspace(const glimpse_greedy_dpp_params* p) {
  const auto found = glimpse::cuda::cut(*p);
  return glimpse::cuda::factor_bytes(*p, found) + glimpse::cuda::state_bytes(*p, found);
}

extern "C" glimpse_status glimpse_cuda_greedy_dpp(const glimpse_greedy_dpp_params* p, const glimpse_cuda_call* call) {
  using namespace glimpse::cuda;
  const Cut found = cut(*p);
  if (call->workspace_bytes < factor_bytes(*p, found) + state_bytes(*p, found))
    return glimpse::fail(GLIMPSE_INVALID, "greedy_dpp: workspace: expected %zu bytes, found %zu",
                         factor_bytes(*p, found) + state_bytes(*p, found), call->workspace_bytes);
  const Packed packed{p->cu_seqlens, p->cu_picks, p->entries, p->groups, p->tokens, p->capacity, found.longest};
  float* const factors = static_cast<float*>(call->workspace);
  float* const states = factors + factor_bytes(*p, found) / sizeof(float);
  Launch how;
  how.grid.x = static_cast<unsigned>(larger<int64_t>(1, p->groups)) * found.blocks;
  how.block.x = found.threads;
  how.cluster = found.blocks;
  how.shared = found.shared;
  how.stream = call->stream;
  return launch("greedy_dpp", how, found.blocks > 1 ? greedy_dpp_kernel<true> : greedy_dpp_kernel<false>, p->similarity, p->relevance,
                states, factors, p->picks, p->keep, packed, found.layout, p->eps);
}

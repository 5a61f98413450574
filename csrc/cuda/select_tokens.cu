// SPDX-License-Identifier: Apache-2.0
// Threshold, cap, floor and anchors of each group, then the rows that stay. The time is that of a chain of latencies; the bytes are few.
//
// Few groups: one launch. A block for each group, all of one cluster, and a bit for each packed row in their shared memory: blocks set the
// bits of their tokens wherever these lie, meet, and write a stretch of the index each. One group alone, or a chip without clusters:
// one block does it all.
//
// Many groups: launches that overlap. `prepare` sets the bits of the rows that stay in any case, in the workspace; `decide`, a block for
// each group, runs beside it and waits for it only before it adds its tokens' bits; `place` writes a stripe of the index each block, and
// counts the bits before its stripe by itself (8 KB of them at 66 000 rows), so that no block waits for another. Where that would be many
// bytes, for millions of rows, `count` counts the stripes before.
#include "glimpse/select_tokens.h"

#include "cuda/select_core.cuh"

namespace glimpse::cuda {
namespace {

using Params = glimpse_select_tokens_params;

constexpr int kPer = 4;                   // tokens in the registers of a thread
constexpr int kLarge = 1024, kSmall = 256;  // threads of a block
constexpr int kSmallWork = 1024;          // tokens of a group that kSmall threads do well
constexpr int kMostCluster = 8;           // what every chip with clusters can
constexpr int kMostAlone = 2;             // groups that one block does one after the other, rather than three launches
constexpr int kBlockWords = 512;          // of bits in the shared memory of a block
constexpr int kWishedWords = 256;         // of bits of a block, if clusters are to be had
constexpr int kStripe = 128;              // words of a block of `place`
constexpr int kMostSelfCounted = 32768;   // words that a block of `place` counts by itself
constexpr int64_t kMost = (int64_t{1} << 31) - (1 << 16);

// Bits in shared memory: `each` words in every block of the cluster, of which this one has `count` from `first` on.
template <int THREADS, bool ALONE>
struct SharedMarks {
  const Params& p;
  uint32_t* words;
  int each, first, count;
  bool prepared = false, met = false;

  __device__ __forceinline__ uint32_t* at(int word) const {
    if constexpr (ALONE) return words + word;
    return cluster_shared(words + word % each, static_cast<unsigned>(word / each));
  }
  __device__ __forceinline__ void prepare() {
    if (!prepared) set_bits<THREADS, 8>(p, words, first, count);
    prepared = true;
  }
  // All blocks have prepared their bits.
  __device__ __forceinline__ void ready() {
    if (!met) meet();
    met = true;
  }
  __device__ __forceinline__ static void meet() {
    if constexpr (ALONE) {
      __syncthreads();
    } else {
      cluster_sync();
    }
  }
};

template <int THREADS>
struct AtOnceShared {
  GroupShared<THREADS> group;
  PlaceShared<THREADS> place;
  uint32_t words[kBlockWords];
};

template <int THREADS, bool ALONE>
__global__ void __launch_bounds__(THREADS) at_once_kernel(const __grid_constant__ Params p, const int each) {
  SHARED(AtOnceShared<THREADS>, shared);
  const int thread = static_cast<int>(threadIdx.x);
  const int rank = ALONE ? 0 : static_cast<int>(cluster_rank()), blocks = ALONE ? 1 : static_cast<int>(cluster_size());
  const int words = static_cast<int>(ceil_div<int64_t>(p.rows, 32)), groups = static_cast<int>(p.groups);
  const int first = rank * each, count = min(max(words - first, 0), each);
  const int bound = thread <= p.sequences ? __ldg(p.cu_seqlens + thread) : 0;
  SharedMarks<THREADS, ALONE> marks{p, shared.words, each, first, count};
#pragma unroll 1
  for (int group = rank; group < groups; group += blocks) select_group<THREADS, kPer>(p, group, shared.group, marks);
  marks.prepare();
  marks.ready();
  marks.meet();

  int base = 0;
  if constexpr (!ALONE) {
    for (int w = thread; w < min(first, words); w += THREADS) base += __popc(*marks.at(w));
    base = block_sum<THREADS>(base, shared.place.scan);
  }
  const bool last = first + each >= words && (first < words || rank == 0);
  place_rows<THREADS>(p, [&](int w) { return shared.words[w]; }, count, first, base, last, bound, shared.place);
  fill_rest<THREADS>(p, rank, blocks);
  if constexpr (!ALONE) cluster_leave();  // others may still read this block's bits
}

struct GlobalMarks {
  uint32_t* words;
  __device__ __forceinline__ uint32_t* at(int word) const { return words + word; }
  __device__ __forceinline__ void prepare() const {}
  __device__ __forceinline__ void ready() const { wait_for_previous_grid(); }
};

__global__ void __launch_bounds__(kSmall) prepare_kernel(const __grid_constant__ Params p, uint32_t* bits) {
  let_next_grid_start();
  const int words = static_cast<int>(ceil_div<int64_t>(p.rows, 32)), first = static_cast<int>(blockIdx.x) * kStripe;
  set_bits<kSmall, kStripe / (kSmall / 32)>(p, bits + first, first, min(max(words - first, 0), kStripe));
}

template <int THREADS>
__global__ void __launch_bounds__(THREADS) decide_kernel(const __grid_constant__ Params p, uint32_t* bits) {
  SHARED(GroupShared<THREADS>, shared);
  let_next_grid_start();
  GlobalMarks marks{bits};
  select_group<THREADS, kPer>(p, static_cast<int>(blockIdx.x), shared, marks);
}

__global__ void __launch_bounds__(kStripe) count_kernel(const uint32_t* bits, int words, int* counts) {
  SHARED(BlockScan<kStripe>::Storage, shared);
  let_next_grid_start();
  wait_for_previous_grid();
  const int word = static_cast<int>(blockIdx.x * kStripe + threadIdx.x);
  const int found = block_sum<kStripe>(word < words ? __popc(__ldcg(bits + word)) : 0, shared);
  if (threadIdx.x == 0) counts[blockIdx.x] = found;
}

// `counts`: of each stripe, or NULL.
__global__ void __launch_bounds__(kLarge) place_kernel(const __grid_constant__ Params p, const uint32_t* bits, const int* counts) {
  SHARED(PlaceShared<kLarge>, shared);
  const int thread = static_cast<int>(threadIdx.x), stripe = static_cast<int>(blockIdx.x), first = stripe * kStripe;
  const int words = static_cast<int>(ceil_div<int64_t>(p.rows, 32));
  const int bound = thread <= p.sequences ? __ldg(p.cu_seqlens + thread) : 0;
  fill_rest<kLarge>(p, stripe, static_cast<int>(gridDim.x));
  wait_for_previous_grid();
  static_assert(kStripe == kPlaceTile<kLarge>, "a stripe is one tile");
  const int count = min(max(words - first, 0), kStripe), own = word_of_thread();
  const uint32_t word = own >= 0 && own < count ? __ldcg(bits + first + own) : 0u;
  int base = 0;
  if (counts != nullptr) {
    for (int i = thread; i < stripe; i += kLarge) base += __ldcg(counts + i);
  } else {
#pragma unroll 4
    for (int i = thread * 4; i < first; i += kLarge * 4) {
      const uint4 four = __ldcg(reinterpret_cast<const uint4*>(bits + i));
      base += __popc(four.x) + __popc(four.y) + __popc(four.z) + __popc(four.w);
    }
  }
  base = block_sum<kLarge>(base, shared.scan);
  place_rows<kLarge>(p, [&](int) { return word; }, count, first, base, stripe + 1 == static_cast<int>(gridDim.x), bound, shared);
}

struct Plan {
  int blocks;  // of the one launch; 0: several launches
  int each;    // words of bits of a block
  int words, stripes;
  bool counted;

  size_t bits_bytes() const { return static_cast<size_t>(ceil_div(words, 4)) * 16; }
  size_t workspace() const { return blocks > 0 ? 0 : bits_bytes() + (counted ? static_cast<size_t>(stripes) * sizeof(int) : 0); }
};

Plan plan(const Params& p) {
  Plan found{};
  found.words = static_cast<int>(ceil_div<int64_t>(p.rows, 32));
  found.stripes = max(1, ceil_div(found.words, kStripe));
  found.counted = found.words > kMostSelfCounted;
  const int most = chip().capability >= 90 ? kMostCluster : 1;
  int blocks = 1;
  while (blocks < most && (blocks < p.groups || blocks * kWishedWords < found.words)) blocks *= 2;
  found.each = max(1, ceil_div(found.words, blocks));
  if (p.groups <= max(most, kMostAlone) && found.each <= kBlockWords) found.blocks = blocks;
  return found;
}

template <class... Params_, class... Args>
glimpse_status start(void* stream, int blocks, int threads, bool dependent, void (*kernel)(Params_...), Args... args) {
  Launch how;
  how.grid.x = static_cast<unsigned>(blocks);
  how.block.x = static_cast<unsigned>(threads);
  how.stream = stream;
  how.dependent = dependent;
  return launch("select_tokens", how, kernel, args...);
}

glimpse_status at_once(const Params& p, const Plan& plan, bool large, void* stream) {
  Launch how;
  how.grid.x = how.cluster = static_cast<unsigned>(plan.blocks);
  how.block.x = large ? kLarge : kSmall;
  how.stream = stream;
  const bool alone = plan.blocks == 1;
  return launch("select_tokens", how,
                large ? (alone ? at_once_kernel<kLarge, true> : at_once_kernel<kLarge, false>)
                      : (alone ? at_once_kernel<kSmall, true> : at_once_kernel<kSmall, false>),
                p, plan.each);
}

glimpse_status run(const Params& p, const glimpse_cuda_call& call) {
  for (const int64_t size : {p.tokens, p.groups, p.rows, p.sequences, p.capacity})
    if (size > kMost)
      return fail(GLIMPSE_UNSUPPORTED, "select_tokens: tokens, groups, rows, sequences, capacity: expected at most %lld, found %lld",
                  static_cast<long long>(kMost), static_cast<long long>(size));
  const Plan how = plan(p);
  const int64_t mean = p.groups > 0 ? p.tokens / p.groups : 0;
  if (how.blocks > 0) return at_once(p, how, mean > kSmallWork || how.each > 64, call.stream);

  if (call.workspace_bytes < how.workspace())
    return fail(GLIMPSE_INVALID, "select_tokens: workspace: expected %zu bytes, found %zu", how.workspace(), call.workspace_bytes);
  auto* const bits = static_cast<uint32_t*>(call.workspace);
  auto* const counts = how.counted ? reinterpret_cast<int*>(static_cast<unsigned char*>(call.workspace) + how.bits_bytes()) : nullptr;
  const bool large = mean > kSmallWork;
  glimpse_status status = start(call.stream, how.stripes, kSmall, false, prepare_kernel, p, bits);
  if (status == GLIMPSE_OK && p.groups > 0)
    status = start(call.stream, static_cast<int>(p.groups), large ? kLarge : kSmall, true,
                   large ? decide_kernel<kLarge> : decide_kernel<kSmall>, p, bits);
  if (status == GLIMPSE_OK && how.counted)
    status = start(call.stream, how.stripes, kStripe, true, count_kernel, static_cast<const uint32_t*>(bits), how.words, counts);
  if (status == GLIMPSE_OK)
    status = start(call.stream, how.stripes, kLarge, true, place_kernel, p, static_cast<const uint32_t*>(bits),
                   static_cast<const int*>(counts));
  return status;
}

}  // namespace
}  // namespace glimpse::cuda

extern "C" size_t glimpse_cuda_select_tokens_workspace(const glimpse_select_tokens_params* p) {
  return glimpse::cuda::plan(*p).workspace();
}

extern "C" glimpse_status glimpse_cuda_select_tokens(const glimpse_select_tokens_params* p, const glimpse_cuda_call* call) {
  return glimpse::cuda::run(*p, *call);
}

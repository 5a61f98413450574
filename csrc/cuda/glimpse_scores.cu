// SPDX-License-Identifier: Apache-2.0
// The glimpse row's logits: every listed key is read once for all query heads of its head. One launch, in which the time is a chain of
// three latencies (the list, the keys and the query, the store); so a picture's few thousand keys are spread over all multiprocessors.
//
// bf16 and f16: a warp takes 16 keys, the rows of a product on the tensor cores, and up to 8 query heads, its columns. The sum runs over the
// dimensions in whatever order both operands share: lane l takes 16 bytes of row l / 4 and of head l / 4 at the same place, straight from
// memory, and that is its part of both fragments. Keys of a warp mostly belong to one sequence; for each further one the
// product is done again, and each key takes its own.
//
// float, and rows that are not aligned to 16 bytes: a warp takes 4 keys and 8 query heads, its lanes share the dimensions, and five
// exchanges add the lanes up and leave each with one of the 32 sums.
//
// The sum of a key does not depend on the keys beside it. A row that does not exist cannot raise here: its scores are NaN, which no selection
// takes for high ones.
#include "glimpse/glimpse_scores.h"

#include "cuda/kernel.cuh"

namespace glimpse::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kHeads = 8;  // query heads of a warp
constexpr int kRows = 16;  // keys of a warp on the tensor cores
constexpr int kKeys = 4;   // keys of a warp otherwise
constexpr unsigned kNobody = 0xffffffffu;

struct Args {
  const int32_t *token_index, *token_seq;
  const float* lse;
  float* out;
  int64_t sequences, tokens, count;
  int64_t q_stride, q_head_stride, k_stride, k_head_stride, lse_stride, out_stride;
  unsigned parts, chunks;  // chunks: of kHeads, in the query heads of a kv head; parts: chunks of all kv heads
  int group, dim;
  float scale;
};

__device__ __forceinline__ float not_a_number() { return __uint_as_float(0x7fc00000u); }

// What a warp works on: some keys, and some query heads of one kv head.
struct Work {
  int64_t first;          // key of the list
  int kv_head, head, heads;  // `heads` query heads from `head` on

  __device__ __forceinline__ Work(const Args& a, int keys) {
    const unsigned flat = blockIdx.x * (kThreads / 32) + threadIdx.x / 32, part = flat % a.parts;
    first = static_cast<int64_t>(flat / a.parts) * keys;
    kv_head = static_cast<int>(part / a.chunks);
    head = kv_head * a.group + static_cast<int>(part % a.chunks) * kHeads;
    heads = min(kHeads, (kv_head + 1) * a.group - head);
  }
};

// The rows of q and k that a listed key stands for; the sequence is kNobody if one of them does not exist. No branches, so that a thread
// asks for several at once.
struct Listed {
  int index;
  unsigned sequence;

  __device__ __forceinline__ Listed(const Args& a, int64_t n) {
    const int64_t at = min(n, a.count - 1);
    index = __ldg(a.token_index + at);
    const int found = __ldg(a.token_seq + at);
    const bool known = (n < a.count) & (index >= 0) & (index < a.tokens) & (found >= 0) & (found < a.sequences);
    sequence = known ? static_cast<unsigned>(found) : kNobody;
  }
};

__device__ __forceinline__ float lse_of(const Args& a, unsigned sequence, int head, bool wanted) {
  return a.lse != nullptr && wanted ? __ldg(a.lse + static_cast<int64_t>(sequence) * a.lse_stride + head) : 0.0f;
}

// Four blocks to a multiprocessor leave enough registers for all loads of 128 dimensions at once; left to itself the compiler takes
// fewer, and waits for each run before it asks for the next.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) tensor_kernel(const T* q, const T* k, const __grid_constant__ Args a) {
  constexpr int kRun = 32, kRuns = 4;  // elements of a run of four lanes; runs under way at a time
  const int lane = static_cast<int>(threadIdx.x) % 32, member = lane % 4 * 8, column = lane % 4 * 2;
  const Work work(a, kRows);
  if (work.first >= a.count) return;
  const int64_t n[2] = {work.first + lane / 4, work.first + lane / 4 + 8};
  const Listed listed[2] = {Listed(a, n[0]), Listed(a, n[1])};
  const T* row[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) row[i] = k + static_cast<int64_t>(listed[i].index) * a.k_stride + work.kv_head * a.k_head_stride + member;
  const bool has_head = lane / 4 < work.heads;

  float found[4] = {not_a_number(), not_a_number(), not_a_number(), not_a_number()};
  unsigned left[2] = {listed[0].sequence, listed[1].sequence};
#pragma unroll 1
  for (;;) {
    const unsigned sequence = __reduce_min_sync(0xffffffffu, min(left[0], left[1]));
    if (sequence == kNobody) break;
    float lse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) lse[i] = lse_of(a, sequence, work.head + column + i, column + i < work.heads);
    const T* const query = q + static_cast<int64_t>(sequence) * a.q_stride + (work.head + lane / 4) * a.q_head_stride + member;
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
    for (int start = 0; start < a.dim; start += kRun * kRuns) {
      uint4 keys[2][kRuns], queries[kRuns];
#pragma unroll
      for (int r = 0; r < kRuns; ++r) {
        const int at = start + r * kRun;
        const uint4 zero = make_uint4(0, 0, 0, 0);
        const bool inside = at + member < a.dim;
#pragma unroll
        for (int i = 0; i < 2; ++i) keys[i][r] = inside && listed[i].sequence != kNobody ? load_16(row[i] + at) : zero;
        queries[r] = inside && has_head ? load_16(query + at) : zero;
      }
#pragma unroll
      for (int r = 0; r < kRuns; ++r) {
        const unsigned first[4] = {keys[0][r].x, keys[1][r].x, keys[0][r].y, keys[1][r].y}, others[2] = {queries[r].x, queries[r].y};
        const unsigned second[4] = {keys[0][r].z, keys[1][r].z, keys[0][r].w, keys[1][r].w}, more[2] = {queries[r].z, queries[r].w};
        multiply_add_matrix<T>(sum, first, others);
        multiply_add_matrix<T>(sum, second, more);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (left[i / 2] == sequence) found[i] = fmaf(sum[i], a.scale, -lse[i % 2]);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (left[i] == sequence) left[i] = kNobody;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (n[i / 2] < a.count && column + i % 2 < work.heads) a.out[n[i / 2] * a.out_stride + work.head + column + i % 2] = found[i];
}

// WIDTH neighbours as floats: 4, from 16 bytes of float; or 1, of any type.
template <class T, int WIDTH>
__device__ __forceinline__ void read(float (&to)[WIDTH], const T* from) {
  if constexpr (WIDTH == 4) {
    static_assert(sizeof(T) == 4, "16 bytes");
    const uint4 bits = load_16(from);
    to[0] = __uint_as_float(bits.x);
    to[1] = __uint_as_float(bits.y);
    to[2] = __uint_as_float(bits.z);
    to[3] = __uint_as_float(bits.w);
  } else {
    to[0] = to_float(*from);
  }
}

template <class T, int WIDTH>
__global__ void __launch_bounds__(kThreads, 3) lanes_kernel(const T* q, const T* k, const __grid_constant__ Args a) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const Work work(a, kKeys);
  if (work.first >= a.count) return;
  const Listed own(a, work.first + lane % kKeys);
  const T *key[kKeys], *query[kKeys];
  bool known[kKeys], together = true;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    const int index = __shfl_sync(0xffffffffu, own.index, i);
    const unsigned sequence = __shfl_sync(0xffffffffu, own.sequence, i);
    known[i] = sequence != kNobody;
    key[i] = k + static_cast<int64_t>(index) * a.k_stride + work.kv_head * a.k_head_stride;
    query[i] = q + static_cast<int64_t>(sequence) * a.q_stride + work.head * a.q_head_stride;
    together = together && known[i] && query[i] == query[0];
  }
  const unsigned mine = __shfl_sync(0xffffffffu, own.sequence, lane / kHeads);
  const bool wanted = lane % kHeads < work.heads;
  const float lse = lse_of(a, mine, work.head + lane % kHeads, wanted && mine != kNobody);

  float sum[kKeys * kHeads] = {};
#pragma unroll 1
  for (int d = lane * WIDTH; d < a.dim; d += 32 * WIDTH) {
    float keys[kKeys][WIDTH] = {};
#pragma unroll
    for (int i = 0; i < kKeys; ++i)
      if (known[i]) read<T, WIDTH>(keys[i], key[i] + d);
    float queries[kHeads][WIDTH] = {};
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      if (i == 0 || !together) {
#pragma unroll
        for (int h = 0; h < kHeads; ++h)
          if (known[i] && h < work.heads) read<T, WIDTH>(queries[h], query[i] + h * a.q_head_stride + d);
      }
#pragma unroll
      for (int h = 0; h < kHeads; ++h)
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) sum[i * kHeads + h] = fmaf(keys[i][e], queries[h][e], sum[i * kHeads + h]);
    }
  }
  // Each exchange adds two lanes and halves the sums of both: lane l ends with the whole of sum l.
#pragma unroll
  for (int step = 0; step < 5; ++step) {
    const int half = 16 >> step;
    const bool upper = (lane & half) != 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (i >= half) break;
      const float given = upper ? sum[i] : sum[i + half], kept = upper ? sum[i + half] : sum[i];
      sum[i] = kept + __shfl_xor_sync(0xffffffffu, given, half);
    }
  }
  const int64_t n = work.first + lane / kHeads;
  if (n < a.count && wanted)
    a.out[n * a.out_stride + work.head + lane % kHeads] = mine == kNobody ? not_a_number() : fmaf(sum[0], a.scale, -lse);
}

template <class T>
glimpse_status run(const glimpse_glimpse_scores_params& p, const glimpse_cuda_call& call) {
  if (p.count == 0 || p.q_heads == 0) return GLIMPSE_OK;
  const int64_t group = p.q_heads / p.kv_heads, chunks = ceil_div<int64_t>(group, kHeads), parts = chunks * p.kv_heads;
  if (p.q_heads > (1 << 20) || p.dim > (1 << 20))
    return fail(GLIMPSE_UNSUPPORTED, "glimpse_scores: q_heads, dim: expected at most %d, found %lld, %lld", 1 << 20,
                static_cast<long long>(p.q_heads), static_cast<long long>(p.dim));
  const Args a{p.token_index, p.token_seq,     p.lse,      p.out,           p.sequences,  p.tokens,     p.count,
               p.q_stride,    p.q_head_stride, p.k_stride, p.k_head_stride, p.lse_stride, p.out_stride,
               static_cast<unsigned>(parts), static_cast<unsigned>(chunks), static_cast<int>(group), static_cast<int>(p.dim), p.scale};
  constexpr int64_t kWide = 16 / sizeof(T);
  bool aligned = reinterpret_cast<uintptr_t>(p.q) % 16 == 0 && reinterpret_cast<uintptr_t>(p.k) % 16 == 0;
  for (const int64_t stride : {p.dim, p.q_stride, p.q_head_stride, p.k_stride, p.k_head_stride}) aligned = aligned && stride % kWide == 0;
  constexpr bool kTensor = sizeof(T) == 2;
  const int64_t keys = kTensor && aligned ? kRows : kKeys;
  const int64_t blocks = ceil_div<int64_t>(ceil_div(p.count, keys) * parts, kThreads / 32);
  if (blocks > 0x3fffffff)  // four warps each, numbered in 32 bits
    return fail(GLIMPSE_UNSUPPORTED, "glimpse_scores: count: found %lld, too many for one launch", static_cast<long long>(p.count));
  Launch how;
  how.grid.x = static_cast<unsigned>(blocks);
  how.block.x = kThreads;
  how.stream = call.stream;
  const T *const q = static_cast<const T*>(p.q), *const k = static_cast<const T*>(p.k);
  if constexpr (kTensor) {
    if (aligned) return launch("glimpse_scores", how, tensor_kernel<T>, q, k, a);
    return launch("glimpse_scores", how, lanes_kernel<T, 1>, q, k, a);
  } else {
    return launch("glimpse_scores", how, aligned ? lanes_kernel<T, 4> : lanes_kernel<T, 1>, q, k, a);
  }
}

}  // namespace
}  // namespace glimpse::cuda

extern "C" glimpse_status glimpse_cuda_glimpse_scores(const glimpse_glimpse_scores_params* p, const glimpse_cuda_call* call) {
  using namespace glimpse::cuda;
  return by_dtype("glimpse_scores", p->dtype, [&](auto zero) { return run<decltype(zero)>(*p, *call); });
}

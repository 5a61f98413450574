// SPDX-License-Identifier: Apache-2.0
// Softmax of one query row a sequence at listed keys. Two sweeps over the keys: largest logit and sum of each head by chunks
// of a fixed size, joined in their order, then the weights of the listed keys. Heads are vector lanes in both, so the logits
// of a key are never turned around. Without an lse the largest logit itself is subtracted: it stays exact, however large.
#include "glimpse/last_row_attention.h"

#include <stdlib.h>

#include "cpu/cells.h"
#include "cpu/segments.h"

namespace glimpse::GLIMPSE_ISA_NS {
namespace {

constexpr int64_t kChunk = 128;  // keys of a task
constexpr int kTile = 4;         // keys taken together
constexpr int64_t kAhead = 12;   // keys that are asked for before they are needed
// Products of a call up to which one thread does it: waking a second costs as much.
constexpr int64_t kOneThread = int64_t{1} << 18;

struct Plan {
  int64_t group, heads;  // query heads a key head; query heads rounded up to lanes
  int64_t* starts;       // [sequences + 1]: chunks before each sequence
  float* parts;          // [chunks][2][heads]: largest logits, sums of the exponentials from there
  float* shift;          // [sequences][heads]: what is subtracted from the logits,
  float* factor;         // [sequences][heads]: and what the exponentials are multiplied with; 0 where there is no head, or
                         // one that gives nothing
};

// Logits of `count` <= kTile keys and all heads of a sequence: to[i * heads + head]. A logit does not depend on which keys
// come together: missing ones repeat the last.
template <class T>
void score(const glimpse_last_row_attention_params& p, const Plan& plan, int64_t sequence, const T* const* keys, int count,
           float* to) {
  const T* q = static_cast<const T*>(p.q) + sequence * p.q_stride;
#if defined(__AVX512F__)
  const T* rows[kTile];
  for (int i = 0; i < kTile; ++i) rows[i] = keys[smaller(i, count - 1)];
  for (int64_t kv_head = 0; kv_head < p.kv_heads; ++kv_head) {
    for (int64_t first = kv_head * plan.group; first < (kv_head + 1) * plan.group; first += 4) {
      const int64_t last = smaller<int64_t>(first + 3, (kv_head + 1) * plan.group - 1);
      const T* queries[4];
      for (int j = 0; j < 4; ++j) queries[j] = q + smaller<int64_t>(first + j, last) * p.q_head_stride;
      float found[4 * kTile] __attribute__((aligned(64)));
      store(found, dot_tile(rows, queries, p.dim) * p.scale);
      for (int i = 0; i < count; ++i)
        for (int64_t head = first; head <= last; ++head) to[i * plan.heads + head] = found[4 * i + head - first];
    }
    for (int i = 0; i < kTile; ++i) rows[i] += p.k_head_stride;
  }
#else
  for (int i = 0; i < count; ++i)
    for (int64_t head = 0; head < p.q_heads; ++head)
      to[i * plan.heads + head] =
          p.scale * dot(q + head * p.q_head_stride, keys[i] + head / plan.group * p.k_head_stride, p.dim);
#endif
}

// Asks for a key of all heads some time before it is scored.
template <class T>
GLIMPSE_INLINE void prefetch_key(const glimpse_last_row_attention_params& p, int64_t token) {
  for (int64_t head = 0; head < p.kv_heads; ++head) {
    const T* row = static_cast<const T*>(p.k) + token * p.k_stride + head * p.k_head_stride;
    for (int64_t b = 0; b < p.dim * static_cast<int64_t>(sizeof(T)); b += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(row) + b);
  }
}

GLIMPSE_INLINE void clear(float* p, int64_t count) { memset(p, 0, sizeof(float) * static_cast<size_t>(count)); }

// Largest logit of each head over a chunk, and the sum of the exponentials from there.
template <class T>
bool sum_chunk(const glimpse_last_row_attention_params& p, const Plan& plan, int64_t task) {
  const int64_t sequence = find_segment(plan.starts, p.sequences, task);
  const int64_t begin = p.cu_k[sequence] + (task - plan.starts[sequence]) * kChunk;
  const int64_t count = smaller<int64_t>(kChunk, p.cu_k[sequence + 1] - begin);
  float* logits = static_cast<float*>(thread_scratch(static_cast<size_t>(count * plan.heads * 4)));
  if (logits == nullptr) return false;
  clear(logits, count * plan.heads);
  for (int64_t key = 0; key < count; key += kTile) {
    const int some = static_cast<int>(smaller<int64_t>(kTile, count - key));
    const T* keys[kTile];
    for (int i = 0; i < some; ++i) {
      keys[i] = static_cast<const T*>(p.k) + (begin + key + i) * p.k_stride;
      if (key + i + kAhead < count) prefetch_key<T>(p, begin + key + i + kAhead);
    }
    score(p, plan, sequence, keys, some, logits + key * plan.heads);
  }
  float* part = plan.parts + task * 2 * plan.heads;
  for (int64_t head = 0; head < plan.heads; head += kLanes) {
    vf top = splat(-__builtin_inff()), sum{};
    // in this order a NaN is passed over; it reaches the sum
    for (int64_t key = 0; key < count; ++key) top = vmax(load(logits + key * plan.heads + head), top);
    const vf shift = select(top == splat(-__builtin_inff()), vf{}, top);
    for (int64_t key = 0; key < count; ++key) sum = sum + vexp(load(logits + key * plan.heads + head) - shift);
    store(part + head, top);
    store(part + plan.heads + head, sum);
  }
  return true;
}

// The chunks of a sequence, first one first.
void join(const glimpse_last_row_attention_params& p, const Plan& plan, int64_t sequence) {
  const float* parts = plan.parts + plan.starts[sequence] * 2 * plan.heads;
  const int64_t chunks = plan.starts[sequence + 1] - plan.starts[sequence];
  for (int64_t head = 0; head < plan.heads; head += kLanes) {
    vf top = splat(-__builtin_inff()), sum{};
    for (int64_t c = 0; c < chunks; ++c) top = vmax(load(parts + 2 * c * plan.heads + head), top);
    const vf shift = select(top == splat(-__builtin_inff()), vf{}, top);
    for (int64_t c = 0; c < chunks; ++c) {
      const float* part = parts + 2 * c * plan.heads + head;
      sum = sum + vexp(load(part) - shift) * load(part + plan.heads);
    }
    store(plan.shift + sequence * plan.heads + head, shift);
    const vi nothing = (sum == vf{}) | (lane_index() >= splat_i(static_cast<int32_t>(p.q_heads - head)));
    store(plan.factor + sequence * plan.heads + head, select(nothing, vf{}, splat(1.0f) / sum));
  }
}

void take_lse(const glimpse_last_row_attention_params& p, const Plan& plan, int64_t sequence) {
  for (int64_t head = 0; head < p.q_heads; ++head) {
    const float lse = p.lse[sequence * p.lse_stride + head];
    const bool nothing = lse == -__builtin_inff();
    plan.shift[sequence * plan.heads + head] = nothing ? 0.0f : lse;
    plan.factor[sequence * plan.heads + head] = nothing ? 0.0f : 1.0f;
  }
}

// Listed keys begin .. end.
template <class T>
bool weigh(const glimpse_last_row_attention_params& p, const Plan& plan, int64_t begin, int64_t end) {
  float* logits = static_cast<float*>(thread_scratch(static_cast<size_t>(kTile * plan.heads * 4)));
  if (logits == nullptr) return false;
  clear(logits, kTile * plan.heads);
  for (int64_t n = begin; n < end;) {
    const int64_t sequence = p.token_seq[n];
    const T* keys[kTile];
    int count = 0;
    for (; count < kTile && n + count < end && p.token_seq[n + count] == sequence; ++count) {
      keys[count] = static_cast<const T*>(p.k) + p.token_index[n + count] * p.k_stride;
      if (n + count + kAhead < end) prefetch_key<T>(p, p.token_index[n + count + kAhead]);
    }
    score(p, plan, sequence, keys, count, logits);
    const float* shift = plan.shift + sequence * plan.heads;
    const float* factor = plan.factor + sequence * plan.heads;
    for (int i = 0; i < count; ++i) {
      vf total{};
      for (int64_t head = 0; head < plan.heads; head += kLanes) {
        const vf by = load(factor + head);
        const vf weight = vexp(load(logits + i * plan.heads + head) - load(shift + head)) * by;
        total = total + select(by == vf{}, vf{}, weight);
      }
      p.out[n + i] = hsum(total) / static_cast<float>(p.q_heads);
    }
    n += count;
  }
  return true;
}

// Shift and factor of all rows from their keys.
template <class T>
bool sum_rows(const glimpse_last_row_attention_params& p, Plan& plan) {
  count_blocks(p.cu_k, p.sequences, kChunk, plan.starts);
  const int64_t tasks = plan.starts[p.sequences];
  plan.parts = static_cast<float*>(malloc(static_cast<size_t>(2 * tasks * plan.heads + 1) * sizeof(float)));
  if (plan.parts == nullptr) return false;
  bool short_of_memory = false;  // only ever set to true, by whichever thread
  auto task_body = [&](int64_t task) {
    if (!sum_chunk<T>(p, plan, task)) __atomic_store_n(&short_of_memory, true, __ATOMIC_RELAXED);
  };
  if ((p.cu_k[p.sequences] - p.cu_k[0]) * p.q_heads * p.dim > kOneThread)
    parallel_for(tasks, task_body);
  else
    for (int64_t task = 0; task < tasks; ++task) task_body(task);
  for (int64_t s = 0; s < p.sequences && !short_of_memory; ++s) join(p, plan, s);
  free(plan.parts);
  return !short_of_memory;
}

template <class T>
bool run(const glimpse_last_row_attention_params& p, Plan& plan) {
  if (p.lse == nullptr) {
    if (!sum_rows<T>(p, plan)) return false;
  } else {
    for (int64_t s = 0; s < p.sequences; ++s) take_lse(p, plan, s);
  }
  bool short_of_memory = false;
  const int64_t grain = 1 + kOneThread / (p.q_heads * p.dim);
  parallel_range(p.count, grain, [&](int64_t begin, int64_t end) {
    if (!weigh<T>(p, plan, begin, end)) __atomic_store_n(&short_of_memory, true, __ATOMIC_RELAXED);
  });
  return !short_of_memory;
}

}  // namespace

glimpse_status last_row_attention(const glimpse_last_row_attention_params& p) {
  for (int64_t n = 0; n < p.count; ++n) {
    if (p.token_index[n] < 0 || p.token_index[n] >= p.tokens)
      return fail(GLIMPSE_INVALID, "last_row_attention: token_index[%lld]: expected a row of k in [0, %lld), found %d",
                  static_cast<long long>(n), static_cast<long long>(p.tokens), p.token_index[n]);
    if (p.token_seq[n] < 0 || p.token_seq[n] >= p.sequences)
      return fail(GLIMPSE_INVALID, "last_row_attention: token_seq[%lld]: expected a row of q in [0, %lld), found %d",
                  static_cast<long long>(n), static_cast<long long>(p.sequences), p.token_seq[n]);
  }
  if (p.lse == nullptr) {
    const glimpse_status status = check_bounds("last_row_attention", "cu_seqlens_k", p.cu_k, p.sequences, p.tokens);
    if (status != GLIMPSE_OK) return status;
  }
  Plan plan;
  plan.group = p.q_heads / p.kv_heads;
  plan.heads = round_up(p.q_heads, kLanes);
  const int64_t rows = p.sequences * plan.heads;
  plan.starts = static_cast<int64_t*>(malloc(sizeof(int64_t) * static_cast<size_t>(p.sequences + 1)));
  plan.shift = static_cast<float*>(calloc(static_cast<size_t>(2 * rows + 1), sizeof(float)));
  plan.factor = plan.shift + rows;
  bool done = plan.starts != nullptr && plan.shift != nullptr;
  if (done) done = p.dtype == GLIMPSE_BFLOAT16 ? run<bf16>(p, plan) : run<float>(p, plan);
  free(plan.starts);
  free(plan.shift);
  return done ? GLIMPSE_OK : fail(GLIMPSE_OUT_OF_MEMORY, "last_row_attention: no scratch memory");
}

}  // namespace glimpse::GLIMPSE_ISA_NS

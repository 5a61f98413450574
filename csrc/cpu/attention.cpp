// SPDX-License-Identifier: Apache-2.0
// Variable-length attention: one task is a block of query rows of one segment and one key head, with all query heads that
// share it.
#include "glimpse/attention.h"

#include <stdlib.h>

#include "cpu/attention_core.h"
#include "cpu/segments.h"

namespace glimpse::GLIMPSE_ISA_NS {
namespace {

constexpr float kLn2 = 0.693147180559945309417f;

struct Plan {
  int64_t group;          // query heads a key head
  int64_t block;          // queries of a task
  int64_t* block_starts;  // [segments + 1]: tasks (per key head) before each segment
  Scale scale;
  int64_t query_cells, columns;
};

// Number of keys of the segment that a query row sees.
GLIMPSE_INLINE int32_t visible(const glimpse_attention_params& p, int64_t row, int64_t index, int64_t queries,
                               int64_t keys) {
  if (!p.causal) return static_cast<int32_t>(keys);
  const int64_t last = p.q_positions != nullptr ? p.q_positions[row] : index + keys - queries;
  return static_cast<int32_t>(last < 0 ? 0 : smaller(last + 1, keys));
}

template <class T>
void write_nothing(const glimpse_attention_params& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t h = 0; h < p.q_heads; ++h) {
      write_zeros(static_cast<T*>(p.out) + row * p.out_stride + h * p.out_head_stride, p.v_dim);
      if (p.lse != nullptr) p.lse[row * p.q_heads + h] = -__builtin_inff();
    }
  }
}

// Divides by the sums and writes out.
template <class T>
void write_rows(const glimpse_attention_params& p, const Plan& plan, const Rows& rows, int64_t row0, int64_t kv_head) {
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t row = row0 + r / plan.group, head = kv_head * plan.group + r % plan.group;
    T* out = static_cast<T*>(p.out) + row * p.out_stride + head * p.out_head_stride;
    const float total = weight_sum(rows, r);
    if (total == 0.0f)
      write_zeros(out, p.v_dim);
    else
      write_row(out, rows.result + r * rows.columns, p.v_dim, 1.0f / total);
    if (p.lse != nullptr)
      p.lse[row * p.q_heads + head] =
          total == 0.0f ? -__builtin_inff() : (rows.top[r] * plan.scale.factor + __builtin_log2f(total)) * kLn2;
  }
}

template <class T>
bool run_task(const glimpse_attention_params& p, const Plan& plan, int64_t segment, int64_t block, int64_t kv_head) {
  const int64_t q0 = p.cu_q[segment], k0 = p.cu_k[segment];
  const int64_t queries = p.cu_q[segment + 1] - q0, keys = p.cu_k[segment + 1] - k0;
  const int64_t begin = block * plan.block, end = smaller(begin + plan.block, queries);
  const int64_t count = (end - begin) * plan.group;

  char* memory = static_cast<char*>(thread_scratch(core_bytes(count, plan.query_cells, plan.columns)));
  if (memory == nullptr) return false;
  float *packed_keys, *packed_values;
  Rows rows = lay_out<T>(memory, count, plan.query_cells, plan.columns, &packed_keys, &packed_values);
  const T* k = static_cast<const T*>(p.k) + k0 * p.k_stride + kv_head * p.k_head_stride;
  const T* v = static_cast<const T*>(p.v) + k0 * p.v_stride + kv_head * p.v_head_stride;
  const T* key_rows[2 * kKeys];  // of this tile and the next
  const T* value_rows[2 * kKeys];
  auto point_at = [&](int64_t key, int64_t stop, int at) {
    const int tile = static_cast<int>(larger<int64_t>(0, smaller<int64_t>(kKeys, stop - key)));
    for (int i = 0; i < tile; ++i) {
      key_rows[at + i] = k + (key + i) * p.k_stride;
      value_rows[at + i] = v + (key + i) * p.v_stride;
    }
    prefetch_rows(key_rows + at, tile, p.dim);
    prefetch_rows(value_rows + at, tile, p.v_dim);
    return tile;
  };
  int next = point_at(0, keys, 0);

  int32_t most = 0;
  for (int64_t r = 0; r < count; ++r) {
    const int64_t index = begin + r / plan.group, head = kv_head * plan.group + r % plan.group;
    pack_query(static_cast<const T*>(p.q) + (q0 + index) * p.q_stride + head * p.q_head_stride, p.dim, plan.scale.sign,
               rows.query + r * rows.query_cells);
    rows.limit[r] = visible(p, q0 + index, index, queries, keys);
    most = larger(most, rows.limit[r]);
  }

  for (int64_t key = 0, at = 0; key < most; key += kKeys, at = kKeys - at) {
    const int tile = static_cast<int>(smaller<int64_t>(next, most - key));
    next = point_at(key + kKeys, most, static_cast<int>(kKeys - at));
    pack_keys(key_rows + at, tile, p.dim, packed_keys);
    pack_values(value_rows + at, tile, p.v_dim, plan.columns, packed_values);
    attend<T>(rows, packed_keys, packed_values, key, tile, plan.scale.factor);
  }
  write_rows<T>(p, plan, rows, q0 + begin, kv_head);
  return true;
}

template <class T>
glimpse_status run(const glimpse_attention_params& p) {
  Plan plan;
  plan.group = p.q_heads / p.kv_heads;
  plan.scale = split_scale(p.scale);
  plan.query_cells = cells_of<T>(p.dim);
  plan.columns = round_up(p.v_dim, kLanes);

  // Many rows a task share the packing of keys; few tasks a thread leave threads idle. Between 64 and 256 rows.
  const int64_t row_heads = p.cu_q[p.segments] * p.kv_heads * plan.group;
  int64_t target = row_heads / (4 * static_cast<int64_t>(num_threads()));
  target = target > 256 ? 256 : target < 64 ? 64 : target;
  plan.block = larger<int64_t>(1, target / plan.group);
  plan.block_starts = static_cast<int64_t*>(malloc(sizeof(int64_t) * static_cast<size_t>(p.segments + 1)));
  if (plan.block_starts == nullptr) return fail(GLIMPSE_OUT_OF_MEMORY, "attention: no memory for the task list");
  count_blocks(p.cu_q, p.segments, plan.block, plan.block_starts);
  write_nothing<T>(p, 0, p.cu_q[0]);
  write_nothing<T>(p, p.cu_q[p.segments], p.q_rows);
  bool short_of_memory = false;  // only ever set to true, by whichever thread
  parallel_for(plan.block_starts[p.segments] * p.kv_heads, [&](int64_t task) {
    const int64_t index = task / p.kv_heads;
    const int64_t segment = find_segment(plan.block_starts, p.segments, index);
    // the last blocks of a causal segment see the most keys: they go first
    const int64_t block = plan.block_starts[segment + 1] - 1 - index;
    if (!run_task<T>(p, plan, segment, block, task % p.kv_heads))
      __atomic_store_n(&short_of_memory, true, __ATOMIC_RELAXED);
  });
  free(plan.block_starts);
  return short_of_memory ? fail(GLIMPSE_OUT_OF_MEMORY, "attention: no scratch memory") : GLIMPSE_OK;
}

}  // namespace

glimpse_status attention(const glimpse_attention_params& p) {
  glimpse_status status = check_bounds("attention", "cu_seqlens_q", p.cu_q, p.segments, p.q_rows);
  if (status == GLIMPSE_OK) status = check_bounds("attention", "cu_seqlens_k", p.cu_k, p.segments, p.k_rows);
  if (status != GLIMPSE_OK) return status;
  if (p.q_heads == 0 || (p.v_dim == 0 && p.lse == nullptr)) return GLIMPSE_OK;  // nothing to write
  return p.dtype == GLIMPSE_BFLOAT16 ? run<bf16>(p) : run<float>(p);
}

}  // namespace glimpse::GLIMPSE_ISA_NS

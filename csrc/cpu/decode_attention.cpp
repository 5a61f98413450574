// SPDX-License-Identifier: Apache-2.0
// Decoding attention, split over the keys (Flash-Decoding): each task attends the query heads of one key head to one
// chunk of keys; the parts are then joined in chunk order. The chunk size is fixed, so the result does not depend on the
// threads.
#include "glimpse/decode_attention.h"

#include <stdlib.h>

#include "cpu/attention_core.h"

namespace glimpse::GLIMPSE_ISA_NS {
namespace {

constexpr int64_t kChunk = 256;  // keys of a task
// Query heads a key head up to which keys and values are read in place: packing them pays only for more rows, or where
// it brings the bf16 pair instruction.
constexpr int64_t kDirectRows = 2;

struct Plan {
  int64_t group, chunks;  // query heads a key head; most chunks of a row
  int64_t query_cells, columns;
  Scale scale;
  // Parts of the result by [row][query head][chunk]: columns values, not divided; then top and sum.
  float* parts;
  int64_t part_size;

  float* part(int64_t row_head, int64_t chunk) const { return parts + (row_head * chunks + chunk) * part_size; }
};

// ---- one or two query rows: no packing -----------------------------------------------------------------------------

// result[0 .. vectors * kLanes) = keep * result + sum of weights[j] * rows[j][0 .. width)
template <class T, int vectors>
void add_values(const T* const* rows, int count, const float* weights, int64_t offset, int64_t width, float keep,
                float* result) {
  vf sum[vectors];
#pragma GCC unroll 8
  for (int i = 0; i < vectors; ++i) sum[i] = keep == 0.0f ? vf{} : load(result + i * kLanes) * keep;
  for (int j = 0; j < count; ++j) {
    const T* row = rows[j] + offset;
    if (width >= vectors * kLanes) {
#pragma GCC unroll 8
      for (int i = 0; i < vectors; ++i) sum[i] = fma(load(row + i * kLanes), splat(weights[j]), sum[i]);
    } else {
      const int n = static_cast<int>(width);
      sum[0] = fma(load_n(row, n), splat(weights[j]), sum[0]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < vectors; ++i) store(result + i * kLanes, sum[i]);
}

// What `attend` does, for keys and values where they lie. Cells of the queries are floats.
template <class T>
void attend_in_place(Rows& rows, const T* const* keys, const T* const* values, int64_t dim, int64_t v_dim, int64_t key,
                     int count, float factor) {
  float logits[kDirectRows * kKeys] __attribute__((aligned(64)));
  float weights[kDirectRows * kKeys] __attribute__((aligned(64)));
  const int height = static_cast<int>(rows.count), vectors = (count + kLanes - 1) / kLanes;
  for (int j = 0; j < count; ++j) {
    for (int i = 0; i < height; ++i) {
      logits[i * kKeys + j] = dot(rows.query + i * rows.query_cells, keys[j], dim);
    }
  }
  for (int i = 0; i < height; ++i)  // lanes past the last key are read, though never used
    for (int j = count; j < vectors * kLanes; ++j) logits[i * kKeys + j] = 0.0f;
  softmax_tile<float, true>(rows, 0, height, logits, weights, kKeys, vectors, key, factor);
  for (int i = 0; i < height; ++i) {
    const float keep = rows.started[0] ? rows.keep[i] : 0.0f;
    float* result = rows.result + i * rows.columns;
    const float* weight = weights + i * kKeys;
    int64_t column = 0;
    for (; column + 8 * kLanes <= v_dim; column += 8 * kLanes)
      add_values<T, 8>(values, count, weight, column, 8 * kLanes, keep, result + column);
    for (; column < v_dim; column += kLanes)
      add_values<T, 1>(values, count, weight, column, v_dim - column, keep, result + column);
  }
  rows.started[0] = true;
}

// ---- tasks ---------------------------------------------------------------------------------------------------------

template <class T>
bool run_chunk(const glimpse_decode_attention_params& p, const Plan& plan, int64_t row, int64_t kv_head, int64_t chunk) {
  const int64_t begin = chunk * kChunk, end = smaller<int64_t>(begin + kChunk, p.lengths[row]);
  if (begin >= end) return true;
  char* memory = static_cast<char*>(thread_scratch(core_bytes(plan.group, plan.query_cells, plan.columns)));
  if (memory == nullptr) return false;
  float *packed_keys, *packed_values;
  Rows rows = lay_out<T>(memory, plan.group, plan.query_cells, plan.columns, &packed_keys, &packed_values);
  for (int64_t r = 0; r < plan.group; ++r) {
    pack_query(static_cast<const T*>(p.q) + row * p.q_stride + (kv_head * plan.group + r) * p.q_head_stride, p.dim,
               plan.scale.sign, rows.query + r * rows.query_cells);
    rows.limit[r] = static_cast<int32_t>(end);
  }
  const T* k = static_cast<const T*>(p.k) + kv_head * p.k_head_stride;
  const T* v = static_cast<const T*>(p.v) + kv_head * p.v_head_stride;
  const int32_t* table = p.block_table + row * p.table_stride;
  const T* key_rows[kChunk];
  const T* value_rows[kChunk];
  for (int64_t key = begin; key < end; ++key) {
    const int64_t block = table[key / p.block_size], slot = key % p.block_size;
    key_rows[key - begin] = k + block * p.k_block_stride + slot * p.k_slot_stride;
    value_rows[key - begin] = v + block * p.v_block_stride + slot * p.v_slot_stride;
  }
  for (int64_t key = begin; key < end; key += kKeys) {
    const int tile = static_cast<int>(smaller<int64_t>(kKeys, end - key));
    const int next = static_cast<int>(smaller<int64_t>(kKeys, end - key - tile));
    prefetch_rows(key_rows + (key - begin) + tile, next, p.dim);
    if constexpr (!kPairs<T>) {
      if (plan.group <= kDirectRows) {
        prefetch_rows(value_rows + (key - begin) + tile, next, p.v_dim);
        attend_in_place(rows, key_rows + (key - begin), value_rows + (key - begin), p.dim, p.v_dim, key, tile,
                        plan.scale.factor);
        continue;
      }
    }
    pack_keys(key_rows + (key - begin), tile, p.dim, packed_keys);
    prefetch_rows(value_rows + (key - begin) + tile, next, p.v_dim);
    pack_values(value_rows + (key - begin), tile, p.v_dim, plan.columns, packed_values);
    attend<T>(rows, packed_keys, packed_values, key, tile, plan.scale.factor);
  }
  for (int64_t r = 0; r < plan.group; ++r) {
    float* part = plan.part(row * p.q_heads + kv_head * plan.group + r, chunk);
    memcpy(part, rows.result + r * rows.columns, sizeof(float) * static_cast<size_t>(plan.columns));
    part[plan.columns] = rows.top[r];
    part[plan.columns + 1] = weight_sum(rows, r);
  }
  return true;
}

// Joins the parts of one row and head, first chunk first.
template <class T>
void join(const glimpse_decode_attention_params& p, const Plan& plan, int64_t row, int64_t head) {
  T* out = static_cast<T*>(p.out) + row * p.out_stride + head * p.out_head_stride;
  const int64_t chunks = (p.lengths[row] + kChunk - 1) / kChunk;
  if (chunks <= 0) return write_zeros(out, p.v_dim);
  float* total = plan.part(row * p.q_heads + head, 0);
  float top = total[plan.columns];
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {
    const float other = plan.part(row * p.q_heads + head, chunk)[plan.columns];
    top = other > top ? other : top;
  }
  const float shift = top == -__builtin_inff() ? 0.0f : top;
  float sum = 0.0f;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const float* part = plan.part(row * p.q_heads + head, chunk);
    const float factor = __builtin_exp2f((part[plan.columns] - shift) * plan.scale.factor);
    sum += part[plan.columns + 1] * factor;
    for (int64_t column = 0; column < plan.columns; column += kLanes) {
      const vf scaled = load(part + column) * factor;
      store(total + column, chunk == 0 ? scaled : load(total + column) + scaled);
    }
  }
  write_row(out, total, p.v_dim, 1.0f / sum);  // a row whose logits are all -inf has no softmax: NaN
}

template <class T>
glimpse_status run(const glimpse_decode_attention_params& p) {
  int64_t longest = 0;
  for (int64_t row = 0; row < p.batch; ++row) longest = larger<int64_t>(longest, p.lengths[row]);
  Plan plan;
  plan.group = p.q_heads / p.kv_heads;
  plan.chunks = (longest + kChunk - 1) / kChunk;
  plan.query_cells = cells_of<T>(p.dim);
  plan.columns = round_up(p.v_dim, kLanes);
  plan.scale = split_scale(p.scale);
  plan.part_size = plan.columns + kLanes;
  plan.parts = nullptr;
  bool short_of_memory = false;  // only ever set to true, by whichever thread
  if (plan.chunks > 0) {
    const int64_t floats = p.batch * p.q_heads * plan.chunks * plan.part_size;
    plan.parts = static_cast<float*>(aligned_alloc(64, static_cast<size_t>(round_up(floats * 4, 64))));
    if (plan.parts == nullptr) return fail(GLIMPSE_OUT_OF_MEMORY, "decode_attention: no memory for partial results");
    parallel_for(p.batch * p.kv_heads * plan.chunks, [&](int64_t task) {
      // the heads of a chunk one after the other: their keys are neighbours in memory
      const int64_t kv_head = task % p.kv_heads, part = task / p.kv_heads;
      if (!run_chunk<T>(p, plan, part / plan.chunks, kv_head, part % plan.chunks))
        __atomic_store_n(&short_of_memory, true, __ATOMIC_RELAXED);
    });
  }
  if (!short_of_memory) {
    // a few hundred values a head: worth other threads only for larger batches
    parallel_range(p.batch * p.q_heads, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) join<T>(p, plan, i / p.q_heads, i % p.q_heads);
    });
  }
  free(plan.parts);
  return short_of_memory ? fail(GLIMPSE_OUT_OF_MEMORY, "decode_attention: no scratch memory") : GLIMPSE_OK;
}

}  // namespace

glimpse_status decode_attention(const glimpse_decode_attention_params& p) {
  for (int64_t row = 0; row < p.batch; ++row) {
    const int64_t length = p.lengths[row];
    if (length < 0 || length > p.max_blocks * p.block_size)
      return fail(GLIMPSE_INVALID,
                  "decode_attention: lengths[%lld]: expected 0 to %lld (max_blocks * block_size), found %lld",
                  static_cast<long long>(row), static_cast<long long>(p.max_blocks * p.block_size),
                  static_cast<long long>(length));
    for (int64_t i = 0; i * p.block_size < length; ++i) {
      const int32_t block = p.block_table[row * p.table_stride + i];
      if (block < 0 || block >= p.blocks)
        return fail(GLIMPSE_INVALID, "decode_attention: block_table[%lld, %lld]: expected a block in [0, %lld), found %d",
                    static_cast<long long>(row), static_cast<long long>(i), static_cast<long long>(p.blocks), block);
    }
  }
  if (p.q_heads == 0 || p.v_dim == 0) return GLIMPSE_OK;  // nothing to write
  return p.dtype == GLIMPSE_BFLOAT16 ? run<bf16>(p) : run<float>(p);
}

}  // namespace glimpse::GLIMPSE_ISA_NS

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
// Keys and values (elements) of a whole call up to which one thread does it: waking a second costs as much.
constexpr int64_t kOneThread = 65536;
// Query heads a key head up to which keys and values are read in place: packing them pays only for more rows.
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

#if defined(__AVX512F__)

// ---- a chunk where its keys and values lie -------------------------------------------------------------------------
// Four query heads at a time share every vector of a key and of a value that is loaded, and the logits of a whole chunk are
// there before its softmax, so that nothing is rescaled.

constexpr int64_t kHeads = 4;  // query heads of a tile
constexpr int kAhead = 40;  // keys that are asked for before they are needed

template <class T>
GLIMPSE_INLINE void prefetch_row(const T* row, int64_t elements) {
  for (int64_t b = 0; b < elements * static_cast<int64_t>(sizeof(T)); b += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(row) + b, 0, 2);
}

// Logits of all heads (`heads` rows of `dim` elements at `query`, a multiple of kHeads), kChunk a head.
template <class T>
void score_chunk(const T* const* keys, const T* const* values, int count, const T* query, int64_t heads, int64_t dim,
                 int64_t v_dim, float* logits) {
  for (int key = 0; key < smaller(kAhead, count); ++key) prefetch_row(keys[key], dim);
  for (int key = 0; key < count; key += 4) {
    const T* tile[4];
    for (int j = 0; j < 4; ++j) {
      const int here = smaller(key + j, count - 1), ahead = key + j + kAhead;
      tile[j] = keys[here];
      if (ahead < count) prefetch_row(keys[ahead], dim);
      prefetch_row(values[here], v_dim);
    }
    for (int64_t head = 0; head < heads; head += kHeads) {
      const T* rows[4];
      for (int i = 0; i < 4; ++i) rows[i] = query + (head + i) * dim;
      const vf found = dot_tile(rows, tile, dim);
      float* to = logits + head * kChunk + key;
      _mm_storeu_ps(to, _mm512_extractf32x4_ps(found, 0));
      _mm_storeu_ps(to + kChunk, _mm512_extractf32x4_ps(found, 1));
      _mm_storeu_ps(to + 2 * kChunk, _mm512_extractf32x4_ps(found, 2));
      _mm_storeu_ps(to + 3 * kChunk, _mm512_extractf32x4_ps(found, 3));
    }
  }
}

// Turns the first `count` logits of a head into weights, in place (bf16 pairs take half the room); zero up to the next
// multiple of kLanes. Returns their sum, and the largest logit in *top (a NaN does not count, it reaches the sum).
template <class T>
float weigh_chunk(float* row, int count, float factor, float* top) {
  const int vectors = (count + kLanes - 1) / kLanes;
  const vf nothing = splat(-__builtin_inff());
  vf best = nothing;
  const vi last = lane_index() + splat_i((vectors - 1) * kLanes) < splat_i(count);
  store(row + (vectors - 1) * kLanes, select(last, load(row + (vectors - 1) * kLanes), nothing));
  for (int j = 0; j < vectors; ++j) best = vmax(load(row + j * kLanes), best);  // in this order a NaN is passed over
  *top = hmax(best);
  const vf shift = splat(*top == -__builtin_inff() ? 0.0f : *top), scale = splat(factor);
  vf total{};
  for (int j = 0; j < vectors; ++j) {
    const vf w = weight_exp2<kPairs<T>>((load(row + j * kLanes) - shift) * scale);
    total = total + w;
    if constexpr (kPairs<T>)
      store_weights_bf16(row, j, w);
    else
      store_weights(row, j, w);
  }
  return hsum(total);
}

// sum[head][vector] += the weighted cells of `column` .. of one step: a key, or two of which the second may be missing.
// Vectors 2 i and 2 i + 1 of a pair step hold the columns of two loads interleaved by quarters (see natural_order).
template <class T, int vectors>
GLIMPSE_INLINE void add_step(const T* row, const T* second, int64_t column, int64_t v_dim, const float* weights,
                             vf (*sum)[vectors]) {
  vf x[vectors];
  if constexpr (kPairs<T>) {
#pragma GCC unroll 4
    for (int i = 0; i < vectors; i += 2) {
      const __m512i a = reinterpret_cast<__m512i>(load_cells(row, column + i * kLanes, v_dim));
      const __m512i b = second == nullptr ? __m512i{} : reinterpret_cast<__m512i>(load_cells(second, column + i * kLanes, v_dim));
      x[i] = reinterpret_cast<vf>(_mm512_unpacklo_epi16(a, b));
      x[i + 1] = reinterpret_cast<vf>(_mm512_unpackhi_epi16(a, b));
    }
  } else {
#pragma GCC unroll 4
    for (int i = 0; i < vectors; ++i) x[i] = load_cells(row, column + i * kLanes, v_dim);
  }
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) {
    const vf w = _mm512_set1_ps(weights[h * kChunk]);
#pragma GCC unroll 4
    for (int i = 0; i < vectors; ++i) sum[h][i] = multiply_add_cells<T>(w, x[i], sum[h][i]);
  }
}

// to[h][column ..] = sum over the keys of weight * value for `heads` <= kHeads heads. Of `vectors` * kLanes columns those
// past v_dim read as 0; the room of a result ends at `room` columns.
template <class T, int vectors>
void sum_values(const T* const* rows, int count, int64_t column, int64_t v_dim, const float* weights, int64_t heads,
                float* to, int64_t to_stride, int64_t room) {
  constexpr int kStep = kPairs<T> ? 2 : 1;
  vf sum[kHeads][vectors] = {};
  int key = 0;
  if (column + vectors * kLanes <= v_dim) {
    // the same end for all loads, known to lie behind them
    const int64_t end = column + vectors * kLanes;
    for (; key + kStep <= count; key += kStep)
      add_step<T, vectors>(rows[key], rows[key + kStep - 1], column, end, weights + key / kStep, sum);
  }
  for (; key < count; key += kStep)
    add_step<T, vectors>(rows[key], key + 1 < count ? rows[key + 1] : nullptr, column, v_dim, weights + key / kStep, sum);
  for (int64_t h = 0; h < heads; ++h) {
    if constexpr (kPairs<T>) {
      for (int i = 0; i < vectors; i += 2) {  // quarters a0 b0 a1 b1 and a2 b2 a3 b3 of the two
        const vf front = _mm512_shuffle_f32x4(sum[h][i], sum[h][i + 1], 0x44);
        const vf back = _mm512_shuffle_f32x4(sum[h][i], sum[h][i + 1], 0xee);
        sum[h][i] = _mm512_shuffle_f32x4(front, front, 0xd8);
        sum[h][i + 1] = _mm512_shuffle_f32x4(back, back, 0xd8);
      }
    }
    for (int i = 0; i < vectors && column + i * kLanes < room; ++i)
      store(to + h * to_stride + column + i * kLanes, sum[h][i]);
  }
}

// Bytes of scratch memory of a chunk.
template <class T>
GLIMPSE_INLINE size_t chunk_bytes(int64_t group, int64_t dim) {
  const size_t heads = static_cast<size_t>(round_up(group, kHeads));
  return heads * (static_cast<size_t>(dim) * sizeof(T) + sizeof(float) * kChunk) + 64;
}

// All query heads of a key head against the keys of one chunk. part(r): where the result of head r goes.
template <class T>
bool attend_chunk(const glimpse_decode_attention_params& p, const Plan& plan, int64_t row, int64_t kv_head, int64_t chunk,
                  const T* const* keys, const T* const* values, int count) {
  const int64_t heads = round_up(plan.group, kHeads);
  float* logits = static_cast<float*>(thread_scratch(chunk_bytes<T>(plan.group, p.dim)));
  if (logits == nullptr) return false;
  T* query = reinterpret_cast<T*>(logits + heads * kChunk);
  for (int64_t r = 0; r < heads; ++r) {
    if (r < plan.group) {
      const T* from = static_cast<const T*>(p.q) + row * p.q_stride + (kv_head * plan.group + r) * p.q_head_stride;
      if (plan.scale.sign == 1.0f)
        memcpy(query + r * p.dim, from, sizeof(T) * static_cast<size_t>(p.dim));
      else
        for (int64_t d = 0; d < p.dim; ++d) put(query + r * p.dim + d, to_float(from[d]) * plan.scale.sign);
    } else {
      memset(query + r * p.dim, 0, sizeof(T) * static_cast<size_t>(p.dim));
    }
  }
  score_chunk(keys, values, count, query, heads, p.dim, p.v_dim, logits);
  for (int64_t r = 0; r < plan.group; ++r) {
    float* part = plan.part(row * p.q_heads + kv_head * plan.group + r, chunk);
    part[plan.columns + 1] = weigh_chunk<T>(logits + r * kChunk, count, plan.scale.factor, part + plan.columns);
  }
  const int64_t stride = plan.chunks * plan.part_size;  // from head to head
  float* parts = plan.part(row * p.q_heads + kv_head * plan.group, chunk);
  constexpr int kFew = kPairs<T> ? 2 : 1;
  for (int64_t column = 0; column < plan.columns;) {
    const bool wide = plan.columns - column >= 4 * kLanes;
    for (int64_t r = 0; r < plan.group; r += kHeads) {
      const int64_t some = smaller(kHeads, plan.group - r);
      if (wide)
        sum_values<T, 4>(values, count, column, p.v_dim, logits + r * kChunk, some, parts + r * stride, stride, plan.columns);
      else
        sum_values<T, kFew>(values, count, column, p.v_dim, logits + r * kChunk, some, parts + r * stride, stride,
                            plan.columns);
    }
    column += (wide ? 4 : kFew) * kLanes;
  }
  return true;
}

#else

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

#endif

// ---- tasks ---------------------------------------------------------------------------------------------------------

template <class T>
bool run_chunk(const glimpse_decode_attention_params& p, const Plan& plan, int64_t row, int64_t kv_head, int64_t chunk) {
  const int64_t begin = chunk * kChunk, end = smaller<int64_t>(begin + kChunk, p.lengths[row]);
  if (begin >= end) return true;
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
#if defined(__AVX512F__)
  return attend_chunk(p, plan, row, kv_head, chunk, key_rows, value_rows, static_cast<int>(end - begin));
#else
  char* memory = static_cast<char*>(thread_scratch(core_bytes(plan.group, plan.query_cells, plan.columns)));
  if (memory == nullptr) return false;
  float *packed_keys, *packed_values;
  Rows rows = lay_out<T>(memory, plan.group, plan.query_cells, plan.columns, &packed_keys, &packed_values);
  for (int64_t r = 0; r < plan.group; ++r) {
    pack_query(static_cast<const T*>(p.q) + row * p.q_stride + (kv_head * plan.group + r) * p.q_head_stride, p.dim,
               plan.scale.sign, rows.query + r * rows.query_cells);
    rows.limit[r] = static_cast<int32_t>(end);
  }
  for (int64_t key = begin; key < end; key += kKeys) {
    const int tile = static_cast<int>(smaller<int64_t>(kKeys, end - key));
    const int next = static_cast<int>(smaller<int64_t>(kKeys, end - key - tile));
    prefetch_rows(key_rows + (key - begin) + tile, next, p.dim);
    if (plan.group <= kDirectRows) {
      prefetch_rows(value_rows + (key - begin) + tile, next, p.v_dim);
      attend_in_place(rows, key_rows + (key - begin), value_rows + (key - begin), p.dim, p.v_dim, key, tile,
                      plan.scale.factor);
      continue;
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
#endif
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
  int64_t longest = 0, total = 0;  // keys
  for (int64_t row = 0; row < p.batch; ++row) {
    longest = larger<int64_t>(longest, p.lengths[row]);
    total += p.lengths[row];
  }
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
    auto task_body = [&](int64_t task) {
      // the heads of a chunk one after the other: their keys are neighbours in memory
      const int64_t kv_head = task % p.kv_heads, part = task / p.kv_heads;
      if (!run_chunk<T>(p, plan, part / plan.chunks, kv_head, part % plan.chunks))
        __atomic_store_n(&short_of_memory, true, __ATOMIC_RELAXED);
    };
    const int64_t tasks = p.batch * p.kv_heads * plan.chunks;
    if (total * p.kv_heads * (p.dim + p.v_dim) > kOneThread)
      parallel_for(tasks, task_body);
    else
      for (int64_t task = 0; task < tasks; ++task) task_body(task);
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

// SPDX-License-Identifier: Apache-2.0
// The inner part of both attention ops: a block of query rows of one key head against a run of keys, with the online
// softmax of FlashAttention-2 (Dao, arXiv:2307.08691, section 3.1).
//
// Both products are made of the register tiles of tiles.h. Keys are packed as B[dim][key], values as B[key][v_dim], both
// in cells. Packed tiles are zero past the last key and the last dimension, so nothing outside is ever read.
#pragma once

#include "cpu/tiles.h"

namespace glimpse::GLIMPSE_ISA_NS {
namespace {

// Keys of a packed tile.
constexpr int kKeys = 64;
constexpr int kKeyVectors = kKeys / kLanes;

// ---- packing -------------------------------------------------------------------------------------------------------

// Keys as B[cell of dim][key]: rows[0 .. count) are the key rows.
template <class T>
void pack_keys(const T* const* rows, int count, int64_t dim, float* packed) {
  for (int key = 0; key < kKeys; key += kLanes)
    pack_columns(rows + key, smaller(count - key, kLanes), dim, packed + key, kKeys);
}

// Values as B[cell of keys][v_dim], `columns` (v_dim rounded up to lanes) cells a row.
template <class T>
void pack_values(const T* const* rows, int count, int64_t v_dim, int64_t columns, float* packed) {
  if constexpr (kPairs<T>) {
    for (int key = 0; key < kKeys; key += 2, packed += columns) {
      int64_t column = 0;
      // a bf16 value widened to fp32 has its bits in the upper half
      if (key + 1 < count) {
        for (; column + kLanes <= v_dim; column += kLanes) {
          const vu first = as_vu(load(rows[key] + column)), second = as_vu(load(rows[key + 1] + column));
          store(packed + column, as_vf((first >> 16) | second));
        }
      }
      for (; column < columns; column += kLanes) {
        const int n = static_cast<int>(smaller<int64_t>(kLanes, v_dim - column));
        const vu first = key < count ? as_vu(load_n(rows[key] + column, n)) : vu{};
        const vu second = key + 1 < count ? as_vu(load_n(rows[key + 1] + column, n)) : vu{};
        store(packed + column, as_vf((first >> 16) | second));
      }
    }
  } else {
    for (int key = 0; key < kKeys; ++key, packed += columns) {
      for (int64_t column = 0; column < columns; column += kLanes) {
        const int64_t left = v_dim - column;
        vf x{};
        if (key < count)
          x = left >= kLanes ? load(rows[key] + column) : load_n(rows[key] + column, static_cast<int>(left));
        store(packed + column, x);
      }
    }
  }
}

// Asks for rows some time before they are packed. They lie far apart (all heads of a token are neighbours), so the
// hardware's own prefetcher does not see them coming.
template <class T>
GLIMPSE_INLINE void prefetch_rows(const T* const* rows, int count, int64_t elements) {
  const int64_t bytes = elements * static_cast<int64_t>(sizeof(T));
  for (int i = 0; i < count; ++i)
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(reinterpret_cast<const char*>(rows[i]) + b, 0, 2);
}

// One query row as cells; sign is -1, 0 or 1 (exact in every dtype).
template <class T>
void pack_query(const T* row, int64_t dim, float sign, float* cells) {
  if constexpr (kPairs<T>) {
    bf16* to = reinterpret_cast<bf16*>(cells);
    if (sign == 1.0f)
      memcpy(to, row, sizeof(bf16) * static_cast<size_t>(dim));
    else
      for (int64_t d = 0; d < dim; ++d) to[d] = to_bf16(to_float(row[d]) * sign);
    if (dim & 1) to[dim] = bf16{0};
  } else {
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) store(cells + d, load(row + d) * sign);
    if (d < dim) store_n(cells + d, load_n(row + d, static_cast<int>(dim - d)) * sign, static_cast<int>(dim - d));
  }
}

// ---- softmax -------------------------------------------------------------------------------------------------------

// 2^x for x <= 0 (or NaN, which stays): 0 below -126. `rough`: 3e-6 instead of 9e-8, for weights that become bf16.
template <bool rough>
GLIMPSE_INLINE vf weight_exp2(vf x) {
#if defined(__AVX512F__)
  const vf n = round_even(x);
  const vf f = x - n;
  const __mmask16 alive = _mm512_cmp_ps_mask(x, splat(-126.0f), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(alive, rough ? exp2_fraction_short(f) : exp2_fraction(f), n);
#else
  return vexp2(x);
#endif
}

GLIMPSE_INLINE void store_weights(float* cells, int vector, vf x) { store(cells + vector * kLanes, x); }
GLIMPSE_INLINE void store_weights_bf16(float* cells, int vector, vf x) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh(x);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(cells) + vector, reinterpret_cast<__m256i>(half));
#else
  (void)cells, (void)vector, (void)x;
#endif
}

// State of the query rows of one task. All pointers into scratch memory.
struct Rows {
  float* query;    // [count][query_cells]
  float* result;   // [count][columns], not yet divided by the sum
  float* sum;      // [count][kLanes], lane sums of the weights
  float* top;      // [count], largest logit so far, before the factor; NaN does not count
  float* keep;     // [count], factor of the last rescaling
  int32_t* limit;  // [count], number of keys the row sees
  bool* started;   // [count]: for the first row of a tile, whether the tile's results hold anything (then all of them do)
  int64_t count, query_cells, columns;
};

// Bytes of scratch memory for `rows` query rows and a packed tile of keys and values.
GLIMPSE_INLINE size_t core_bytes(int64_t rows, int64_t query_cells, int64_t columns) {
  const int64_t floats = (query_cells + columns) * kKeys + rows * (query_cells + columns + kLanes + 4);
  return static_cast<size_t>(floats * 4 + 9 * 64);
}

// Lays `memory` (core_bytes) out for `count` rows.
template <class T>
Rows lay_out(char* memory, int64_t count, int64_t query_cells, int64_t columns, float** keys, float** values) {
  auto take = [&](int64_t floats) {
    float* taken = reinterpret_cast<float*>(memory);
    memory += round_up(floats * 4, 64);
    return taken;
  };
  Rows rows;
  rows.count = count;
  rows.query_cells = query_cells;
  rows.columns = columns;
  *keys = take(query_cells * kKeys);
  *values = take(columns * kKeys);
  rows.query = take(count * query_cells);
  rows.result = take(count * columns);
  rows.sum = take(count * kLanes);
  rows.top = take(count);
  rows.keep = take(count);
  rows.limit = reinterpret_cast<int32_t*>(take(count));
  rows.started = reinterpret_cast<bool*>(take(count));
  for (int64_t r = 0; r < count; ++r) {
    rows.top[r] = -__builtin_inff();
    rows.started[r] = false;
    store(rows.sum + r * kLanes, vf{});
  }
  return rows;
}

// Turns the logits of `height` rows (at `logits`, kKeys a row) into weights and moves the rows' state on. `vectors`: lane
// vectors with a visible key. masked: some row does not see the whole tile.
template <class T, bool masked>
GLIMPSE_INLINE void softmax_tile(Rows& rows, int64_t first, int height, const float* logits, float* weights,
                                 int64_t weights_stride, int vectors, int64_t key, float factor) {
  for (int i = 0; i < height; ++i) {
    const float* row = logits + i * kKeys;
    vf x[kKeyVectors];
    const int32_t seen = masked ? static_cast<int32_t>(rows.limit[first + i] - key) : kKeys;
    vf best = splat(-__builtin_inff());
#pragma GCC unroll 16
    for (int j = 0; j < kKeyVectors; ++j) {
      if (masked && j >= vectors) break;
      x[j] = load(row + j * kLanes);
      if (masked) x[j] = select(lane_index() + splat_i(j * kLanes) < splat_i(seen), x[j], splat(-__builtin_inff()));
      best = vmax(x[j], best);  // in this order a NaN is passed over; it reaches the sum through its weight
    }
    const float before = rows.top[first + i];
    const float here = hmax(best);
    float top = here > before ? here : before;
    rows.top[first + i] = top;
    const float keep = before == top ? 1.0f : before == -__builtin_inff() ? 0.0f : __builtin_exp2f((before - top) * factor);
    rows.keep[first + i] = keep;
    if (top == -__builtin_inff()) top = 0.0f;  // only -inf so far: all weights are exp2(-inf)
    vf total = load(rows.sum + (first + i) * kLanes) * keep;
    // The difference comes first: it is exactly 0 for the largest logit, however large that is.
    const vf shift = splat(top), scale = splat(factor);
    float* to = weights + i * weights_stride;
#pragma GCC unroll 16
    for (int j = 0; j < kKeyVectors; ++j) {
      if (masked && j >= vectors) break;
      const vf w = weight_exp2<kPairs<T>>((x[j] - shift) * scale);
      total = total + w;
      if constexpr (kPairs<T>)
        store_weights_bf16(to, j, w);
      else
        store_weights(to, j, w);
    }
    store(rows.sum + (first + i) * kLanes, total);
  }
}

// Brings `count` keys, packed in `keys` and `values`, into the state of all rows. `key`: index of the first of them.
template <class T>
void attend(Rows& rows, const float* keys, const float* values, int64_t key, int count, float factor) {
  float logits[kTileRows * kKeys] __attribute__((aligned(64)));
  float weights[kTileRows * kKeys] __attribute__((aligned(64)));
  constexpr int64_t kWeightCells = kPairs<T> ? kKeys / 2 : kKeys;
  const int64_t tiles = (rows.count + kTileRows - 1) / kTileRows;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = rows.count * tile / tiles;
    const int height = static_cast<int>(rows.count * (tile + 1) / tiles - first);
    int32_t least = rows.limit[first], most = least;
    for (int i = 1; i < height; ++i) {
      least = smaller(least, rows.limit[first + i]);
      most = larger(most, rows.limit[first + i]);
    }
    const int64_t seen = smaller<int64_t>(count, most - key);
    if (seen <= 0) continue;
    const int vectors = static_cast<int>((seen + kLanes - 1) / kLanes);
    multiply<T>({bytes_of(rows.query + first * rows.query_cells), rows.query_cells * 4, keys, kKeys, rows.query_cells,
                 nullptr, logits, kKeys},
                height, vectors);
    if (least - key >= kKeys)
      softmax_tile<T, false>(rows, first, height, logits, weights, kWeightCells, kKeyVectors, key, factor);
    else
      softmax_tile<T, true>(rows, first, height, logits, weights, kWeightCells, vectors, key, factor);
    const int64_t steps = kPairs<T> ? vectors * (kLanes / 2) : vectors * kLanes;
    multiply<T>({bytes_of(weights), kWeightCells * 4, values, rows.columns, steps,
                 rows.started[first] ? rows.keep + first : nullptr, rows.result + first * rows.columns, rows.columns},
                height, rows.columns / kLanes);
    rows.started[first] = true;
  }
}

// Sum of the weights of row r; 0 only if it has seen no key, or logits of -inf only (the largest weight is 1).
GLIMPSE_INLINE float weight_sum(const Rows& rows, int64_t r) {
  return hsum(load(rows.sum + r * kLanes));
}

// out[0 .. v_dim) = result row * factor, rounded to T.
template <class T>
GLIMPSE_INLINE void write_row(T* out, const float* result, int64_t v_dim, float factor) {
  int64_t d = 0;
#if defined(__AVX512BF16__)
  if constexpr (kPairs<T>) {  // one instruction; it turns results below 1e-38 into 0, and NaN into a quiet NaN
    for (; d + kLanes <= v_dim; d += kLanes) {
      const __m256bh half = _mm512_cvtneps_pbh(load(result + d) * factor);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + d), reinterpret_cast<__m256i>(half));
    }
  }
#endif
  for (; d + kLanes <= v_dim; d += kLanes) store(out + d, load(result + d) * factor);
  if (d < v_dim) store_n(out + d, load_n(result + d, static_cast<int>(v_dim - d)) * factor, static_cast<int>(v_dim - d));
}

template <class T>
GLIMPSE_INLINE void write_zeros(T* out, int64_t v_dim) {
  for (int64_t d = 0; d < v_dim; ++d) put(out + d, 0.0f);
}

// scale * log2(e) as sign * factor: the sign goes into the queries (exact), so that the largest logit stays the largest.
struct Scale {
  float sign, factor;
};

GLIMPSE_INLINE Scale split_scale(float scale) {
  constexpr float kLog2E = 1.44269504088896340736f;
  if (scale == 0.0f) return {0.0f, 1.0f};
  return {scale > 0.0f ? 1.0f : -1.0f, __builtin_fabsf(scale) * kLog2E};
}

}  // namespace
}  // namespace glimpse::GLIMPSE_ISA_NS

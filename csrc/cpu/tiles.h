// SPDX-License-Identifier: Apache-2.0
// Register tiles of a matrix product C[rows, columns] += A[rows, steps] B[steps, columns], of cells (cells.h), with A read
// by broadcast and B packed so that its columns are vector lanes.
#pragma once

#include "cpu/cells.h"

namespace glimpse::GLIMPSE_ISA_NS {
namespace {

// Row and column vectors of one register tile.
#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTileVectors = 4;
#else
constexpr int kTileRows = 6, kTileVectors = 2;
#endif

// ---- packing -------------------------------------------------------------------------------------------------------

// Lane patterns of one step of the butterfly transpose: blocks of `bit` lanes change places between rows i and i + bit.
constexpr int low_lane(int lane, int bit) { return lane & bit ? kLanes + (lane ^ bit) : lane; }
constexpr int high_lane(int lane, int bit) { return lane & bit ? kLanes + lane : lane | bit; }

template <int bit>
GLIMPSE_INLINE void swap_blocks(vf& a, vf& b) {
#if defined(__AVX512F__)
#define GLIMPSE_LANES(f)                                                                                         \
  {                                                                                                              \
    f(0, bit), f(1, bit), f(2, bit), f(3, bit), f(4, bit), f(5, bit), f(6, bit), f(7, bit), f(8, bit), f(9, bit), \
        f(10, bit), f(11, bit), f(12, bit), f(13, bit), f(14, bit), f(15, bit)                                   \
  }
#elif defined(__AVX2__)
#define GLIMPSE_LANES(f) \
  { f(0, bit), f(1, bit), f(2, bit), f(3, bit), f(4, bit), f(5, bit), f(6, bit), f(7, bit) }
#else
#define GLIMPSE_LANES(f) \
  { f(0, bit), f(1, bit), f(2, bit), f(3, bit) }
#endif
#if defined(__clang__)
  // one pattern a step, spelled as loops: clang's shuffle needs literal indices
  vf low, high;
  for (int lane = 0; lane < kLanes; ++lane) {
    low[lane] = lane & bit ? b[lane ^ bit] : a[lane];
    high[lane] = lane & bit ? b[lane] : a[lane | bit];
  }
#else
  const vi low_lanes = GLIMPSE_LANES(low_lane), high_lanes = GLIMPSE_LANES(high_lane);
  const vf low = __builtin_shuffle(a, b, low_lanes), high = __builtin_shuffle(a, b, high_lanes);
#endif
#undef GLIMPSE_LANES
  a = low;
  b = high;
}

template <int bit>
GLIMPSE_INLINE void transpose_step(vf* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & bit)) swap_blocks<bit>(rows[i], rows[i | bit]);
}

GLIMPSE_INLINE void transpose(vf* rows) {
  transpose_step<1>(rows);
  transpose_step<2>(rows);
  if constexpr (kLanes > 4) transpose_step<4>(rows);
  if constexpr (kLanes > 8) transpose_step<8>(rows);
}

// Weight or key rows as columns: cells of rows[0 .. count) (count <= kLanes), elements [0, depth), become lanes 0 ..
// kLanes-1 of a packed block with `stride` cells a step. Lanes past `count` and the odd half of the last cell are zero.
template <class T>
void pack_columns(const T* const* rows, int count, int64_t depth, float* packed, int64_t stride) {
  constexpr int kElements = kPairs<T> ? 2 * kLanes : kLanes;  // of a vector of cells
  const int64_t cells = cells_of<T>(depth);
  if (count <= 0) {
    for (int64_t cell = 0; cell < cells; ++cell) store(packed + cell * stride, vf{});
    return;
  }
  for (int64_t cell = 0; cell < cells; cell += kLanes) {
    const int64_t element = cell / kLanes * kElements;
    vf block[kLanes];
    if (count >= kLanes && element + kElements <= depth) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = load_cells(rows[i], element, element + kElements);
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = i < count ? load_cells(rows[i], element, depth) : vf{};
    }
    transpose(block);
    float* to = packed + cell * stride;
    const int64_t present = cells - cell;
    if (present >= kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(to + i * stride, block[i]);
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        if (i < present) store(to + i * stride, block[i]);
    }
  }
}

// ---- products ------------------------------------------------------------------------------------------------------

// Operands of one product of `height` rows: C = A B, or keep[row] * C + A B. A holds cells, its rows lie `a_stride` bytes
// apart (pairs at any even address).
struct Product {
  const char* a;
  int64_t a_stride;
  const float* b;
  int64_t b_stride, steps;
  const float* keep;
  float* c;
  int64_t c_stride;
  bool add = false;  // C + A B: the product is summed by itself first, which keeps long sums exact
};

GLIMPSE_INLINE const char* bytes_of(const float* cells) { return reinterpret_cast<const char*>(cells); }

// Puts the sums of a tile back into C. A sink gets vectors column .. column + width of row `row`, counted from p.c.
struct ToSums {
  template <int width>
  __attribute__((always_inline)) void put(const Product& p, int row, int64_t column, const vf (&sum)[width]) const {
#pragma GCC unroll 8
    for (int j = 0; j < width; ++j) store(p.c + row * p.c_stride + column + j * kLanes, sum[j]);
  }
};

template <class T, int height, int width, class Sink>
void multiply_tile(const Product& p, int64_t column, const Sink& sink) {
  const char* a = p.a;
  const float* b = p.b + column;
  const int64_t a_stride = p.a_stride, b_stride = p.b_stride;
  vf sum[height][width];
#pragma GCC unroll 8
  for (int i = 0; i < height; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < width; ++j)
      sum[i][j] = p.keep == nullptr ? vf{} : load(p.c + i * p.c_stride + column + j * kLanes) * p.keep[i];
  for (int64_t step = 0; step < p.steps; ++step) {
    vf columns[width];
#pragma GCC unroll 8
    for (int j = 0; j < width; ++j) columns[j] = load(b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < height; ++i) {
      const vf x = splat_cell(a + i * a_stride);
#pragma GCC unroll 8
      for (int j = 0; j < width; ++j) sum[i][j] = multiply_add_cells<T>(x, columns[j], sum[i][j]);
    }
    a += 4;
    b += b_stride;
  }
  if (p.add) {
#pragma GCC unroll 8
    for (int i = 0; i < height; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < width; ++j) sum[i][j] += load(p.c + i * p.c_stride + column + j * kLanes);
  }
#pragma GCC unroll 8
  for (int i = 0; i < height; ++i) sink.put(p, i, column, sum[i]);
}

template <class T, int height, class Sink>
void multiply_rows(const Product& p, int64_t vectors, const Sink& sink) {
  // all columns in near-equal parts of at most kTileVectors
  int64_t column = 0;
  for (int64_t parts = (vectors + kTileVectors - 1) / kTileVectors; parts > 0; --parts) {
    const int64_t width = (vectors + parts - 1) / parts;
    switch (width) {
      case 1:
        multiply_tile<T, height, 1>(p, column, sink);
        break;
      case 2:
        multiply_tile<T, height, 2>(p, column, sink);
        break;
#if defined(__AVX512F__)
      case 3:
        multiply_tile<T, height, 3>(p, column, sink);
        break;
      case 4:
        multiply_tile<T, height, 4>(p, column, sink);
        break;
#endif
    }
    vectors -= width;
    column += width * kLanes;
  }
}

// Any 1 .. kTileRows rows, `width` column vectors.
template <class T, int width, class Sink>
void multiply_whole(const Product& p, int height, const Sink& sink) {
  switch (height) {
    case 1:
      return multiply_tile<T, 1, width>(p, 0, sink);
    case 2:
      return multiply_tile<T, 2, width>(p, 0, sink);
    case 3:
      return multiply_tile<T, 3, width>(p, 0, sink);
    case 4:
      return multiply_tile<T, 4, width>(p, 0, sink);
    case 5:
      return multiply_tile<T, 5, width>(p, 0, sink);
    case 6:
      return multiply_tile<T, 6, width>(p, 0, sink);
  }
}

// Any 1 .. kTileRows rows, any number of column vectors.
template <class T, class Sink = ToSums>
void multiply(const Product& p, int height, int64_t vectors, const Sink& sink = Sink()) {
  switch (height) {
    case 1:
      return multiply_rows<T, 1>(p, vectors, sink);
    case 2:
      return multiply_rows<T, 2>(p, vectors, sink);
    case 3:
      return multiply_rows<T, 3>(p, vectors, sink);
    case 4:
      return multiply_rows<T, 4>(p, vectors, sink);
    case 5:
      return multiply_rows<T, 5>(p, vectors, sink);
    case 6:
      return multiply_rows<T, 6>(p, vectors, sink);
  }
}

}  // namespace
}  // namespace glimpse::GLIMPSE_ISA_NS

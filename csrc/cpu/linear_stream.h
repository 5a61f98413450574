// SPDX-License-Identifier: Apache-2.0
// Few rows of x: the weights are read once, where they lie, and multiplied as dot products. The time is that of reading.
#pragma once

#include "cpu/linear_panels.h"

namespace glimpse::GLIMPSE_ISA_NS {
namespace {

// Up to this many rows weights are streamed: packing them would cost more than it saves.
constexpr int64_t kStreamedRows = 16;
constexpr int64_t kStreamedPanel = 256;  // columns, at most

// sums[i][j] = x_i . w_j over elements [begin, end), in lanes.
template <class T, int height, int width>
GLIMPSE_INLINE void accumulate(const WeightRows<T>& w, const T* x, int64_t x_stride, int64_t begin, int64_t end,
                               vf (&sum)[height][width]) {
  constexpr int kStep = kPairs<T> ? 2 * kLanes : kLanes;
  int64_t d = begin;
  for (; d + kStep <= end; d += kStep) {
    vf row[width];
#pragma GCC unroll 8
    for (int j = 0; j < width; ++j) {
      __builtin_prefetch(w.row(j) + d + kAhead / static_cast<int64_t>(sizeof(T)), 0, 3);
      row[j] = load_cells(w.row(j), d, d + kStep);
    }
#pragma GCC unroll 8
    for (int i = 0; i < height; ++i) {
      const vf cells = load_cells(x + i * x_stride, d, d + kStep);
#pragma GCC unroll 8
      for (int j = 0; j < width; ++j) sum[i][j] = multiply_add_cells<T>(cells, row[j], sum[i][j]);
    }
  }
  if (d < end) {
#pragma GCC unroll 8
    for (int i = 0; i < height; ++i) {
      const vf cells = load_cells(x + i * x_stride, d, end);
#pragma GCC unroll 8
      for (int j = 0; j < width; ++j)
        sum[i][j] = multiply_add_cells<T>(cells, load_cells(w.row(j), d, end), sum[i][j]);
    }
  }
}

template <class T, int height, int width>
GLIMPSE_INLINE void accumulate(const WeightRows<int8_t>& w, const T* x, int64_t x_stride, int64_t begin, int64_t end,
                               vf (&sum)[height][width]) {
  int64_t d = begin;
  for (; d + kLanes <= end; d += kLanes) {
    vf row[width];
#pragma GCC unroll 8
    for (int j = 0; j < width; ++j) {
      if ((d & 63) == 0) __builtin_prefetch(w.row(j) + d + kAhead, 0, 3);
      row[j] = load_int8(w.row(j) + d);
    }
#pragma GCC unroll 8
    for (int i = 0; i < height; ++i) {
      const vf cells = load(x + i * x_stride + d);
#pragma GCC unroll 8
      for (int j = 0; j < width; ++j) sum[i][j] = fma(cells, row[j], sum[i][j]);
    }
  }
  if (d < end) {
    const int n = static_cast<int>(end - d);
#pragma GCC unroll 8
    for (int i = 0; i < height; ++i) {
      const vf cells = load_n(x + i * x_stride + d, n);
#pragma GCC unroll 8
      for (int j = 0; j < width; ++j) sum[i][j] = fma(cells, load_int8_n(w.row(j) + d, n), sum[i][j]);
    }
  }
}

// Sums of the lanes of four vectors.
GLIMPSE_INLINE void hsum4(const vf* x, float* sums) {
#if defined(__AVX2__)
  __m128 quarter[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
#if defined(__AVX512F__)
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x[j]), _mm512_extractf32x8_ps(x[j], 1));
#else
    const __m256 half = x[j];
#endif
    quarter[j] = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
  const __m128 low = _mm_hadd_ps(quarter[0], quarter[1]), high = _mm_hadd_ps(quarter[2], quarter[3]);
  _mm_storeu_ps(sums, _mm_hadd_ps(low, high));
#else
  for (int j = 0; j < 4; ++j) sums[j] = hsum(x[j]);
#endif
}

// Where the sums of a panel go: of row i and weight j to at[i * row + j * column].
struct Sums {
  float* at;
  int64_t row, column;
};

// Sums of `height` rows of x and `width` rows of the weight.
template <class T, class W, int height, int width>
void dots(const WeightRows<W>& w, const T* x, int64_t x_stride, int64_t depth, int64_t group, Sums sums) {
  vf total[height][width] = {};
  if (w.scales == nullptr) {
    accumulate<T, height, width>(w, x, x_stride, 0, depth, total);
  } else {
    for (int64_t begin = 0, g = 0; begin < depth; begin += group, ++g) {
      vf sum[height][width] = {};
      accumulate<T, height, width>(w, x, x_stride, begin, smaller(begin + group, depth), sum);
#pragma GCC unroll 8
      for (int j = 0; j < width; ++j) {
        const vf scale = splat(w.scales[j * w.scale_stride + g]);
#pragma GCC unroll 8
        for (int i = 0; i < height; ++i) total[i][j] = fma(sum[i][j], scale, total[i][j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < height; ++i) {
    float found[4];
    if constexpr (width == 4)
      hsum4(total[i], found);
    else
      for (int j = 0; j < width; ++j) found[j] = hsum(total[i][j]);
    for (int j = 0; j < width; ++j) sums.at[i * sums.row + j * sums.column] = found[j];
  }
}

template <class T, class W, int width>
void dots_rows(const WeightRows<W>& w, const T* x, int64_t x_stride, int64_t rows, int64_t depth, int64_t group,
               Sums sums) {
  constexpr int kTall = sizeof(W) == 1 ? 2 : 4;
  int64_t r = 0;
  for (; r + kTall <= rows; r += kTall, sums.at += kTall * sums.row)
    dots<T, W, kTall, width>(w, x + r * x_stride, x_stride, depth, group, sums);
  if constexpr (kTall > 2)
    for (; r + 2 <= rows; r += 2, sums.at += 2 * sums.row)
      dots<T, W, 2, width>(w, x + r * x_stride, x_stride, depth, group, sums);
  for (; r < rows; ++r, sums.at += sums.row) dots<T, W, 1, width>(w, x + r * x_stride, x_stride, depth, group, sums);
}

// Rows of x from which on int8 weights are made plain once instead of once a row; the plain rows are rounded to T.
constexpr int64_t kPlainRows = 4;

// Sums of all rows of x and `width` weight rows. `plain`: room for `width` plain ones, or null.
template <class T, class W, int width>
GLIMPSE_INLINE void stream_some(const params& p, const WeightRows<W>& w, T* plain, Sums sums) {
  const T* x = static_cast<const T*>(p.x);
  if constexpr (sizeof(W) == 1) {
    if (plain != nullptr) {
      for (int j = 0; j < width; ++j)
        dequantize(w.row(j), w.scales + j * w.scale_stride, p.group, 0, p.depth, plain + j * p.depth);
      const WeightRows<T> rows{plain, p.depth, nullptr, 0};
      return dots_rows<T, T, width>(rows, x, p.x_stride, p.rows, p.depth, 0, sums);
    }
  }
  dots_rows<T, W, width>(w, x, p.x_stride, p.rows, p.depth, p.group, sums);
}

// Four runs of weight rows side by side: memory gives most when several long runs are read at a time.
template <class T, class W>
void stream_columns(const params& p, const part_t& part, int64_t first, int count, T* plain, float* sums) {
  const int run = count / 4;
  for (int c = 0; c < run; ++c)
    stream_some<T, W, 4>(p, rows_of<W>(p, part, first + c, run), plain, {sums + c, kStreamedPanel, run});
  for (int c = 4 * run; c < count; ++c)
    stream_some<T, W, 1>(p, rows_of<W>(p, part, first + c), plain, {sums + c, kStreamedPanel, 1});
}

template <class T, class W, glimpse_linear_epilogue epilogue>
glimpse_status stream(const params& p) {
  // Memory is read fastest in long runs, but every thread should have some, and none should wait long for the last one.
  int64_t columns = 0;
  for (int64_t i = 0; i < p.num_parts; ++i) columns += p.parts[i].cols;
  int64_t width = kStreamedPanel;
  while (width > 64 && columns < 2 * width * num_threads()) width /= 2;
  const Panels panels(p, width);
  const int64_t half = panels.width;
  // Less than this is not worth a thread's waking.
  constexpr int64_t kTaskBytes = 96 * 1024;
  const int64_t each = 1 + kTaskBytes / (width * p.depth * static_cast<int64_t>(sizeof(W)) + 1);
  const int64_t tasks = (panels.total + each - 1) / each;
  const size_t plain_bytes =
      sizeof(W) == 1 && p.rows >= kPlainRows ? 4 * sizeof(T) * static_cast<size_t>(p.depth) + 1 : 0;
  bool failed = false;
  parallel_for(tasks, [&](int64_t task) {
    T* plain = nullptr;
    if (plain_bytes > 0) {
      plain = static_cast<T*>(thread_scratch(plain_bytes));
      if (plain == nullptr) {
        __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
        return;
      }
    }
    float sums[kStreamedRows * kStreamedPanel];
    const int64_t last = smaller((task + 1) * each, panels.total);
    for (int64_t index = task * each; index < last; ++index) {
      const Panel panel = panels[index];
      stream_columns<T, W>(p, *panel.part, panel.first, panel.count, plain, sums);
      if (panel.second != nullptr)
        stream_columns<T, W>(p, *panel.second, panel.first, panel.count, plain, sums + half);
      const Results<T, epilogue> results{panel.out<T>(0), panel.part->out_stride, panel};
      results.write_all(sums, kStreamedPanel, half, p.rows);
    }
  });
  return failed ? fail(GLIMPSE_OUT_OF_MEMORY, "linear: no scratch memory") : GLIMPSE_OK;
}

}  // namespace
}  // namespace glimpse::GLIMPSE_ISA_NS

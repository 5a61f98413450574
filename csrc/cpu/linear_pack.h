// SPDX-License-Identifier: Apache-2.0
// Many rows of x: panels of the weight are packed into cache, by the layout of tiles.h, and multiplied in register tiles.
#pragma once

#include "cpu/linear_panels.h"

namespace glimpse::GLIMPSE_ISA_NS {
namespace {

constexpr int kPanel = kTileVectors * kLanes;  // columns of a packed panel
constexpr int64_t kCacheBytes = 384 * 1024;    // of the second-level cache that a task may count on

// Elements of x and weight multiplied before the sums are put down. Short in fp32, where the rounding of one long sum
// would show.
template <class T>
constexpr int64_t kDepth = sizeof(T) == 4 ? 256 : 1024;

template <class T>
void widen_rows(const T* x, int64_t stride, int64_t rows, int64_t depth, float* to) {
  for (int64_t r = 0; r < rows; ++r) {
    int64_t d = 0;
    for (; d + kLanes <= depth; d += kLanes) store(to + r * kDepth<T> + d, load(x + r * stride + d));
    if (d < depth) {
      const int n = static_cast<int>(depth - d);
      store_n(to + r * kDepth<T> + d, load_n(x + r * stride + d, n), n);
    }
  }
}

// bf16 that is not multiplied in pairs is widened first.
template <class T>
constexpr bool kWidened = sizeof(T) == 2 && !kPairs<T>;

// Elements [begin, end) of `count` weight rows from `first` on, as `columns` columns of a packed panel. Int8 weights
// become T on the way, through `plain` (kLanes rows of kDepth elements).
template <class T, class W>
void pack_part(const params& p, const part_t& part, int64_t first, int count, int64_t begin, int64_t end, T* plain,
               int columns, float* packed) {
  const WeightRows<W> w = rows_of<W>(p, part, first);
  for (int c = 0; c < columns; c += kLanes) {
    const T* rows[kLanes] = {};
    const int present = larger(0, smaller(kLanes, count - c));
    for (int j = 0; j < present; ++j) {
      if constexpr (sizeof(W) == 1) {
        rows[j] = plain + j * kDepth<T>;
        dequantize(w.row(c + j), w.scales + (c + j) * w.scale_stride, p.group, begin, end, plain + j * kDepth<T>);
      } else {
        rows[j] = w.row(c + j) + begin;
      }
    }
    pack_columns(rows, present, end - begin, packed + c, kPanel);
  }
}

// One depth block: rows of x against a packed panel. The sums go to `sums`, or, of the last block, to `results`; those of
// the blocks before are there unless it is the first one.
template <class T, class Results>
void multiply_panel(const char* a, int64_t a_stride, int64_t rows, int64_t depth, const float* packed, bool first,
                    bool last, float* sums, Results results) {
  const bool odd = kPairs<T> && (depth & 1) != 0;
  Product product{a, a_stride, packed, kPanel, kPairs<T> ? depth / 2 : depth, nullptr, sums, kPanel, !first};
  const Results all = results;
  for (int64_t r = 0; r < rows; r += kTileRows) {
    const int height = static_cast<int>(smaller<int64_t>(kTileRows, rows - r));
    if (last && !odd) {
      multiply_whole<T, kTileVectors>(product, height, results);
      results.out += kTileRows * results.stride;
    } else {
      multiply_whole<T, kTileVectors>(product, height, ToSums());
    }
    product.a += kTileRows * a_stride;
    product.c += kTileRows * kPanel;
  }
  if (!odd) return;
  // The last element has no partner in x, and what lies behind it is not ours to read.
  const float* cells = packed + depth / 2 * kPanel;
  for (int64_t r = 0; r < rows; ++r) {
    bf16 single;
    memcpy(&single, a + r * a_stride + (depth - 1) * 2, 2);
    const vf x = splat(to_float(single));
    for (int c = 0; c < kPanel; c += kLanes) {
      float* sum = sums + r * kPanel + c;
      store(sum, fma(x, as_vf(as_vu(load(cells + c)) << 16), load(sum)));
    }
  }
  if (last) all.write_all(sums, kPanel, kPanel / 2, rows);
}

// Sizes of a task: how much of x, of the packed panels and of the sums is in use at a time.
template <class T>
struct Blocking {
  int64_t depth;        // elements of a depth block
  int64_t high;         // rows of x
  int64_t wide;         // panels
  int64_t panel_cells;  // of a packed panel, all depths

  explicit Blocking(const params& p) {
    depth = smaller(p.depth, kDepth<T>);
    const int64_t x_bytes = larger<int64_t>(1, depth) * static_cast<int64_t>(kWidened<T> ? sizeof(float) : sizeof(T));
    const int64_t panel_bytes = larger<int64_t>(1, cells_of<T>(depth)) * kPanel * 4;
    high = round_up(larger<int64_t>(48, smaller<int64_t>(384, kCacheBytes / 2 / x_bytes)), kTileRows);
    wide = larger<int64_t>(1, smaller<int64_t>(8, kCacheBytes / panel_bytes));
    panel_cells = cells_of<T>(p.depth) * kPanel;
  }
};

template <class T, class W, glimpse_linear_epilogue epilogue>
glimpse_status pack(const params& p) {
  const Panels panels(p, kPanel);
  const int64_t half = panels.width;
  const Blocking<T> size(p);
  // A task packs its panels anew, so it should use them for many rows; but the last tasks must not keep a thread waiting.
  const int64_t groups = (panels.total + size.wide - 1) / size.wide;
  int64_t chunks = 1;
  while (groups * chunks < 8 * num_threads() && p.rows / (chunks + 1) >= 384) ++chunks;
  const int64_t packed_floats = round_up(size.panel_cells * size.wide, kLanes);
  const int64_t blocks = larger<int64_t>(1, (p.depth + kDepth<T> - 1) / kDepth<T>);
  const int64_t sums_floats = size.high * kPanel * size.wide;
  const int64_t wide_x_floats = kWidened<T> ? size.high * kDepth<T> : 0;
  const int64_t plain_floats = sizeof(W) == 1 ? kLanes * kDepth<T> : 0;
  const size_t bytes = sizeof(float) * static_cast<size_t>(packed_floats + sums_floats + wide_x_floats + plain_floats);
  bool failed = false;
  parallel_for(groups * chunks, [&](int64_t task) {
    float* const packed = static_cast<float*>(thread_scratch(bytes));
    if (packed == nullptr) {
      __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
      return;
    }
    float* const sums = packed + packed_floats;
    float* const wide_x = sums + sums_floats;
    T* const plain = reinterpret_cast<T*>(wide_x + wide_x_floats);
    const int64_t group = task / chunks, chunk = task % chunks;
    const int64_t from = group * panels.total / groups, count = (group + 1) * panels.total / groups - from;
    for (int64_t i = 0; i < count; ++i) {
      const Panel panel = panels[from + i];
      for (int64_t d = 0; d < p.depth; d += kDepth<T>) {
        const int64_t end = smaller(d + kDepth<T>, p.depth);
        float* at = packed + i * size.panel_cells + cells_of<T>(d) * kPanel;
        const int columns = panel.second == nullptr ? kPanel : kPanel / 2;
        pack_part<T, W>(p, *panel.part, panel.first, panel.count, d, end, plain, columns, at);
        if (panel.second != nullptr)
          pack_part<T, W>(p, *panel.second, panel.first, panel.count, d, end, plain, columns, at + half);
      }
    }
    const int64_t row_end = p.rows * (chunk + 1) / chunks;
    for (int64_t row = p.rows * chunk / chunks; row < row_end; row += size.high) {
      const int64_t rows = smaller(size.high, row_end - row);
      const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
      for (int64_t d = 0; d < blocks * kDepth<T>; d += kDepth<T>) {
        const int64_t depth = smaller(kDepth<T>, p.depth - d);
        const char* a = reinterpret_cast<const char*>(x + d);
        int64_t a_stride = p.x_stride * static_cast<int64_t>(sizeof(T));
        if constexpr (kWidened<T>) {
          widen_rows(x + d, p.x_stride, rows, depth, wide_x);
          a = reinterpret_cast<const char*>(wide_x);
          a_stride = kDepth<T> * static_cast<int64_t>(sizeof(float));
        }
        for (int64_t i = 0; i < count; ++i) {
          const Panel panel = panels[from + i];
          const Results<T, epilogue> results{panel.out<T>(row), panel.part->out_stride, panel};
          multiply_panel<T>(a, a_stride, rows, depth, packed + i * size.panel_cells + cells_of<T>(d) * kPanel, d == 0,
                            d + kDepth<T> >= p.depth, sums + i * size.high * kPanel, results);
        }
      }
    }
  });
  return failed ? fail(GLIMPSE_OUT_OF_MEMORY, "linear: no scratch memory") : GLIMPSE_OK;
}

}  // namespace
}  // namespace glimpse::GLIMPSE_ISA_NS

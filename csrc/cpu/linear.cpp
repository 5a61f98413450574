// SPDX-License-Identifier: Apache-2.0
// x weight^T with the weights where they lie, row by row.
//
// The columns of the result are cut into panels. For few rows of x a panel's weights are streamed once and multiplied as
// dot products: the time is that of reading them. For many rows they are packed into cache first, by the layout of
// tiles.h, and multiplied in register tiles. Either way a panel's sums land in a small fp32 block, which the epilogue
// turns into results. A panel of the gated epilogue is half gate, half up, so that both meet in one block.
#include "glimpse/linear.h"

#include "cpu/tiles.h"

namespace glimpse::GLIMPSE_ISA_NS {
namespace {

using params = glimpse_linear_params;
using part_t = glimpse_linear_part;

// Up to this many rows weights are streamed: packing them would cost more than it saves.
constexpr int64_t kStreamedRows = 16;
constexpr int64_t kStreamedPanel = 64;  // columns

constexpr int kPanel = kTileVectors * kLanes;  // columns of a packed panel
constexpr int64_t kDepth = 1024;               // elements of x and weight multiplied before the sums are put down
constexpr int64_t kCacheBytes = 384 * 1024;    // of the second-level cache that a task may count on

// ---- panels --------------------------------------------------------------------------------------------------------

// Columns [first, first + count) of one part; `second` is the up half of a gated panel, else null.
struct Panel {
  const part_t* part;
  const part_t* second;
  int64_t first;
  int count;

  template <class T>
  T* out(int64_t row) const {
    return static_cast<T*>(part->out) + row * part->out_stride + first;
  }
};

// Panels of `width` accumulator columns over all parts.
struct Panels {
  const params& p;
  int64_t width;  // columns of a part in one panel
  int64_t starts[GLIMPSE_LINEAR_PARTS + 1];

  Panels(const params& p_, int64_t columns) : p(p_), width(gated() ? columns / 2 : columns) {
    starts[0] = 0;
    const int64_t parts = gated() ? 1 : p.num_parts;
    for (int64_t i = 0; i < parts; ++i) starts[i + 1] = starts[i] + (p.parts[i].cols + width - 1) / width;
    total = starts[parts];
  }

  bool gated() const { return p.epilogue == GLIMPSE_LINEAR_GATED; }

  Panel operator[](int64_t index) const {
    int64_t part = 0;
    while (index >= starts[part + 1]) ++part;
    const int64_t first = (index - starts[part]) * width;
    return {&p.parts[part], gated() ? &p.parts[1] : nullptr, first,
            static_cast<int>(smaller(width, p.parts[part].cols - first))};
  }

  int64_t total;
};

// ---- epilogue ------------------------------------------------------------------------------------------------------

GLIMPSE_INLINE vf silu(vf x) { return x / (splat(1.0f) + vexp(-x)); }

// erf by Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: absolute error below 1.5e-7.
GLIMPSE_INLINE vf gelu(vf x) {
  const vf z = x * splat(0.70710678f);
  const vf size = vmax(z, -z);
  const vf t = splat(1.0f) / fma(size, splat(0.3275911f), splat(1.0f));
  vf poly = splat(1.061405429f);
  poly = fma(poly, t, splat(-1.453152027f));
  poly = fma(poly, t, splat(1.421413741f));
  poly = fma(poly, t, splat(-0.284496736f));
  poly = fma(poly, t, splat(0.254829592f));
  const vf tail = poly * t * vexp(-z * z);  // 1 - erf(size)
  const vf half = x * splat(0.5f);
  const vf both = select(x < vf{}, tail, splat(2.0f) - tail);
  return select(x != x, x, half * both);
}

template <class T>
GLIMPSE_INLINE vf bias_of(const part_t* part, int64_t column, int n) {
  if (part->bias == nullptr) return vf{};
  return load_n(static_cast<const T*>(part->bias) + column, n);
}

// Turns the sums of a panel into results, wherever they lie. In a gated panel the vectors of up lie kUp behind their gates.
template <class T, glimpse_linear_epilogue epilogue>
struct Results {
  static constexpr bool kGated = epilogue == GLIMPSE_LINEAR_GATED;

  T* out;  // of the tile's first row and the panel's first column
  int64_t stride;
  const Panel& panel;

  // Columns [column, column + n) of the panel, in row `row`.
  __attribute__((always_inline)) void write(int64_t row, int64_t column, vf y, vf up) const {
    const int n = static_cast<int>(smaller<int64_t>(kLanes, panel.count - column));
    if (n <= 0) return;
    y += bias_of<T>(panel.part, panel.first + column, n);
    if constexpr (epilogue == GLIMPSE_LINEAR_GELU) y = gelu(y);
    if constexpr (kGated) y = silu(y) * (up + bias_of<T>(panel.second, panel.first + column, n));
    T* to = out + row * stride + column;
    if (n == kLanes)
      store(to, y);
    else
      store_n(to, y, n);
  }

  // As a sink of register tiles.
  template <int width>
  __attribute__((always_inline)) void put(const Product&, int row, int64_t column, const vf (&sum)[width]) const {
    if constexpr (kGated) {
      static_assert(width % 2 == 0);
#pragma GCC unroll 8
      for (int j = 0; j < width / 2; ++j) write(row, column + j * kLanes, sum[j], sum[j + width / 2]);
    } else {
#pragma GCC unroll 8
      for (int j = 0; j < width; ++j) write(row, column + j * kLanes, sum[j], vf{});
    }
  }

  // Of sums in memory, `half` floats between gate and up.
  void write_all(const float* sums, int64_t sums_stride, int64_t half, int64_t rows) const {
    for (int64_t column = 0; column < panel.count; column += kLanes)
      for (int64_t r = 0; r < rows; ++r) {
        const float* at = sums + r * sums_stride + column;
        write(r, column, load(at), kGated ? load(at + half) : vf{});
      }
  }
};

// ---- few rows: stream the weights ----------------------------------------------------------------------------------

GLIMPSE_INLINE vf load_int8(const int8_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  vf x;
  for (int i = 0; i < kLanes; ++i) x[i] = static_cast<float>(p[i]);
  return x;
#endif
}

GLIMPSE_INLINE vf load_int8_n(const int8_t* p, int n) {
  int8_t lanes[kLanes] = {};
  memcpy(lanes, p, static_cast<size_t>(n));
  return load_int8(lanes);
}

// A run of weight rows: `row(j)` is row j, `scale(j, group)` the factor of a group of its elements.
template <class W>
struct WeightRows {
  const W* first;
  int64_t stride;
  const float* scales;  // of the first row
  int64_t scale_stride;
  int64_t ahead;  // elements from one that is multiplied to one that is asked for

  __attribute__((always_inline)) const W* row(int64_t j) const { return first + j * stride; }
};

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
      __builtin_prefetch(w.row(j) + d + w.ahead, 0, 3);
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
      if ((d & 63) == 0) __builtin_prefetch(w.row(j) + d + w.ahead, 0, 3);
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

// sums[i * stride + j] = x_i . w_j for `height` rows of x and `width` rows of the weight.
template <class T, class W, int height, int width>
void dots(const WeightRows<W>& w, const T* x, int64_t x_stride, int64_t depth, int64_t group, float* sums,
          int64_t stride) {
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
    if constexpr (width == 4) {
      hsum4(total[i], sums + i * stride);
    } else {
      for (int j = 0; j < width; ++j) sums[i * stride + j] = hsum(total[i][j]);
    }
  }
}

template <class T, class W, int width>
void dots_rows(const WeightRows<W>& w, const T* x, int64_t x_stride, int64_t rows, int64_t depth, int64_t group,
               float* sums, int64_t stride) {
  constexpr int kTall = sizeof(W) == 1 ? 2 : 4;
  int64_t r = 0;
  for (; r + kTall <= rows; r += kTall)
    dots<T, W, kTall, width>(w, x + r * x_stride, x_stride, depth, group, sums + r * stride, stride);
  if constexpr (kTall > 2)
    for (; r + 2 <= rows; r += 2)
      dots<T, W, 2, width>(w, x + r * x_stride, x_stride, depth, group, sums + r * stride, stride);
  for (; r < rows; ++r)
    dots<T, W, 1, width>(w, x + r * x_stride, x_stride, depth, group, sums + r * stride, stride);
}

// Four short rows are asked for while the four before them are multiplied; in long rows, what is 2 kB away.
template <class W>
int64_t ahead_of(int64_t stride) {
  constexpr int64_t kFar = 16 * 1024 / static_cast<int64_t>(sizeof(W)), kNear = 2048 / static_cast<int64_t>(sizeof(W));
  return 4 * stride <= kFar ? 4 * stride : kNear;
}

template <class W>
WeightRows<W> rows_of(const params& p, const part_t& part, int64_t first) {
  const int64_t groups = part.scales == nullptr ? 0 : (p.depth + p.group - 1) / p.group;
  return {static_cast<const W*>(part.weight) + first * part.weight_stride, part.weight_stride,
          part.scales == nullptr ? nullptr : part.scales + first * groups, groups, ahead_of<W>(part.weight_stride)};
}

// Elements [begin, end) of an int8 row times their scales, at to[0 ..].
template <class T>
void dequantize(const int8_t* row, const float* scales, int64_t group, int64_t begin, int64_t end, T* to) {
  for (int64_t d = begin; d < end;) {
    const vf scale = splat(scales[d / group]);
    const int64_t stop = smaller((d / group + 1) * group, end);
    for (; d + kLanes <= stop; d += kLanes) store(to + (d - begin), load_int8(row + d) * scale);
    if (d < stop) {
      const int n = static_cast<int>(stop - d);
      store_n(to + (d - begin), load_int8_n(row + d, n) * scale, n);
      d = stop;
    }
  }
}

// Rows of x from which on int8 weights are made plain once instead of once a row; the plain rows are rounded to T.
constexpr int64_t kPlainRows = 3;

// Sums of all rows of x and `width` columns of a part. `plain`: room for `width` weight rows, or null.
template <class T, class W, int width>
GLIMPSE_INLINE void stream_some(const params& p, const part_t& part, int64_t first, T* plain, float* sums,
                                int64_t stride) {
  const T* x = static_cast<const T*>(p.x);
  const WeightRows<W> w = rows_of<W>(p, part, first);
  if constexpr (sizeof(W) == 1) {
    if (plain != nullptr) {
      for (int j = 0; j < width; ++j)
        dequantize(w.row(j), w.scales + j * w.scale_stride, p.group, 0, p.depth, plain + j * p.depth);
      const WeightRows<T> rows{plain, p.depth, nullptr, 0, 0};
      return dots_rows<T, T, width>(rows, x, p.x_stride, p.rows, p.depth, 0, sums, stride);
    }
  }
  dots_rows<T, W, width>(w, x, p.x_stride, p.rows, p.depth, p.group, sums, stride);
}

template <class T, class W>
void stream_columns(const params& p, const part_t& part, int64_t first, int count, T* plain, float* sums,
                    int64_t stride) {
  int c = 0;
  for (; c + 4 <= count; c += 4) stream_some<T, W, 4>(p, part, first + c, plain, sums + c, stride);
  for (; c < count; ++c) stream_some<T, W, 1>(p, part, first + c, plain, sums + c, stride);
}

template <class T, class W, glimpse_linear_epilogue epilogue>
glimpse_status stream(const params& p) {
  const Panels panels(p, kStreamedPanel);
  const int64_t half = panels.width;
  // A thread is worth waking for some ten microseconds of reading.
  const int64_t bytes = kStreamedPanel * p.depth * static_cast<int64_t>(sizeof(W)) + 1;
  const int64_t each = 1 + (96 * 1024) / bytes;
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
      stream_columns<T, W>(p, *panel.part, panel.first, panel.count, plain, sums, kStreamedPanel);
      if (panel.second != nullptr)
        stream_columns<T, W>(p, *panel.second, panel.first, panel.count, plain, sums + half, kStreamedPanel);
      const Results<T, epilogue> results{panel.out<T>(0), panel.part->out_stride, panel};
      results.write_all(sums, kStreamedPanel, half, p.rows);
    }
  });
  return failed ? fail(GLIMPSE_OUT_OF_MEMORY, "linear: no scratch memory") : GLIMPSE_OK;
}

// ---- many rows: pack the weights -----------------------------------------------------------------------------------

template <class T>
void widen_rows(const T* x, int64_t stride, int64_t rows, int64_t depth, float* to) {
  for (int64_t r = 0; r < rows; ++r) {
    int64_t d = 0;
    for (; d + kLanes <= depth; d += kLanes) store(to + r * kDepth + d, load(x + r * stride + d));
    if (d < depth) {
      const int n = static_cast<int>(depth - d);
      store_n(to + r * kDepth + d, load_n(x + r * stride + d, n), n);
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
        rows[j] = plain + j * kDepth;
        dequantize(w.row(c + j), w.scales + (c + j) * w.scale_stride, p.group, begin, end, plain + j * kDepth);
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
  constexpr float kOnes[kTileRows] = {1, 1, 1, 1, 1, 1};
  const bool odd = kPairs<T> && (depth & 1) != 0;
  Product product{a, a_stride, packed, kPanel, kPairs<T> ? depth / 2 : depth, first ? nullptr : kOnes, sums, kPanel};
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
    depth = smaller(p.depth, kDepth);
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
  const int64_t blocks = larger<int64_t>(1, (p.depth + kDepth - 1) / kDepth);
  const int64_t sums_floats = size.high * kPanel * size.wide;
  const int64_t wide_x_floats = kWidened<T> ? size.high * kDepth : 0;
  const int64_t plain_floats = sizeof(W) == 1 ? kLanes * kDepth : 0;
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
      for (int64_t d = 0; d < p.depth; d += kDepth) {
        const int64_t end = smaller(d + kDepth, p.depth);
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
      for (int64_t d = 0; d < blocks * kDepth; d += kDepth) {
        const int64_t depth = smaller(kDepth, p.depth - d);
        const char* a = reinterpret_cast<const char*>(x + d);
        int64_t a_stride = p.x_stride * static_cast<int64_t>(sizeof(T));
        if constexpr (kWidened<T>) {
          widen_rows(x + d, p.x_stride, rows, depth, wide_x);
          a = reinterpret_cast<const char*>(wide_x);
          a_stride = kDepth * static_cast<int64_t>(sizeof(float));
        }
        for (int64_t i = 0; i < count; ++i) {
          const Panel panel = panels[from + i];
          const Results<T, epilogue> results{panel.out<T>(row), panel.part->out_stride, panel};
          multiply_panel<T>(a, a_stride, rows, depth, packed + i * size.panel_cells + cells_of<T>(d) * kPanel, d == 0,
                            d + kDepth >= p.depth, sums + i * size.high * kPanel, results);
        }
      }
    }
  });
  return failed ? fail(GLIMPSE_OUT_OF_MEMORY, "linear: no scratch memory") : GLIMPSE_OK;
}

// ---- entry ---------------------------------------------------------------------------------------------------------

template <class T, class W, glimpse_linear_epilogue epilogue>
glimpse_status run(const params& p) {
  return p.rows <= kStreamedRows ? stream<T, W, epilogue>(p) : pack<T, W, epilogue>(p);
}

template <class T, class W>
glimpse_status run(const params& p) {
  switch (p.epilogue) {
    case GLIMPSE_LINEAR_NONE:
      return run<T, W, GLIMPSE_LINEAR_NONE>(p);
    case GLIMPSE_LINEAR_GELU:
      return run<T, W, GLIMPSE_LINEAR_GELU>(p);
    case GLIMPSE_LINEAR_GATED:
      return run<T, W, GLIMPSE_LINEAR_GATED>(p);
  }
  return fail(GLIMPSE_INVALID, "linear: epilogue: expected 0, 1 or 2, found %d", static_cast<int>(p.epilogue));
}

template <class T>
glimpse_status run(const params& p) {
  return p.parts[0].scales == nullptr ? run<T, T>(p) : run<T, int8_t>(p);
}

}  // namespace

glimpse_status linear(const glimpse_linear_params& p) {
  if (p.num_parts < 1 || p.num_parts > GLIMPSE_LINEAR_PARTS)
    return fail(GLIMPSE_INVALID, "linear: parts: expected 1 to %d, found %lld", GLIMPSE_LINEAR_PARTS,
                static_cast<long long>(p.num_parts));
  if (p.epilogue == GLIMPSE_LINEAR_GATED && (p.num_parts != 2 || p.parts[0].cols != p.parts[1].cols))
    return fail(GLIMPSE_INVALID, "linear: gated: expected two parts of equal size");
  for (int64_t i = 0; i < p.num_parts; ++i) {
    if ((p.parts[i].scales == nullptr) != (p.parts[0].scales == nullptr))
      return fail(GLIMPSE_INVALID, "linear: parts: expected scales for all or for none");
  }
  if (p.parts[0].scales != nullptr && (p.group < 32 || p.group % 32 != 0))
    return fail(GLIMPSE_INVALID, "linear: group: expected a positive multiple of 32, found %lld",
                static_cast<long long>(p.group));
  if (p.rows <= 0) return GLIMPSE_OK;
  return p.dtype == GLIMPSE_BFLOAT16 ? run<bf16>(p) : run<float>(p);
}

}  // namespace glimpse::GLIMPSE_ISA_NS

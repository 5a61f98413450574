// SPDX-License-Identifier: Apache-2.0
// What both ways to multiply with a weight share: the panels that the columns of the result are cut into, the epilogue
// that turns a panel's sums into results, and the weight's rows, plain or int8.
#pragma once

#include "cpu/tiles.h"
#include "glimpse/linear.h"

namespace glimpse::GLIMPSE_ISA_NS {
namespace {

using params = glimpse_linear_params;
using part_t = glimpse_linear_part;

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

// Turns the sums of a panel into results, wherever they lie. In a gated panel the up half follows the
// gate half.
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

// ---- weights --------------------------------------------------------------------------------------------------------

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

constexpr int64_t kAhead = 2048;  // bytes from a weight that is multiplied to one that is asked for

// Weight rows at equal distances: `row(j)` is row j, `scale(j, group)` the factor of a group of its elements.
template <class W>
struct WeightRows {
  const W* first;
  int64_t stride;
  const float* scales;  // of the first row
  int64_t scale_stride;

  __attribute__((always_inline)) const W* row(int64_t j) const { return first + j * stride; }
};

// Rows first, first + step, first + 2 step, ... of a part.
template <class W>
WeightRows<W> rows_of(const params& p, const part_t& part, int64_t first, int64_t step = 1) {
  const int64_t groups = part.scales == nullptr ? 0 : (p.depth + p.group - 1) / p.group;
  return {static_cast<const W*>(part.weight) + first * part.weight_stride, step * part.weight_stride,
          part.scales == nullptr ? nullptr : part.scales + first * groups, step * groups};
}

// Elements [begin, end) of an int8 row times their scales, at to[0 ..].
template <class T>
void dequantize(const int8_t* row, const float* scales, int64_t group, int64_t begin, int64_t end, T* to) {
  for (int64_t d = begin; d < end;) {
    const vf scale = splat(scales[d / group]);
    const int64_t stop = smaller((d / group + 1) * group, end);
    for (int64_t line = d; line < stop; line += 64) __builtin_prefetch(row + line + kAhead, 0, 3);
#if defined(__AVX512BF16__)
    if constexpr (sizeof(T) == 2) {
      for (; d + 2 * kLanes <= stop; d += 2 * kLanes) {
        const __m512bh pair = _mm512_cvtne2ps_pbh(load_int8(row + d + kLanes) * scale, load_int8(row + d) * scale);
        _mm512_storeu_si512(to + (d - begin), reinterpret_cast<__m512i>(pair));
      }
    }
#endif
    for (; d + kLanes <= stop; d += kLanes) store(to + (d - begin), load_int8(row + d) * scale);
    if (d < stop) {
      const int n = static_cast<int>(stop - d);
      store_n(to + (d - begin), load_int8_n(row + d, n) * scale, n);
      d = stop;
    }
  }
}

}  // namespace
}  // namespace glimpse::GLIMPSE_ISA_NS

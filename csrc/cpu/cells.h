// SPDX-License-Identifier: Apache-2.0
// Cells: what one lane multiplies in one step. A float, or, where the machine multiplies bf16 pairs, two neighbouring bf16
// values.
#pragma once

#include "cpu/vec.h"

namespace glimpse::GLIMPSE_ISA_NS {
namespace {

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

template <class T>
constexpr bool kPairs = false;
template <>
constexpr bool kPairs<bf16> = kHasPairs;

template <class T>
GLIMPSE_INLINE int64_t cells_of(int64_t elements) {
  return kPairs<T> ? (elements + 1) / 2 : elements;
}

GLIMPSE_INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// One vector of cells: elements [element, ...) of a row of `elements`. Past the end: zero.
template <class T>
GLIMPSE_INLINE vf load_cells(const T* row, int64_t element, int64_t elements) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs<T>) {
    const int64_t left = elements - element;
    if (left >= 2 * kLanes) return reinterpret_cast<vf>(_mm512_loadu_si512(row + element));
    if (left <= 0) return vf{};
    return reinterpret_cast<vf>(_mm512_maskz_loadu_epi16((1u << left) - 1u, row + element));
  }
#endif
  const int64_t left = elements - element;
  if (left >= kLanes) return load(row + element);
  return left <= 0 ? vf{} : load_n(row + element, static_cast<int>(left));
}

// sum + a b, lane by lane.
template <class T>
GLIMPSE_INLINE vf multiply_add_cells(vf a, vf b, vf sum) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs<T>) return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#endif
  return fma(a, b, sum);
}

// The cell at an address (pairs at any even one) in all lanes, whatever its bits mean.
GLIMPSE_INLINE vf splat_cell(const char* p) {
  float cell;
  memcpy(&cell, p, 4);
#if defined(__AVX512F__)
  return _mm512_set1_ps(cell);
#elif defined(__AVX2__)
  return _mm256_set1_ps(cell);
#else
  return splat(cell);
#endif
}

#if defined(__AVX512F__)
template <class T>
GLIMPSE_INLINE void dot_step(const T* const* a, const T* const* b, int64_t element, int64_t dim, vf (*sum)[4]) {
  vf y[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) y[j] = load_cells(b[j], element, dim);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const vf x = load_cells(a[i], element, dim);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[i][j] = multiply_add_cells<T>(x, y[j], sum[i][j]);
  }
}

// Lane 4 i + j: the dot product of a[i] and b[j], rows of `dim` elements.
template <class T>
GLIMPSE_INLINE vf dot_tile(const T* const* a, const T* const* b, int64_t dim) {
  constexpr int64_t kElements = kPairs<T> ? 2 * kLanes : kLanes;
  vf sum[4][4] = {};
  int64_t d = 0;
  for (; d + kElements <= dim; d += kElements) dot_step(a, b, d, d + kElements, sum);
  if (d < dim) dot_step(a, b, d, dim, sum);
  // 16 vectors to one: four lanes to one within each quarter, then the quarters
  vf row[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const vf low = _mm512_unpacklo_ps(sum[i][0], sum[i][1]) + _mm512_unpackhi_ps(sum[i][0], sum[i][1]);
    const vf high = _mm512_unpacklo_ps(sum[i][2], sum[i][3]) + _mm512_unpackhi_ps(sum[i][2], sum[i][3]);
    row[i] = _mm512_shuffle_ps(low, high, 0x44) + _mm512_shuffle_ps(low, high, 0xee);
  }
  const vf top = _mm512_shuffle_f32x4(row[0], row[1], 0x88) + _mm512_shuffle_f32x4(row[0], row[1], 0xdd);
  const vf bottom = _mm512_shuffle_f32x4(row[2], row[3], 0x88) + _mm512_shuffle_f32x4(row[2], row[3], 0xdd);
  return _mm512_shuffle_f32x4(top, bottom, 0x88) + _mm512_shuffle_f32x4(top, bottom, 0xdd);
}
#endif

}  // namespace
}  // namespace glimpse::GLIMPSE_ISA_NS

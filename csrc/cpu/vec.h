// SPDX-License-Identifier: Apache-2.0
// Vectors of fp32 lanes at the width of the instruction set, and bf16 in memory. GCC/Clang vector extensions: arithmetic
// and comparisons are plain operators (a < b gives a vi of 0 / -1). Everything has internal linkage (see isa.h).
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu/isa.h"

namespace glimpse::GLIMPSE_ISA_NS {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));  // half a vector of 16-bit values

// The same for loads and stores at any address.
typedef float vf_any __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t vi_any __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};

template <class T>
GLIMPSE_INLINE T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
GLIMPSE_INLINE T larger(T a, T b) {
  return a < b ? b : a;
}

// ---- scalars -------------------------------------------------------------------------------------------------------

GLIMPSE_INLINE float to_float(float x) { return x; }
GLIMPSE_INLINE float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Round to nearest, ties to even. NaN stays NaN, infinities stay.
GLIMPSE_INLINE bf16 to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return bf16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

GLIMPSE_INLINE void put(float* p, float x) { *p = x; }
GLIMPSE_INLINE void put(bf16* p, float x) { *p = to_bf16(x); }

// ---- vectors -------------------------------------------------------------------------------------------------------

GLIMPSE_INLINE vf splat(float x) { return vf{} + x; }
GLIMPSE_INLINE vi splat_i(int32_t x) { return vi{} + x; }

GLIMPSE_INLINE vi lane_index() {
  vi index;
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  return index;
}

GLIMPSE_INLINE vf as_vf(vi x) { return reinterpret_cast<vf>(x); }
GLIMPSE_INLINE vf as_vf(vu x) { return reinterpret_cast<vf>(x); }
GLIMPSE_INLINE vi as_vi(vf x) { return reinterpret_cast<vi>(x); }
GLIMPSE_INLINE vu as_vu(vf x) { return reinterpret_cast<vu>(x); }

// mask lanes are 0 or -1
GLIMPSE_INLINE vf select(vi mask, vf yes, vf no) {
  return as_vf((mask & as_vi(yes)) | (~mask & as_vi(no)));
}

GLIMPSE_INLINE vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  return select(a > b, a, b);
#endif
}

GLIMPSE_INLINE vf vmin(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#elif defined(__SSE2__)
  return _mm_min_ps(a, b);
#else
  return select(a < b, a, b);
#endif
}

// -ffp-contract=fast makes this one instruction where the machine has it.
GLIMPSE_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }

GLIMPSE_INLINE float hsum(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(x);
#else
#if defined(__AVX2__)
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
#elif defined(__SSE2__)
  __m128 s = x;
#else
  return (x[0] + x[2]) + (x[1] + x[3]);
#endif
#if defined(__SSE2__)
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  s = _mm_add_ss(s, _mm_shuffle_ps(s, s, 1));
  return _mm_cvtss_f32(s);
#endif
#endif
}

GLIMPSE_INLINE float hmax(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(x);
#else
  float best = x[0];
  for (int i = 1; i < kLanes; ++i) best = x[i] > best ? x[i] : best;
  return best;
#endif
}

GLIMPSE_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
GLIMPSE_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_any*>(p) = x; }

// (GCC 12 turns __builtin_convertvector into six instructions here.)
GLIMPSE_INLINE vu widen(vh x) {
#if defined(__AVX512F__)
  return reinterpret_cast<vu>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<vu>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(x)));
#else
  return __builtin_convertvector(x, vu);
#endif
}

GLIMPSE_INLINE vh narrow(vu x) {
#if defined(__AVX512F__)
  return reinterpret_cast<vh>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(x)));
#elif defined(__AVX2__)
  // values fit in 16 bits, so the unsigned saturation never acts
  const __m256i packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(x), reinterpret_cast<__m256i>(x));
  return reinterpret_cast<vh>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  return __builtin_convertvector(x, vh);
#endif
}

GLIMPSE_INLINE vf load(const bf16* p) {
  return as_vf(widen(*reinterpret_cast<const vh_any*>(p)) << 16);
}

// bf16 bits (in the low halves) of fp32 lanes: nearest even, NaN stays NaN.
GLIMPSE_INLINE vu round_bits(vf x) {
  const vu bits = as_vu(x);
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vu nan = (bits >> 16) | 0x40u;
  const vi is_nan = x != x;
  const vu mask = reinterpret_cast<vu>(is_nan);
  return (mask & nan) | (~mask & rounded);
}

// Lanes rounded to bf16. With AVX512-BF16 one instruction, which also turns results below 1.2e-38 (bf16's subnormal
// numbers) into 0; elsewhere they are kept.
GLIMPSE_INLINE vh to_half(vf x) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<vh>(_mm512_cvtneps_pbh(x));
#else
  return narrow(round_bits(x));
#endif
}

// x as it reads back after a store in bf16.
GLIMPSE_INLINE vf rounded_to_bf16(vf x) {
#if defined(__AVX512BF16__)
  return as_vf(widen(to_half(x)) << 16);
#else
  return as_vf(round_bits(x) << 16);
#endif
}

GLIMPSE_INLINE void store(bf16* p, vf x) { *reinterpret_cast<vh_any*>(p) = to_half(x); }

// First n lanes (0 <= n <= kLanes); the others read as 0 / are not written. Memory past them is not touched.
GLIMPSE_INLINE vf load_n(const float* p, int n) {
#if defined(__AVX512F__)
  if (n == 8) return _mm512_zextps256_ps512(_mm256_loadu_ps(p));
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p);
#else
  float lanes[kLanes] = {};
  memcpy(lanes, p, sizeof(float) * static_cast<size_t>(n));
  return load(lanes);
#endif
}

GLIMPSE_INLINE vf load_n(const bf16* p, int n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  // half a vector is common (heads of 80, half of which is 40), and a plain access waits less on earlier stores
  const __m256i half = n == 8 ? _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))
                              : _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1u), p);
  return as_vf(widen(reinterpret_cast<vh>(half)) << 16);
#else
  bf16 lanes[kLanes] = {};
  memcpy(lanes, p, sizeof(bf16) * static_cast<size_t>(n));
  return load(lanes);
#endif
}

GLIMPSE_INLINE void store_n(float* p, vf x, int n) {
#if defined(__AVX512F__)
  if (n == 8) return _mm256_storeu_ps(p, _mm512_castps512_ps256(x));
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), x);
#else
  float lanes[kLanes];
  store(lanes, x);
  memcpy(p, lanes, sizeof(float) * static_cast<size_t>(n));
#endif
}

GLIMPSE_INLINE void store_n(bf16* p, vf x, int n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const __m256i half = reinterpret_cast<__m256i>(to_half(x));
  if (n == 8) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(half));
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1u), half);
#else
  bf16 lanes[kLanes];
  store(lanes, x);
  memcpy(p, lanes, sizeof(bf16) * static_cast<size_t>(n));
#endif
}

// Sum of a[i] * b[i] in fp32, in four partial sums.
template <class A, class B>
GLIMPSE_INLINE float dot(const A* a, const B* b, int64_t dim) {
  vf sum[4] = {};
  int64_t d = 0;
  for (; d + 4 * kLanes <= dim; d += 4 * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum[i] = fma(load(a + d + i * kLanes), load(b + d + i * kLanes), sum[i]);
  }
  for (; d < dim; d += kLanes) {
    const int n = static_cast<int>(smaller<int64_t>(kLanes, dim - d));
    sum[0] = fma(load_n(a + d, n), load_n(b + d, n), sum[0]);
  }
  return hsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// ---- exponential ---------------------------------------------------------------------------------------------------

GLIMPSE_INLINE vf round_even(vf x) {
#if defined(__AVX512F__)
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  // adding 1.5 * 2^23 leaves no fraction bits; |x| < 2^22 wherever this is used
  const vf magic = splat(12582912.0f);
  volatile vf sum = x + magic;
  return sum - magic;
#endif
}

// x * 2^n for integral n in [-252, 254], in two steps so that neither factor leaves the range of normal numbers.
GLIMPSE_INLINE vf scale_by_power(vf x, vf n) {
#if defined(__AVX512F__)
  return _mm512_scalef_ps(x, n);
#else
  const vi whole = __builtin_convertvector(n, vi);
  const vi half = whole >> 1;
  return x * as_vf((half + 127) << 23) * as_vf((whole - half + 127) << 23);
#endif
}

// 2^f for |f| <= 1/2 (least-maximum fits of the relative error, p(0) = 1): 9e-8, and 3e-6 for values that are rounded to
// bf16 right away.
GLIMPSE_INLINE vf exp2_fraction(vf f) {
  vf p = splat(0.001326472731307149f);
  p = fma(p, f, splat(0.009671512991189957f));
  p = fma(p, f, splat(0.05550733581185341f));
  p = fma(p, f, splat(0.24022242426872253f));
  p = fma(p, f, splat(0.6931470036506653f));
  return fma(p, f, splat(1.0f));
}

GLIMPSE_INLINE vf exp2_fraction_short(vf f) {
  vf p = splat(0.009582852944731712f);
  p = fma(p, f, splat(0.055906426161527634f));
  p = fma(p, f, splat(0.24024099111557007f));
  p = fma(p, f, splat(0.6931241750717163f));
  return fma(p, f, splat(1.0f));
}

// 2^x. x below -126 gives 0 (also -inf), x >= 128 gives inf, NaN stays.
GLIMPSE_INLINE vf vexp2(vf x) {
  const vf bounded = vmin(vmax(x, splat(-127.0f)), splat(129.0f));
  const vf n = round_even(bounded);
  const vf result = scale_by_power(exp2_fraction(bounded - n), n);
  const vf flushed = select(x < splat(-126.0f), vf{}, result);
  return select(x != x, x, flushed);
}

// e^x, relative error at most 2 units in the last place. x below -87.33 gives 0, above 88.73 inf, NaN stays.
GLIMPSE_INLINE vf vexp(vf x) {
  const vf bounded = vmin(vmax(x, splat(-88.0f)), splat(89.5f));
  const vf n = round_even(bounded * splat(1.44269504f));
  // ln 2 in two parts: n times the first is exact. e^r = 1 + r + r^2 p(r), p a least-maximum fit on |r| <= ln(2)/2.
  const vf r = fma(n, splat(-1.42860677e-6f), fma(n, splat(-0.693145752f), bounded));
  vf p = splat(0.0013814467238262296f);
  p = fma(p, r, splat(0.008368780836462975f));
  p = fma(p, r, splat(0.04166839271783829f));
  p = fma(p, r, splat(0.1666651964187622f));
  p = fma(p, r, splat(0.4999999403953552f));
  p = fma(p, r * r, r + splat(1.0f));
  const vf result = scale_by_power(p, n);
  const vf flushed = select(x < splat(-87.33f), vf{}, result);
  return select(x != x, x, flushed);
}

}  // namespace
}  // namespace glimpse::GLIMPSE_ISA_NS

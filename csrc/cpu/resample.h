// SPDX-License-Identifier: Apache-2.0
// Antialiased resize of RGB bytes with the arithmetic of Pillow's Image.resize, bit for bit: filter weights in double,
// normalised to a sum of 1, rounded to 22 fraction bits; a horizontal pass rounded and clipped to bytes, then a vertical
// one, or the other way round. `Resampler` yields output rows from top to bottom and holds only those rows of the first
// pass that the second one still needs.
#pragma once

#include <stdlib.h>

#include "cpu/vec.h"
#include "glimpse/patchify.h"

namespace glimpse::GLIMPSE_ISA_NS {
namespace {

constexpr int kFractionBits = 22;
constexpr int64_t kBlock = 16;  // source rows that the horizontal pass takes at once, and bytes of a small vector
constexpr int kParts = static_cast<int>(kBlock) / kLanes;

GLIMPSE_INLINE int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// ---- weights -------------------------------------------------------------------------------------------------------

// Output pixel i is the sum of count[i] input pixels from first[i] on, times weight[i * taps ...].
struct Filter {
  int32_t* weight = nullptr;
  int32_t* first = nullptr;
  int32_t* count = nullptr;
  int64_t taps = 0;
  void* memory = nullptr;
};

// A fused multiply-add rounds once where Pillow rounds twice, and the weights would depend on the instruction set.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif

double sinc(double x) {
  if (x == 0.0) return 1.0;
  x *= 3.14159265358979323846;
  return __builtin_sin(x) / x;
}

// The filters at distance x, in input pixels over the larger of 1 and the scale.
double filter_value(glimpse_resample kind, double x) {
  const double d = x < 0.0 ? -x : x;
  switch (kind) {
    case GLIMPSE_RESAMPLE_BOX:
      return x > -0.5 && x <= 0.5 ? 1.0 : 0.0;
    case GLIMPSE_RESAMPLE_BILINEAR:
      return d < 1.0 ? 1.0 - d : 0.0;
    case GLIMPSE_RESAMPLE_HAMMING: {
      if (d == 0.0) return 1.0;
      if (d >= 1.0) return 0.0;
      const double angle = d * 3.14159265358979323846;
      const double window = static_cast<double>(0.46f) * __builtin_cos(angle);
      return __builtin_sin(angle) / angle * (static_cast<double>(0.54f) + window);
    }
    case GLIMPSE_RESAMPLE_BICUBIC:  // Keys' cubic convolution with a = -1/2
      if (d < 1.0) return (1.5 * d - 2.5) * d * d + 1.0;
      if (d < 2.0) return (((d - 5.0) * d + 8.0) * d - 4.0) * -0.5;
      return 0.0;
    case GLIMPSE_RESAMPLE_LANCZOS:
      return -3.0 <= x && x < 3.0 ? sinc(x) * sinc(x / 3.0) : 0.0;
  }
  return 0.0;
}

double filter_support(glimpse_resample kind) {
  switch (kind) {
    case GLIMPSE_RESAMPLE_BOX:
      return 0.5;
    case GLIMPSE_RESAMPLE_BICUBIC:
      return 2.0;
    case GLIMPSE_RESAMPLE_LANCZOS:
      return 3.0;
    default:
      return 1.0;
  }
}

// False where there is no memory. Equal sizes give the identity: Pillow leaves out such a pass.
bool make_filter(Filter& filter, glimpse_resample kind, int64_t in, int64_t out) {
  const double scale = static_cast<double>(in) / static_cast<double>(out);
  const double stretch = scale < 1.0 ? 1.0 : scale;
  const double support = filter_support(kind) * stretch;
  filter.taps = in == out ? 1 : static_cast<int64_t>(__builtin_ceil(support)) * 2 + 1;
  const size_t taps = static_cast<size_t>(filter.taps), rows = static_cast<size_t>(out);
  filter.memory = malloc(taps * sizeof(double) + rows * (taps + 2) * sizeof(int32_t));
  if (filter.memory == nullptr) return false;
  double* exact = static_cast<double*>(filter.memory);
  filter.weight = reinterpret_cast<int32_t*>(exact + taps);
  filter.first = filter.weight + taps * rows;
  filter.count = filter.first + rows;
  for (int64_t i = 0; i < out; ++i) {
    int32_t* weight = filter.weight + i * filter.taps;
    if (in == out) {
      filter.first[i] = static_cast<int32_t>(i);
      filter.count[i] = 1;
      weight[0] = 1 << kFractionBits;
      continue;
    }
    const double center = (static_cast<double>(i) + 0.5) * scale;
    const double inverse = 1.0 / stretch;
    int64_t begin = static_cast<int64_t>(center - support + 0.5);
    int64_t end = static_cast<int64_t>(center + support + 0.5);
    if (begin < 0) begin = 0;
    if (end > in) end = in;
    double sum = 0.0;
    for (int64_t x = begin; x < end; ++x) {
      exact[x - begin] = filter_value(kind, (static_cast<double>(x) - center + 0.5) * inverse);
      sum += exact[x - begin];
    }
    for (int64_t x = begin; x < end; ++x) {
      const double share = sum != 0.0 ? exact[x - begin] / sum : exact[x - begin];
      const double scaled = share * (1 << kFractionBits);
      weight[x - begin] = static_cast<int32_t>(share < 0.0 ? scaled - 0.5 : scaled + 0.5);
    }
    filter.first[i] = static_cast<int32_t>(begin);
    filter.count[i] = static_cast<int32_t>(end - begin);
  }
  return true;
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif

// ---- sixteen bytes -------------------------------------------------------------------------------------------------

// 16 sums of products of bytes and weights.
struct Sums {
  vi part[kParts];
};

GLIMPSE_INLINE Sums start_sums() {
  Sums s;
  for (int i = 0; i < kParts; ++i) s.part[i] = splat_i(1 << (kFractionBits - 1));  // rounds to nearest
  return s;
}

GLIMPSE_INLINE void add_product(Sums& s, const uint8_t* bytes, vi weight) {
#if defined(__AVX512F__)
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  s.part[0] += reinterpret_cast<vi>(_mm512_cvtepu8_epi32(x)) * weight;
#elif defined(__AVX2__)
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  s.part[0] += reinterpret_cast<vi>(_mm256_cvtepu8_epi32(x)) * weight;
  s.part[1] += reinterpret_cast<vi>(_mm256_cvtepu8_epi32(_mm_unpackhi_epi64(x, x))) * weight;
#elif defined(__SSE2__)
  // There is no product of 32-bit lanes. With weight = high * 2^15 + low both halves fit the one of 16-bit pairs:
  // the even word of a lane holds the byte, the odd word 0.
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)), zero = _mm_setzero_si128();
  const __m128i high = reinterpret_cast<__m128i>(weight >> 15), low = reinterpret_cast<__m128i>(weight & 0x7fff);
  const __m128i words[2] = {_mm_unpacklo_epi8(x, zero), _mm_unpackhi_epi8(x, zero)};
  for (int i = 0; i < 4; ++i) {
    const __m128i byte = i % 2 == 0 ? _mm_unpacklo_epi16(words[i / 2], zero) : _mm_unpackhi_epi16(words[i / 2], zero);
    const __m128i upper = _mm_slli_epi32(_mm_madd_epi16(byte, high), 15);
    s.part[i] += reinterpret_cast<vi>(_mm_add_epi32(upper, _mm_madd_epi16(byte, low)));
  }
#else
  for (int i = 0; i < kParts; ++i)
    for (int lane = 0; lane < kLanes; ++lane) s.part[i][lane] += bytes[i * kLanes + lane] * weight[lane];
#endif
}

// The integral parts, clipped to bytes.
GLIMPSE_INLINE void store_bytes(uint8_t* out, const Sums& s) {
#if defined(__AVX512F__)
  const __m512i whole = reinterpret_cast<__m512i>(s.part[0] >> kFractionBits);
  const __m128i bytes = _mm512_cvtusepi32_epi8(_mm512_max_epi32(whole, _mm512_setzero_si512()));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
#elif defined(__AVX2__)
  const __m256i a = reinterpret_cast<__m256i>(s.part[0] >> kFractionBits);
  const __m256i b = reinterpret_cast<__m256i>(s.part[1] >> kFractionBits);
  const __m128i words[2] = {_mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1)),
                            _mm_packs_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1))};
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_packus_epi16(words[0], words[1]));
#elif defined(__SSE2__)
  __m128i whole[4];
  for (int i = 0; i < 4; ++i) whole[i] = reinterpret_cast<__m128i>(s.part[i] >> kFractionBits);
  const __m128i words[2] = {_mm_packs_epi32(whole[0], whole[1]), _mm_packs_epi32(whole[2], whole[3])};
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_packus_epi16(words[0], words[1]));
#else
  for (int i = 0; i < kParts; ++i)
    for (int lane = 0; lane < kLanes; ++lane) {
      const int32_t whole = s.part[i][lane] >> kFractionBits;
      out[i * kLanes + lane] = static_cast<uint8_t>(whole < 0 ? 0 : whole > 255 ? 255 : whole);
    }
#endif
}

// to[16 * j + i] = from[i][j] for i, j < 16.
GLIMPSE_INLINE void transpose(const uint8_t* const* from, int64_t at, uint8_t* const* to, int64_t to_at) {
#if defined(__SSE2__)
  // Interleaving the first half of the rows with the second moves one bit of the row index to the column index.
  __m128i x[16], y[16];
  for (int i = 0; i < 16; ++i) x[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from[i] + at));
  for (int step = 0; step < 4; ++step) {
    for (int i = 0; i < 8; ++i) {
      y[2 * i] = _mm_unpacklo_epi8(x[i], x[i + 8]);
      y[2 * i + 1] = _mm_unpackhi_epi8(x[i], x[i + 8]);
    }
    for (int i = 0; i < 16; ++i) x[i] = y[i];
  }
  for (int i = 0; i < 16; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(to[i] + to_at), x[i]);
#else
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) to[j][to_at + i] = from[i][at + j];
#endif
}

// ---- rows ----------------------------------------------------------------------------------------------------------

// What all threads share.
struct Resize {
  const uint8_t* image;
  int64_t height, width, stride;  // of the image, in bytes
  int64_t out_height, out_width;
  bool down_first;
  Filter across, down;

  int64_t plane() const { return round_up(out_width, kBlock); }       // bytes of one channel of a row
  int64_t line() const { return 3 * plane(); }                        // the channels of a row lie one after the other
  int64_t columns() const { return round_up(3 * width, kBlock); }     // of a block of source rows
  int64_t ring() const { return down_first ? kBlock : round_up(down.taps + kBlock, kBlock); }  // rows in store
  int64_t scratch() const {
    return (down_first ? 2 : 1) * kBlock * columns() + ring() * line() +
           down.taps * static_cast<int64_t>(sizeof(uint8_t*));
  }
};

// 16 * kWide bytes of a row: the sum of the same bytes of the rows below the filter.
template <int kWide>
GLIMPSE_INLINE void add_down(uint8_t* out, const uint8_t* const* rows, int64_t at, const int32_t* weight, int32_t count) {
  Sums sums[kWide];
  for (int i = 0; i < kWide; ++i) sums[i] = start_sums();
  for (int32_t tap = 0; tap < count; ++tap) {
    const vi w = splat_i(weight[tap]);
    for (int i = 0; i < kWide; ++i) add_product(sums[i], rows[tap] + at + i * kBlock, w);
  }
  for (int i = 0; i < kWide; ++i) store_bytes(out + at + i * kBlock, sums[i]);
}

// The sum of rows that end after `bytes` bytes; out has room up to the next multiple of 16.
void add_rows(uint8_t* out, const uint8_t* const* rows, int64_t bytes, const int32_t* weight, int32_t count) {
  int64_t at = 0;
  for (; at + 4 * kBlock <= bytes; at += 4 * kBlock) add_down<4>(out, rows, at, weight, count);
  for (; at + kBlock <= bytes; at += kBlock) add_down<1>(out, rows, at, weight, count);
  if (at == bytes) return;
  Sums sums = start_sums();
  for (int32_t tap = 0; tap < count; ++tap) {
    uint8_t tail[kBlock] = {};
    memcpy(tail, rows[tap] + at, static_cast<size_t>(bytes - at));
    add_product(sums, tail, splat_i(weight[tap]));
  }
  store_bytes(out + at, sums);
}

// One thread's walk down the picture.
struct Resampler {
  const Resize& job;
  const uint8_t** taps;  // [down.taps] rows that the vertical filter stands on
  uint8_t* turned;       // [columns][16]: a block of rows, transposed
  uint8_t* thin;         // [16][columns], down first: a block of rows of the vertical pass
  uint8_t* store;        // [ring][line]: row r after the horizontal pass, in slot (r - start) % ring
  int64_t start, next;   // rows start .. next-1 have been in store; down first: output rows, else source rows

  Resampler(const Resize& resize, void* scratch, int64_t first_row)
      : job(resize),
        taps(static_cast<const uint8_t**>(scratch)),
        turned(reinterpret_cast<uint8_t*>(taps + resize.down.taps)),
        thin(turned + kBlock * resize.columns()),
        store(resize.down_first ? thin + kBlock * resize.columns() : thin),
        start(resize.down_first ? first_row : resize.down.first[first_row]),
        next(start) {}

  void turn(const uint8_t* const* rows) {
    const int64_t bytes = 3 * job.width;
    for (int64_t at = 0; at < bytes; at += kBlock) {
      uint8_t* to[kBlock];
      for (int64_t i = 0; i < kBlock; ++i) to[i] = turned + (at + i) * kBlock;
      if (at + kBlock <= bytes) {
        transpose(rows, at, to, 0);
        continue;
      }
      uint8_t tail[kBlock][kBlock] = {};  // nothing is read behind the end of a row
      const uint8_t* tails[kBlock];
      for (int64_t i = 0; i < kBlock; ++i) {
        memcpy(tail[i], rows[i] + at, static_cast<size_t>(bytes - at));
        tails[i] = tail[i];
      }
      transpose(tails, 0, to, 0);
    }
  }

  // The next 16 rows of the picture, or of the vertical pass.
  void add_block() {
    const uint8_t* rows[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) {
      if (!job.down_first) {
        rows[i] = job.image + smaller(next + i, job.height - 1) * job.stride;
        continue;
      }
      const int64_t y = smaller(next + i, job.out_height - 1);
      const int32_t count = job.down.count[y];
      for (int32_t tap = 0; tap < count; ++tap) taps[tap] = job.image + (job.down.first[y] + tap) * job.stride;
      add_rows(thin + i * job.columns(), taps, 3 * job.width, job.down.weight + y * job.down.taps, count);
      rows[i] = thin + i * job.columns();
    }
    add_across(rows);
    next += kBlock;
  }

  // The horizontal pass of 16 rows, into the store: lanes are rows.
  void add_across(const uint8_t* const* rows) {
    turn(rows);
    uint8_t* lines[kBlock];
    uint8_t* const slot = store + (next - start) % job.ring() * job.line();
    for (int64_t i = 0; i < kBlock; ++i) lines[i] = slot + i * job.line();
    alignas(64) uint8_t tile[3][kBlock][kBlock] = {};
    const uint8_t* tiles[3][kBlock];
    for (int c = 0; c < 3; ++c)
      for (int64_t i = 0; i < kBlock; ++i) tiles[c][i] = tile[c][i];
    const Filter& filter = job.across;
    for (int64_t x = 0; x < job.out_width; ++x) {
      const uint8_t* pixel = turned + filter.first[x] * 3 * kBlock;
      const int32_t* weight = filter.weight + x * filter.taps;
      Sums r = start_sums(), g = r, b = r;
      for (int32_t tap = 0; tap < filter.count[x]; ++tap, pixel += 3 * kBlock) {
        const vi w = splat_i(weight[tap]);
        add_product(r, pixel, w);
        add_product(g, pixel + kBlock, w);
        add_product(b, pixel + 2 * kBlock, w);
      }
      store_bytes(tile[0][x % kBlock], r);
      store_bytes(tile[1][x % kBlock], g);
      store_bytes(tile[2][x % kBlock], b);
      if ((x + 1) % kBlock == 0 || x + 1 == job.out_width)
        for (int c = 0; c < 3; ++c) transpose(tiles[c], 0, lines, c * job.plane() + x / kBlock * kBlock);
    }
  }

  // Output row y, after those above it: out [3][plane].
  void row(int64_t y, uint8_t* out) {
    const Filter& filter = job.down;
    const int64_t line = job.line();
    if (job.down_first) {
      while (next <= y) add_block();
      memcpy(out, store + (y - start) % kBlock * line, static_cast<size_t>(line));
      return;
    }
    const int64_t first = filter.first[y];
    const int32_t count = filter.count[y];
    while (next < first + count) add_block();
    for (int32_t tap = 0; tap < count; ++tap) taps[tap] = store + (first + tap - start) % job.ring() * line;
    add_rows(out, taps, line, filter.weight + y * filter.taps, count);
  }
};

}  // namespace
}  // namespace glimpse::GLIMPSE_ISA_NS

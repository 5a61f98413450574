// SPDX-License-Identifier: Apache-2.0
// What a warp does with a tile of keys and values of one kv head in shared memory, for up to eight query heads at once: logits, online
// softmax in base 2, weighted sum of the values, all in fp32. In 16 bits the two products run on tensor cores, with keys (then
// dimensions) as the sixteen rows and the query heads as the eight columns; in fp32 they are fmaf.
#pragma once

#include "cuda/kernel.cuh"

namespace glimpse::cuda::decode {

constexpr int kTileKeys = 16;
constexpr int kHeads = 8;
constexpr unsigned kWarp = 0xffffffffu;

__device__ __forceinline__ float nothing() { return __int_as_float(static_cast<int>(0xff800000u)); }  // -inf
// The exponent that weights are taken relative to; where there is no key yet, anything but -inf.
__device__ __forceinline__ float shift_of(float top) { return top == nothing() ? 0.0f : top; }

// Sixteen rows of DIM elements, cut into chunks of 16 bytes that lie exchanged within a row so that eight neighbouring rows of a column
// of chunks are in different banks.
template <class T, int DIM>
struct Tile {
  static constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  static constexpr int kChunks = DIM / kElements;
  static constexpr int kRowBytes = 16 * kChunks;
  static constexpr int kBytes = kTileKeys * kRowBytes;
  __device__ static __forceinline__ int place(int row, int chunk) { return row * kRowBytes + ((chunk ^ (row & 7)) << 4); }
};

// Queries in shared memory: kHeads rows of DIM elements, zero beyond what is there, with the next row in other banks.
template <int DIM>
constexpr int kQueryRow = DIM + 8;
// A warp's weighted sums in shared memory: kHeads rows.
template <int DIM>
constexpr int kSumRow = DIM + 4;

template <class T, int DIM>
class Core;

// On tensor cores. A lane has columns (query heads) 2 * (lane % 4) and the next, of rows (keys, dimensions) lane / 4 and that plus 8.
template <class T, int DIM>
class MatrixCore {
 public:
  struct Scratch {};

  __device__ __forceinline__ MatrixCore(const T* queries, float scale, Scratch&) : scale_(scale) {
    const int lane = static_cast<int>(threadIdx.x & 31);
    const T* const row = queries + lane / 4 * kQueryRow<DIM> + 2 * (lane % 4);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      query_[k][0] = *reinterpret_cast<const unsigned*>(row + 16 * k);
      query_[k][1] = *reinterpret_cast<const unsigned*>(row + 16 * k + 8);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum_[k][i] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) top_[i] = nothing(), total_[i] = 0.0f;
  }

  // live: a bit for each key of the tile.
  __device__ __forceinline__ void take(const unsigned char* keys, const unsigned char* values, unsigned live) {
    const int lane = static_cast<int>(threadIdx.x & 31);
    float logits[4] = {0.0f, 0.0f, 0.0f, 0.0f}, others[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // two chains: products take a while
    unsigned a[4], b[2];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      load_matrices<false>(a, keys + Tile<T, DIM>::place(lane % 16, 2 * k + lane / 16));
      multiply_add_matrix<T>(k % 2 == 0 ? logits : others, a, query_[k]);
    }
    const bool first = (live >> (lane / 4)) & 1, second = (live >> (lane / 4 + 8)) & 1;
    float fade[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float& x = logits[i];
      float& y = logits[i + 2];
      x = first ? (x + others[i]) * scale_ : nothing();
      y = second ? (y + others[i + 2]) * scale_ : nothing();
      float top = fmaxf(x, y);
#pragma unroll
      for (int with = 4; with < 32; with *= 2) top = fmaxf(top, __shfl_xor_sync(kWarp, top, with));
      top = fmaxf(top, top_[i]);
      const float shift = shift_of(top);
      fade[i] = exp2f(top_[i] - shift);
      x = exp2f(x - shift);
      y = exp2f(y - shift);
      total_[i] = fmaf(total_[i], fade[i], x + y);
      top_[i] = top;
    }
    b[0] = transpose_matrix(pack_two<T>(logits[0], logits[1]));
    b[1] = transpose_matrix(pack_two<T>(logits[2], logits[3]));
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      load_matrices<true>(a, values + Tile<T, DIM>::place(lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < 4; ++i) sum_[k][i] *= fade[i % 2];
      multiply_add_matrix<T>(sum_[k], a, b);
    }
  }

  // tops, totals: of the heads. sums: kHeads rows of weighted sums, relative to the top, not divided.
  __device__ __forceinline__ void finish(float* tops, float* totals, float* sums) {
    const int lane = static_cast<int>(threadIdx.x & 31);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int head = 2 * (lane % 4) + i;
      float total = total_[i];
#pragma unroll
      for (int with = 4; with < 32; with *= 2) total += __shfl_xor_sync(kWarp, total, with);
      if (lane < 4) {
        tops[head] = top_[i];
        totals[head] = total;
      }
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        sums[head * kSumRow<DIM> + 16 * k + lane / 4] = sum_[k][i];
        sums[head * kSumRow<DIM> + 16 * k + lane / 4 + 8] = sum_[k][i + 2];
      }
    }
  }

 private:
  static constexpr int kSteps = DIM / 16;
  float scale_;
  unsigned query_[kSteps][2];
  float sum_[kSteps][4];
  float top_[2], total_[2];
};

// In fp32. For the logits a lane has one key, and every other chunk of it; after that half of the heads; for the sums one column of chunks
// (of half of the keys, where a row has no more than 16 chunks).
template <int DIM>
class ScalarCore {
 public:
  struct Scratch {
    alignas(16) float weights[kTileKeys + 1][kHeads];  // the last row: what older sums are multiplied by
  };

  __device__ __forceinline__ ScalarCore(const float* queries, float scale, Scratch& scratch)
      : queries_(queries), scratch_(&scratch), scale_(scale) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h)
#pragma unroll
      for (int s = 0; s < kSets; ++s)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum_[h][s][e] = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) top_[j] = nothing(), total_[j] = 0.0f;
  }

  __device__ __forceinline__ void take(const unsigned char* keys, const unsigned char* values, unsigned live) {
    const int lane = static_cast<int>(threadIdx.x & 31), key = lane & 15, half = lane >> 4;
    float dots[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) dots[h] = 0.0f;
#pragma unroll 4
    for (int c = half; c < kChunks; c += 2) {
      const float4 x = *reinterpret_cast<const float4*>(keys + Tile<float, DIM>::place(key, c));
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        const float4 y = *reinterpret_cast<const float4*>(queries_ + h * kQueryRow<DIM> + 4 * c);
        dots[h] = fmaf(x.x, y.x, dots[h]);
        dots[h] = fmaf(x.y, y.y, dots[h]);
        dots[h] = fmaf(x.z, y.z, dots[h]);
        dots[h] = fmaf(x.w, y.w, dots[h]);
      }
    }
    float weights[4], fade[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float mine = half == 0 ? dots[j] : dots[4 + j], given = half == 0 ? dots[4 + j] : dots[j];
      const float dot = mine + __shfl_xor_sync(kWarp, given, 16);
      const float logit = (live >> key) & 1 ? dot * scale_ : nothing();
      float top = logit;
#pragma unroll
      for (int with = 1; with < 16; with *= 2) top = fmaxf(top, __shfl_xor_sync(kWarp, top, with));
      top = fmaxf(top, top_[j]);
      const float shift = shift_of(top);
      fade[j] = exp2f(top_[j] - shift);
      weights[j] = exp2f(logit - shift);
      total_[j] = fmaf(total_[j], fade[j], weights[j]);
      top_[j] = top;
    }
    *reinterpret_cast<float4*>(scratch_->weights[key] + 4 * half) = make_float4(weights[0], weights[1], weights[2], weights[3]);
    if (key == 0)
      *reinterpret_cast<float4*>(scratch_->weights[kTileKeys] + 4 * half) = make_float4(fade[0], fade[1], fade[2], fade[3]);
    __syncwarp();
    float w[kHeads];
    heads(kTileKeys, w);
#pragma unroll
    for (int h = 0; h < kHeads; ++h)
#pragma unroll
      for (int s = 0; s < kSets; ++s)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum_[h][s][e] *= w[h];
#pragma unroll 4
    for (int k = lane / kColumns; k < kTileKeys; k += 32 / kColumns) {
      heads(k, w);
#pragma unroll
      for (int s = 0; s < kSets; ++s) {
        const float4 x = *reinterpret_cast<const float4*>(values + Tile<float, DIM>::place(k, lane % kColumns + kColumns * s));
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          sum_[h][s][0] = fmaf(w[h], x.x, sum_[h][s][0]);
          sum_[h][s][1] = fmaf(w[h], x.y, sum_[h][s][1]);
          sum_[h][s][2] = fmaf(w[h], x.z, sum_[h][s][2]);
          sum_[h][s][3] = fmaf(w[h], x.w, sum_[h][s][3]);
        }
      }
    }
  }

  __device__ __forceinline__ void finish(float* tops, float* totals, float* sums) {
    const int lane = static_cast<int>(threadIdx.x & 31);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float total = total_[j];
#pragma unroll
      for (int with = 1; with < 16; with *= 2) total += __shfl_xor_sync(kWarp, total, with);
      if (lane % 16 == 0) {
        tops[lane / 4 + j] = top_[j];
        totals[lane / 4 + j] = total;
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h)
#pragma unroll
      for (int s = 0; s < kSets; ++s) {
        float x[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          x[e] = sum_[h][s][e];
          if constexpr (kColumns < 32) x[e] += __shfl_xor_sync(kWarp, x[e], kColumns);
        }
        if (lane < kColumns)
          *reinterpret_cast<float4*>(sums + h * kSumRow<DIM> + 4 * (lane + kColumns * s)) = make_float4(x[0], x[1], x[2], x[3]);
      }
  }

 private:
  static constexpr int kChunks = Tile<float, DIM>::kChunks;
  static constexpr int kColumns = kChunks < 32 ? kChunks : 32;
  static constexpr int kSets = kChunks / kColumns;
  static_assert(kColumns >= 16, "sums of halves of the keys are added up, not of quarters");

  __device__ __forceinline__ void heads(int row, float (&w)[kHeads]) const {
    const float4 low = *reinterpret_cast<const float4*>(scratch_->weights[row]);
    const float4 high = *reinterpret_cast<const float4*>(scratch_->weights[row] + 4);
    w[0] = low.x, w[1] = low.y, w[2] = low.z, w[3] = low.w;
    w[4] = high.x, w[5] = high.y, w[6] = high.z, w[7] = high.w;
  }

  const float* queries_;
  Scratch* scratch_;
  float scale_;
  float sum_[kHeads][kSets][4];
  float top_[4], total_[4];
};

template <class T, int DIM>
class Core : public MatrixCore<T, DIM> {
 public:
  using MatrixCore<T, DIM>::MatrixCore;
};
template <int DIM>
class Core<float, DIM> : public ScalarCore<DIM> {
 public:
  using ScalarCore<DIM>::ScalarCore;
};

// Results of parts of a row's keys, joined in the order in which they are added, four columns of one head.
struct Part {
  float top, total;
  float4 sums;
};

template <int AT_ONCE>
struct Joined {
  float top = nothing(), total = 0.0f;
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};

  // read(i) for i = first, first + step, ... below end; AT_ONCE of them are on their way together.
  template <class Read>
  __device__ __forceinline__ void add(int first, int end, int step, Read read) {
    for (int i = first; i < end; i += AT_ONCE * step) {
      Part parts[AT_ONCE];
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) parts[j] = read(min(i + j * step, end - 1));
      float new_top = top;
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j)
        if (i + j * step < end) new_top = fmaxf(new_top, parts[j].top);
      const float shift = shift_of(new_top), fade = exp2f(top - shift);
      top = new_top;
      total *= fade;
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[e] *= fade;
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) {
        if (i + j * step >= end) continue;
        const float weight = exp2f(parts[j].top - shift);
        total = fmaf(weight, parts[j].total, total);
        sums[0] = fmaf(weight, parts[j].sums.x, sums[0]);
        sums[1] = fmaf(weight, parts[j].sums.y, sums[1]);
        sums[2] = fmaf(weight, parts[j].sums.z, sums[2]);
        sums[3] = fmaf(weight, parts[j].sums.w, sums[3]);
      }
    }
  }

  __device__ __forceinline__ float divided(int e) const { return sums[e] / (total == 0.0f ? 1.0f : total); }
};

}  // namespace glimpse::cuda::decode

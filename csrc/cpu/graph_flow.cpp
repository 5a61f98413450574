// SPDX-License-Identifier: Apache-2.0
// Flow along the cosines of a group, one group after the other, its blocks of rows in parallel.
//
// Cosines come in square tiles of kBlock rows. Their matrix is symmetric to the bit (a product of two rows runs over the dimensions in
// the same order whichever comes first), so the share that row i gives to row j is found in row j, and every pass adds along rows: first
// the top and the sum of the softmax of each row, then v once a step. No sum depends on threads.
//
// The tiles of the first rows, as many as fit kKept bytes, are kept: half of them are multiplied, the others are the same transposed, and
// after the first step they hold the shares. Those of the other rows are made again in each pass.
#include "glimpse/graph_flow.h"

#include <stdlib.h>

#include "cpu/tiles.h"

namespace glimpse::GLIMPSE_ISA_NS {
namespace {

constexpr int64_t kBlock = 64;
constexpr int kVectors = kBlock / kLanes;
constexpr int64_t kDepth = 256;                    // cells of a tile's product at a time: both sides stay in the second cache
constexpr int64_t kKept = int64_t{64} << 20;       // bytes: all tiles of 4096 rows
constexpr float kLeastNorm = 1e-12f;
constexpr float kLeastHalf = 1.0f / (1 << 25);     // this and less is zero in float16
constexpr float kNoEdge = -__builtin_inff();

// What one group needs. Arrays of floats are as long as `blocks` blocks; behind the last row they are such that nothing comes of it.
struct Group {
  int64_t n, blocks, cells;  // cells of a unit row
  char* units;               // [n][cells], the left sides of products
  float* packed;             // [blocks][cells][kBlock], the right ones
  float* kept;               // [kept_blocks * kBlock][blocks * kBlock]
  int64_t kept_blocks;
  float* norm;               // NaN for a row that is not finite
  float *top, *sum;          // of the softmax of each row; 0 and 1 where it has no edge
  float *flow, *next;
  int32_t* degrees;
  float threshold, temperature;
  bool half_degree;
};

template <bool rounds>
GLIMPSE_INLINE vf to_dtype(vf x) {
  return rounds ? rounded_to_bf16(x) : x;
}

// Norm, unit row and, when a block is there, its columns. Unit: what products are made of.
template <class T, class Unit, bool rounds>
void make_units(const Group& g, const T* features, int64_t stride, int64_t dim, int64_t block) {
  const Unit* columns[kBlock];
  const int64_t begin = block * kBlock, end = smaller(begin + kBlock, g.n);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = features + row * stride;
    Unit* unit = reinterpret_cast<Unit*>(g.units + row * g.cells * 4);
    columns[row - begin] = unit;
    float norm = __builtin_sqrtf(dot(x, x, dim));
    if (rounds) norm = to_float(to_bf16(norm));
    const bool fine = __builtin_isfinite(norm);
    g.norm[row] = fine ? norm : __builtin_nanf("");
    g.flow[row] = fine ? norm : 0.0f;
    memset(unit, 0, static_cast<size_t>(g.cells * 4));
    if (!fine) continue;
    const vf length = splat(larger(norm, kLeastNorm));
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) store(unit + d, to_dtype<rounds>(load(x + d) / length));
    const int left = static_cast<int>(dim - d);
    if (left > 0) store_n(unit + d, to_dtype<rounds>(load_n(x + d, left) / length), left);
  }
  float* packed = g.packed + block * g.cells * kBlock;
  for (int lane = 0; lane < kBlock; lane += kLanes)
    pack_columns(columns + lane, static_cast<int>(larger<int64_t>(0, smaller<int64_t>(kLanes, end - begin - lane))), dim,
                 packed + lane, kBlock);
}

// Logits of the rows of one block against those of another, kNoEdge where there is none.
template <class Unit, bool rounds>
void make_tile(const Group& g, int64_t block, int64_t other, float* tile) {
  const int64_t first = block * kBlock, rows = smaller(kBlock, g.n - first);
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t cell = 0; cell == 0 || cell < g.cells; cell += kDepth) {
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = rows * t / tiles;
      const int height = static_cast<int>(rows * (t + 1) / tiles - row);
      multiply<Unit>({g.units + ((first + row) * g.cells + cell) * 4, g.cells * 4,
                      g.packed + (other * g.cells + cell) * kBlock, kBlock, smaller(kDepth, g.cells - cell), nullptr,
                      tile + row * kBlock, kBlock, cell > 0},
                     height, kVectors);
    }
  }
  const vf threshold = splat(g.threshold), temperature = splat(g.temperature), none = splat(kNoEdge);
  for (float* at = tile; at < tile + rows * kBlock; at += kLanes) {
    const vf similar = to_dtype<rounds>(load(at));
    store(at, select(similar >= threshold, to_dtype<rounds>(similar / temperature), none));
  }
  for (float* at = tile + rows * kBlock; at < tile + kBlock * kBlock; at += kLanes) store(at, none);
}

// Puts a tile at its place among the kept ones, and its transpose at its own if it has one.
void keep_tile(const Group& g, int64_t block, int64_t other, const float* tile) {
  const int64_t width = g.blocks * kBlock;
  for (int64_t row = 0; row < kBlock; row += kLanes) {
    for (int64_t column = 0; column < kBlock; column += kLanes) {
      vf lines[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        lines[i] = load(tile + (row + i) * kBlock + column);
        store(g.kept + (block * kBlock + row + i) * width + other * kBlock + column, lines[i]);
      }
      if (block == other || other >= g.kept_blocks) continue;
      transpose(lines);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(g.kept + (other * kBlock + column + i) * width + block * kBlock + row, lines[i]);
    }
  }
}

// A tile to read (and, if kept, to change): its rows are `stride` floats apart.
template <class Unit, bool rounds>
GLIMPSE_INLINE float* find_tile(const Group& g, int64_t block, int64_t other, float* memory, int64_t* stride) {
  if (block < g.kept_blocks) {
    *stride = g.blocks * kBlock;
    return g.kept + block * kBlock * *stride + other * kBlock;
  }
  *stride = kBlock;
  make_tile<Unit, rounds>(g, block, other, memory);
  return memory;
}

// Top and sum of the softmax of a block's rows, and their edges.
template <class Unit, bool rounds>
void find_sums(const Group& g, int64_t block) {
  float memory[kBlock * kBlock] __attribute__((aligned(64)));
  vf sums[kBlock];
  float tops[kBlock];
  int32_t edges[kBlock];
  const int64_t first = block * kBlock, rows = smaller(kBlock, g.n - first);
  for (int64_t r = 0; r < rows; ++r) {
    sums[r] = vf{};
    tops[r] = kNoEdge;
    edges[r] = 0;
  }
  for (int64_t other = 0; other < g.blocks; ++other) {
    int64_t stride;
    const float* tile = find_tile<Unit, rounds>(g, block, other, memory, &stride);
    for (int64_t r = 0; r < rows; ++r) {
      vf x[kVectors], best = splat(kNoEdge);
      vi found{};
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) {
        x[j] = load(tile + r * stride + j * kLanes);
        best = vmax(x[j], best);
        found += x[j] > splat(kNoEdge);  // -1 a lane
      }
      const float here = hmax(best);
      if (here == kNoEdge) continue;
      for (int lane = 0; lane < kLanes; ++lane) edges[r] -= found[lane];
      if (here > tops[r]) {
        sums[r] = sums[r] * vexp(splat(tops[r] - here));
        tops[r] = here;
      }
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) sums[r] += vexp(x[j] - splat(tops[r]));
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    g.top[first + r] = edges[r] > 0 ? tops[r] : 0.0f;
    g.sum[first + r] = edges[r] > 0 ? hsum(sums[r]) : 1.0f;
    g.degrees[first + r] = edges[r];
  }
}

enum class Pass { kFirst, kLater };  // of those that add up: in the first one kept tiles hold logits, later shares

// What flows to the rows of a block.
template <class Unit, bool rounds, Pass pass>
void add_up(const Group& g, int64_t block) {
  float memory[kBlock * kBlock] __attribute__((aligned(64)));
  vf sums[kBlock];
  int32_t counts[kBlock];
  const bool given = pass == Pass::kLater && block < g.kept_blocks;  // shares, not logits
  const bool counting = pass == Pass::kFirst && g.half_degree;
  const int64_t first = block * kBlock, rows = smaller(kBlock, g.n - first);
  for (int64_t r = 0; r < rows; ++r) {
    sums[r] = vf{};
    counts[r] = 0;
  }
  for (int64_t other = 0; other < g.blocks; ++other) {
    int64_t stride;
    float* tile = find_tile<Unit, rounds>(g, block, other, memory, &stride);
    const float *flow = g.flow + other * kBlock, *top = g.top + other * kBlock, *sum = g.sum + other * kBlock;
    for (int64_t r = 0; r < rows; ++r) {
      float* row = tile + r * stride;
      if (given) {
#pragma GCC unroll 16
        for (int j = 0; j < kVectors; ++j) sums[r] = fma(load(row + j * kLanes), load(flow + j * kLanes), sums[r]);
        continue;
      }
      vi found{};
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) {
        const vf logit = load(row + j * kLanes);
        if (counting) {
          const vf own = vexp(logit - splat(g.top[first + r])) / splat(g.sum[first + r]);
          found += own > splat(kLeastHalf);
        }
        const vf share = to_dtype<rounds>(vexp(logit - load(top + j * kLanes)) / load(sum + j * kLanes));
        sums[r] = fma(share, load(flow + j * kLanes), sums[r]);
        store(row + j * kLanes, share);
      }
      if (counting)
        for (int lane = 0; lane < kLanes; ++lane) counts[r] -= found[lane];
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    g.next[first + r] = hsum(sums[r]);
    if (counting) g.degrees[first + r] = counts[r];
  }
}

// Memory for the largest group, one allocation.
struct Memory {
  char* base;
  bool lay_out(Group& g, int64_t cells) {
    const int64_t length = g.blocks * kBlock;
    g.cells = cells;
    g.kept_blocks = smaller(g.blocks, kKept / (kBlock * length * 4));
    const int64_t kept = g.kept_blocks * kBlock * length;
    const int64_t bytes = round_up(g.n * cells * 4, 64) + (length * (cells + 5) + kept) * 4;
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, static_cast<size_t>(bytes + 64)) != 0) return false;
    char* at = base = static_cast<char*>(memory);
    g.units = at;
    at += round_up(g.n * cells * 4, 64);
    const auto take = [&](int64_t floats) {
      float* taken = reinterpret_cast<float*>(at);
      at += floats * 4;
      return taken;
    };
    g.packed = take(length * cells);
    g.norm = take(length);
    g.top = take(length);
    g.sum = take(length);
    g.flow = take(length);
    g.next = take(length);
    g.kept = take(kept);
    for (int64_t i = g.n; i < length; ++i) {
      g.top[i] = g.flow[i] = g.next[i] = 0.0f;
      g.sum[i] = 1.0f;
    }
    return true;
  }
};

template <class T, class Unit, bool rounds>
bool run_group(const glimpse_graph_flow_params& p, int64_t begin, int64_t end) {
  Group g{};
  g.n = end - begin;
  g.blocks = (g.n + kBlock - 1) / kBlock;
  g.degrees = p.degrees + begin;
  // What is rounded to zero would otherwise be no less than the threshold.
  g.threshold = larger(p.threshold, 1.17549435e-38f);
  g.temperature = p.temperature;
  g.half_degree = p.half_degree != 0;
  Memory memory;
  if (!memory.lay_out(g, cells_of<Unit>(p.dim))) return false;
  const T* features = static_cast<const T*>(p.features) + begin * p.stride;
  parallel_for(g.blocks, [&](int64_t block) { make_units<T, Unit, rounds>(g, features, p.stride, p.dim, block); });
  const int64_t halves = g.kept_blocks * (g.kept_blocks - 1) / 2;
  parallel_for(g.kept_blocks * g.blocks - halves, [&](int64_t task) {
    float tile[kBlock * kBlock] __attribute__((aligned(64)));
    int64_t block = 0;  // row by row of the upper triangle
    for (int64_t left = g.blocks; task >= left; --left, ++block) task -= left;
    make_tile<Unit, rounds>(g, block, block + task, tile);
    keep_tile(g, block, block + task, tile);
  });
  parallel_for(g.blocks, [&](int64_t block) { find_sums<Unit, rounds>(g, block); });
  for (int64_t step = 0; step < p.steps || (step == 0 && g.half_degree); ++step) {
    if (step == 0)
      parallel_for(g.blocks, [&](int64_t block) { add_up<Unit, rounds, Pass::kFirst>(g, block); });
    else
      parallel_for(g.blocks, [&](int64_t block) { add_up<Unit, rounds, Pass::kLater>(g, block); });
    if (step < p.steps) {
      float* swap = g.flow;
      g.flow = g.next;
      g.next = swap;
    }
  }
  for (int64_t i = 0; i < g.n; ++i)
    p.scores[begin + i] = g.norm[i] != g.norm[i] ? g.norm[i] : g.flow[i] / static_cast<float>(larger(1, g.degrees[i]));
  free(memory.base);
  return true;
}

template <class T, class Unit, bool rounds>
glimpse_status run(const glimpse_graph_flow_params& p) {
  for (int64_t i = 0; i < p.rows; ++i) {
    p.scores[i] = 0.0f;
    p.degrees[i] = 0;
  }
  for (int64_t group = 0; group < p.groups; ++group) {
    const int64_t begin = p.cu_seqlens[group], end = p.cu_seqlens[group + 1];
    if (begin < end && !run_group<T, Unit, rounds>(p, begin, end))
      return fail(GLIMPSE_OUT_OF_MEMORY, "graph_flow: no memory for %lld rows", static_cast<long long>(end - begin));
  }
  return GLIMPSE_OK;
}

}  // namespace

glimpse_status graph_flow(const glimpse_graph_flow_params& p) {
  for (int64_t i = 0; i <= p.groups; ++i) {
    const int64_t least = i > 0 ? p.cu_seqlens[i - 1] : 0;
    if (p.cu_seqlens[i] < least || p.cu_seqlens[i] > p.rows)
      return fail(GLIMPSE_INVALID, "graph_flow: cu_seqlens[%lld]: expected a value in [%lld, %lld], found %d",
                  static_cast<long long>(i), static_cast<long long>(least), static_cast<long long>(p.rows), p.cu_seqlens[i]);
  }
  if (p.dtype != GLIMPSE_BFLOAT16) return run<float, float, false>(p);
  if (!p.rounded) return run<bf16, float, false>(p);
  // Products of bf16 where the machine has them; elsewhere of floats that hold the same.
#if defined(__AVX512BF16__)
  return run<bf16, bf16, true>(p);
#else
  return run<bf16, float, true>(p);
#endif
}

}  // namespace glimpse::GLIMPSE_ISA_NS

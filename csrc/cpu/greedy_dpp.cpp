// SPDX-License-Identifier: Apache-2.0
// Greedy inference of a determinantal point process, a group a thread, with as few steps of as few columns as the picks depend on.
//
// A gain never rises: each pick takes a square away. So a gain of some picks ago bounds today's from above (M. Minoux, Accelerated greedy algorithms for
// maximizing submodular set functions, 1978), and columns whose bound is below the best gain wait. They do so in tiles of a few vectors; a tile that
// catches up takes its missed picks one after the other, from its own part of the vectors c, which lies together. A column goes
// through the same operations in the same order whenever that is, so the result is that of doing everything at once, to the bit.
#include "glimpse/greedy_dpp.h"

#include "cpu/greedy.h"

namespace glimpse::GLIMPSE_ISA_NS {
namespace {

constexpr int kWide = 8;  // vectors of a tile
constexpr int kTile = kWide * kLanes;
#if defined(__AVX512F__)
constexpr int kTogether = 2;  // picks that a tile takes at once, as many as there are registers for
#else
constexpr int kTogether = 1;
#endif
constexpr int64_t kAhead = 8;  // picks whose rows of the matrix are asked for early

// The product, rounded: the compiler may not make one operation of it and of what follows.
GLIMPSE_INLINE vf product(vf a, vf b) {
  vf found = a * b;
#if defined(__x86_64__)
  asm("" : "+x"(found));
#elif defined(__aarch64__)
  asm("" : "+w"(found));
#else
  volatile vf kept = found;
  found = kept;
#endif
  return found;
}

struct Tile {
  float best;    // the highest gain of a token that may be picked, when the tile was last looked at; 0: there is none
  int32_t at;    // its lane
  int64_t done;  // picks that its gains know of
};

// What a group needs; columns behind the last one are never picked.
struct State {
  int64_t n, count, tiles;
  const float* matrix;
  Tile* tile;
  float *quality, *gain, *floor;  // [tiles, kTile]
  float* factors;                 // [tiles, count, kTile], the vectors c
  float* chosen;                  // c of each pick before it: 0 of the first one, 1 of the second, ..
  float* root;                    // [count], of the gain of each pick
  int64_t* picks;                 // [count]
};

// Lanes of a vector that are columns of the group.
GLIMPSE_INLINE int lanes_at(const State& s, int64_t column) {
  return static_cast<int>(larger<int64_t>(0, smaller<int64_t>(kLanes, s.n - column)));
}

GLIMPSE_INLINE const float* row_at(const State& s, int64_t step, int64_t column) { return s.matrix + s.picks[step] * s.n + column; }

// The first of the largest gains in a tile that are above the floor; a comparison with NaN is false.
void look(const State& s, int64_t number) {
  const int64_t column = number * kTile;
  vf gains[kWide], most = vf{};
  for (int i = 0; i < kWide; ++i) {
    const vf gain = load(s.gain + column + i * kLanes);
    gains[i] = select(gain > load(s.floor + column + i * kLanes), gain, vf{});
    most = vmax(most, gains[i]);
  }
  Tile& tile = s.tile[number];
  tile.best = hmax(most);
  float lanes[kTile];
  for (int i = 0; i < kWide; ++i) store(lanes + i * kLanes, gains[i]);
  for (tile.at = 0; lanes[tile.at] != tile.best; ++tile.at) {
  }
}

// Takes kSteps picks from `step` on: their sums over the picks before them share what they read.
template <int kSteps>
GLIMPSE_INLINE void take(const State& s, int64_t column, float* factors, int64_t step, vf (&gain)[kWide]) {
  const float* chosen[kSteps];
  vf sum[kSteps][kWide];
#pragma GCC unroll 2
  for (int k = 0; k < kSteps; ++k) {
    chosen[k] = s.chosen + (step + k) * (step + k - 1) / 2;
#pragma GCC unroll 8
    for (int i = 0; i < kWide; ++i) sum[k][i] = vf{};
  }
  for (int64_t before = 0; before < step; ++before) {
    const float* const c = factors + before * kTile;
#pragma GCC unroll 8
    for (int i = 0; i < kWide; ++i) {
      const vf at = load(c + i * kLanes);
#pragma GCC unroll 2
      for (int k = 0; k < kSteps; ++k) sum[k][i] = fma(splat(chosen[k][before]), at, sum[k][i]);
    }
  }
#pragma GCC unroll 2
  for (int k = 0; k < kSteps; ++k) {
    const vf own = splat(s.quality[s.picks[step + k]]), root = splat(s.root[step + k]);
#pragma GCC unroll 8
    for (int i = 0; i < kWide; ++i) {
      const int64_t at = column + i * kLanes;
      const vf similar = load_some(row_at(s, step + k, at), lanes_at(s, at));
      const vf c = (product(product(own, similar), load(s.quality + at)) - sum[k][i]) / root;
      store(factors + (step + k) * kTile + i * kLanes, c);
      gain[i] = gain[i] - product(c, c);
      if (k + 1 < kSteps) sum[kSteps - 1][i] = fma(splat(chosen[kSteps - 1][step]), c, sum[kSteps - 1][i]);
    }
  }
}

// Takes the picks that a tile does not know of.
void catch_up(const State& s, int64_t number, int64_t picked) {
  const int64_t column = number * kTile;
  Tile& tile = s.tile[number];
  float* const factors = s.factors + number * s.count * kTile;
  const auto prefetch = [&](int64_t step) {
    for (int i = 0; i < kWide; ++i) __builtin_prefetch(row_at(s, step, column + i * kLanes));
  };
  int64_t step = tile.done;
  for (int64_t early = step; early < smaller(picked, step + kAhead); ++early) prefetch(early);
  vf gain[kWide];
  for (int i = 0; i < kWide; ++i) gain[i] = load(s.gain + column + i * kLanes);
  for (; step + kTogether <= picked; step += kTogether) {
    for (int64_t later = step + kAhead; later < smaller(picked, step + kAhead + kTogether); ++later) prefetch(later);
    take<kTogether>(s, column, factors, step, gain);
  }
  for (; step < picked; ++step) take<1>(s, column, factors, step, gain);
  for (int i = 0; i < kWide; ++i) store(s.gain + column + i * kLanes, gain[i]);
  tile.done = picked;
  look(s, number);
}

// The next pick, with its tile caught up; -1 if none is left.
int64_t best_column(const State& s, int64_t picked) {
  int64_t best = 0;
  for (int64_t i = 1; i < s.tiles; ++i)
    if (s.tile[i].best > s.tile[best].best) best = i;
  // The highest bound is likely to be the best gain still. Afterwards only those above it are looked at, and those before it that tie.
  if (s.tile[best].best > 0 && s.tile[best].done < picked) catch_up(s, best, picked);
  for (int64_t i = 0; i < s.tiles; ++i) {
    const auto beats = [&] { return s.tile[i].best > s.tile[best].best || (s.tile[i].best == s.tile[best].best && i < best); };
    if (s.tile[i].best == 0 || !beats()) continue;
    if (s.tile[i].done < picked) catch_up(s, i, picked);
    if (beats()) best = i;
  }
  return s.tile[best].best > 0 ? best * kTile + s.tile[best].at : -1;
}

size_t layout(State& s, void* memory) {
  Room room{static_cast<unsigned char*>(memory)};
  const int64_t columns = s.tiles * kTile;
  s.quality = room.of<float>(columns);
  s.gain = room.of<float>(columns);
  s.floor = room.of<float>(columns);
  s.tile = room.of<Tile>(s.tiles);
  s.picks = room.of<int64_t>(s.count);
  s.root = room.of<float>(s.count);
  s.chosen = room.of<float>(s.count * (s.count - 1) / 2);
  s.factors = room.of<float>(columns * s.count);
  return room.used;
}

// false if there is no memory.
bool pick_tokens(const glimpse_greedy_dpp_params& p, const Group& group) {
  State s{};
  s.n = group.n;
  s.count = smaller(group.count, group.n);
  s.tiles = (s.n + kTile - 1) / kTile;
  s.matrix = p.similarity + group.offset;
  if (s.count == 0) return true;
  void* const memory = thread_scratch(layout(s, nullptr));
  if (memory == nullptr) return false;
  layout(s, memory);

  const int64_t columns = s.tiles * kTile;
  for (int64_t j = 0; j < columns; ++j) {
    s.quality[j] = j < s.n ? p.relevance[group.first + j] : 0.0f;
    s.gain[j] = j < s.n ? s.matrix[j * s.n + j] : 0.0f;
  }
  for (int64_t j = 0; j < columns; j += kLanes) {
    const vf quality = load(s.quality + j), gain = product(product(quality, load(s.gain + j)), quality);
    store(s.gain + j, gain);
    store(s.floor + j, splat(p.eps) * gain);
  }
  for (int64_t i = 0; i < s.tiles; ++i) {
    s.tile[i].done = 0;
    look(s, i);
  }
  for (int64_t t = 0; t < s.count; ++t) {
    const int64_t pick = best_column(s, t);
    if (pick < 0) break;
    p.picks[group.place + t] = static_cast<int32_t>(group.first + pick);
    p.keep[group.first + pick] = 1;
    s.picks[t] = pick;
    s.root[t] = __builtin_sqrtf(s.gain[pick]);
    const float* const factors = s.factors + pick / kTile * s.count * kTile + pick % kTile;
    for (int64_t i = 0; i < t; ++i) s.chosen[t * (t - 1) / 2 + i] = factors[i * kTile];
    s.floor[pick] = kInfinity;  // not again
    look(s, pick / kTile);
  }
  return true;
}

}  // namespace

glimpse_status greedy_dpp(const glimpse_greedy_dpp_params& p) {
  const Packed packed{"greedy_dpp", p.cu_seqlens, p.cu_picks, p.entries, p.groups, p.tokens, p.capacity, p.longest};
  if (check_packed(packed, "cu_picks") != GLIMPSE_OK) return GLIMPSE_INVALID;
  clear(p.picks, p.capacity, p.keep, p.tokens);
  bool memory = true;  // only ever set to false, by whichever thread
  const int64_t picks = p.groups > 0 ? smaller<int64_t>(p.capacity, p.cu_picks[p.groups]) / p.groups : 0;
  parallel_range(p.groups, packed.grain(p.tokens * picks), [&](int64_t begin, int64_t end) {
    for (Group group = packed.start(); packed.next(group, end);)
      if (packed.wanted(group, begin) && !pick_tokens(p, group)) __atomic_store_n(&memory, false, __ATOMIC_RELAXED);
  });
  if (memory) return GLIMPSE_OK;
  return fail(GLIMPSE_OUT_OF_MEMORY, "greedy_dpp: no scratch memory for %lld picks of %lld tokens", static_cast<long long>(p.capacity),
              static_cast<long long>(p.tokens));
}

}  // namespace glimpse::GLIMPSE_ISA_NS

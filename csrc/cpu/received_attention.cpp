// SPDX-License-Identifier: Apache-2.0
// Column sums of a softmax matrix. One task is a block of keys of one segment with all queries and heads: nobody else writes
// the sums of these keys, and the queries are added in one order, by blocks that start where their segment starts. So neither
// the threads, nor the size of the block of keys, nor the neighbours change a bit. Keys are vector lanes: the sum over
// queries goes straight down.
#include "glimpse/received_attention.h"

#include <stdlib.h>

#include "cpu/attention_core.h"
#include "cpu/segments.h"

namespace glimpse::GLIMPSE_ISA_NS {
namespace {

constexpr int64_t kQueries = 96;  // of a block: their cells stay in the first cache
constexpr float kLog2E = 1.44269504088896340736f;

struct Plan {
  int64_t per_key;     // query heads a key head
  int64_t block;       // keys of a task, a multiple of kKeys
  int64_t* starts;     // [segments + 1]: tasks before each segment
  float* received;     // [k_rows], sums over heads
  int64_t query_cells;
};

// Queries of one block and one head that give anything, and the sums of a task's keys.
struct Block {
  float* query;    // [kQueries][query_cells]
  float* lse;      // [kQueries]
  int64_t* limit;  // [kQueries]: number of keys of the segment that the query sees
  int64_t count;
  float* sums;     // [block] over this block of queries: long sums are made of short ones
};

// Number of keys of the segment that a query row sees.
GLIMPSE_INLINE int64_t visible(const glimpse_received_attention_params& p, int64_t row, int64_t index, int64_t queries,
                               int64_t keys) {
  if (!p.causal) return keys;
  const int64_t last = p.q_positions != nullptr ? p.q_positions[row] : index + keys - queries;
  return last < 0 ? 0 : smaller(last + 1, keys);
}

// Adds the weights of `height` rows (logits kKeys a row, without the scale) to the sums of `vectors` vectors of keys, of which
// the first is `key` of the segment. masked: some row does not see all of them.
template <bool masked>
GLIMPSE_INLINE void add_weights(const Block& block, int64_t first, int height, const float* logits, int vectors, int64_t key,
                                float scale, float* sums) {
  for (int j = 0; j < vectors; ++j) {
    vf sum = load(sums + j * kLanes);
    for (int i = 0; i < height; ++i) {
      // the difference comes before the factor of the base: logits and lse may be large and near to each other
      const vf x = load(logits + i * kKeys + j * kLanes) * scale - block.lse[first + i];
      vf weight = weight_exp2<false>(x * kLog2E);
      if (masked) {
        const int32_t seen = static_cast<int32_t>(smaller<int64_t>(block.limit[first + i] - key, kKeys));
        weight = select(lane_index() + splat_i(j * kLanes) < splat_i(seen), weight, vf{});
      }
      sum = sum + weight;
    }
    store(sums + j * kLanes, sum);
  }
}

// The block's queries against `count` keys of one packed tile, of which the first is `key` of the segment.
template <class T>
void add_tile(const Block& block, int64_t query_cells, const float* keys, int64_t key, int64_t count, float scale, float* sums) {
  float logits[kTileRows * kKeys] __attribute__((aligned(64)));
  const int64_t tiles = (block.count + kTileRows - 1) / kTileRows;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = block.count * tile / tiles;
    const int height = static_cast<int>(block.count * (tile + 1) / tiles - first);
    int64_t least = block.limit[first], most = least;
    for (int i = 1; i < height; ++i) {
      least = smaller(least, block.limit[first + i]);
      most = larger(most, block.limit[first + i]);
    }
    const int64_t seen = smaller(count, most - key);
    if (seen <= 0) continue;
    const int vectors = static_cast<int>((seen + kLanes - 1) / kLanes);
    multiply<T>({bytes_of(block.query + first * query_cells), query_cells * 4, keys, kKeys, query_cells, nullptr, logits, kKeys},
                height, vectors);
    if (least - key >= count)
      add_weights<false>(block, first, height, logits, vectors, key, scale, sums);
    else
      add_weights<true>(block, first, height, logits, vectors, key, scale, sums);
  }
}

template <class T>
bool run_task(const glimpse_received_attention_params& p, const Plan& plan, int64_t task) {
  const int64_t segment = find_segment(plan.starts, p.segments, task);
  const int64_t q0 = p.cu_q[segment], queries = p.cu_q[segment + 1] - q0;
  const int64_t k0 = p.cu_k[segment], keys = p.cu_k[segment + 1] - k0;
  const int64_t begin = (task - plan.starts[segment]) * plan.block, end = smaller(begin + plan.block, keys);
  const int64_t padded = round_up(end - begin, kKeys), key_tiles = padded / kKeys;

  const int64_t floats = padded * plan.query_cells + kQueries * (plan.query_cells + 3) + 3 * padded;
  char* memory = static_cast<char*>(thread_scratch(static_cast<size_t>(floats * 4 + 8 * 64)));
  if (memory == nullptr) return false;
  auto take = [&](int64_t count) {
    float* taken = reinterpret_cast<float*>(memory);
    memory += round_up(count * 4, 64);
    return taken;
  };
  float* packed = take(padded * plan.query_cells);
  Block block;
  block.query = take(kQueries * plan.query_cells);
  block.lse = take(kQueries);
  block.limit = reinterpret_cast<int64_t*>(take(2 * kQueries));
  block.sums = take(padded);
  float* head_sums = take(padded);
  float* total = take(padded);
  memset(total, 0, static_cast<size_t>(padded * 4));

  for (int64_t head = 0; head < p.q_heads; ++head) {
    if (head % plan.per_key == 0) {
      const T* k = static_cast<const T*>(p.k) + k0 * p.k_stride + head / plan.per_key * p.k_head_stride;
      for (int64_t tile = 0; tile < key_tiles; ++tile) {
        const int64_t key = begin + tile * kKeys;
        const T* rows[kKeys];
        const int count = static_cast<int>(smaller<int64_t>(kKeys, end - key));
        for (int i = 0; i < count; ++i) rows[i] = k + (key + i) * p.k_stride;
        pack_keys(rows, count, p.dim, packed + tile * kKeys * plan.query_cells);
      }
    }
    memset(head_sums, 0, static_cast<size_t>(padded * 4));
    for (int64_t top = 0; top < queries; top += kQueries) {
      block.count = 0;
      for (int64_t index = top; index < smaller(top + kQueries, queries); ++index) {
        const int64_t row = q0 + index, limit = visible(p, row, index, queries, keys);
        const float lse = p.lse[row * p.lse_stride + head * p.lse_head_stride];
        if (limit <= begin || lse == -__builtin_inff()) continue;
        pack_query(static_cast<const T*>(p.q) + row * p.q_stride + head * p.q_head_stride, p.dim, 1.0f,
                   block.query + block.count * plan.query_cells);
        block.lse[block.count] = lse;
        block.limit[block.count++] = limit;
      }
      if (block.count == 0) continue;
      memset(block.sums, 0, static_cast<size_t>(padded * 4));
      for (int64_t tile = 0; tile < key_tiles; ++tile) {
        const int64_t key = begin + tile * kKeys;
        add_tile<T>(block, plan.query_cells, packed + tile * kKeys * plan.query_cells, key, smaller<int64_t>(kKeys, end - key),
                    p.scale, block.sums + tile * kKeys);
      }
      for (int64_t j = 0; j < padded; j += kLanes) store(head_sums + j, load(head_sums + j) + load(block.sums + j));
    }
    for (int64_t j = 0; j < padded; j += kLanes) store(total + j, load(total + j) + load(head_sums + j));
  }
  memcpy(plan.received + k0 + begin, total, static_cast<size_t>((end - begin) * 4));
  return true;
}

// Means over heads and over groups of keys, each to its place.
void write_out(const glimpse_received_attention_params& p, const float* received) {
  const float heads = static_cast<float>(p.q_heads), group = static_cast<float>(p.group);
  for (int64_t token = 0; token < p.k_rows / p.group; ++token) {
    float sum = 0.0f;
    for (int64_t i = 0; i < p.group; ++i) sum += received[token * p.group + i] / heads;
    p.out[p.order != nullptr ? p.order[token] : token] = sum / group;
  }
}

template <class T>
glimpse_status run(const glimpse_received_attention_params& p) {
  Plan plan;
  plan.per_key = p.q_heads / p.kv_heads;
  plan.query_cells = cells_of<T>(p.dim);
  // Many keys a task share the packing of queries; few tasks a thread leave threads idle.
  const int64_t target = p.cu_k[p.segments] / (4 * static_cast<int64_t>(num_threads()));
  plan.block = round_up(larger<int64_t>(kKeys, smaller<int64_t>(target, 4 * kKeys)), kKeys);
  plan.starts = static_cast<int64_t*>(malloc(sizeof(int64_t) * static_cast<size_t>(p.segments + 1)));
  plan.received = static_cast<float*>(calloc(static_cast<size_t>(p.k_rows + 1), sizeof(float)));
  bool short_of_memory = plan.starts == nullptr || plan.received == nullptr;
  if (!short_of_memory) {
    count_blocks(p.cu_k, p.segments, plan.block, plan.starts);
    parallel_for(plan.starts[p.segments], [&](int64_t task) {  // only ever set to true, by whichever thread
      if (!run_task<T>(p, plan, task)) __atomic_store_n(&short_of_memory, true, __ATOMIC_RELAXED);
    });
  }
  if (!short_of_memory) write_out(p, plan.received);
  free(plan.starts);
  free(plan.received);
  return short_of_memory ? fail(GLIMPSE_OUT_OF_MEMORY, "received_attention: no scratch memory") : GLIMPSE_OK;
}

}  // namespace

glimpse_status received_attention(const glimpse_received_attention_params& p) {
  glimpse_status status = check_bounds("received_attention", "cu_seqlens_q", p.cu_q, p.segments, p.q_rows);
  if (status == GLIMPSE_OK) status = check_bounds("received_attention", "cu_seqlens_k", p.cu_k, p.segments, p.k_rows);
  if (status != GLIMPSE_OK) return status;
  const int64_t tokens = p.k_rows / p.group;
  for (int64_t token = 0; p.order != nullptr && token < tokens; ++token)
    if (p.order[token] < 0 || p.order[token] >= tokens)
      return fail(GLIMPSE_INVALID, "received_attention: order[%lld]: expected a place in [0, %lld), found %d",
                  static_cast<long long>(token), static_cast<long long>(tokens), p.order[token]);
  return p.dtype == GLIMPSE_BFLOAT16 ? run<bf16>(p) : run<float>(p);
}

}  // namespace glimpse::GLIMPSE_ISA_NS

// SPDX-License-Identifier: Apache-2.0
// Tests of the emulation itself, the program glimpse_emulation_tests: kernels with the mistakes that it has to notice, and what CUDA says
// its operations do. The last ones, sanitizer_*, pass by themselves; what counts is that the sanitizer complains, or does not.
#include <string>

#include "cuda/kernel.cuh"
#include "cuda/tests/harness.h"
#include "glimpse/cuda_emulated.h"

namespace glimpse::tests {
namespace {

using namespace glimpse::cuda;

constexpr unsigned kAll = 0xffffffffu, kGarbage = 0xffffffffu;
constexpr int64_t kOrders = 6;

Launch blocks(unsigned grid, unsigned threads) {
  Launch how;
  how.grid.x = grid;
  how.block.x = threads;
  return how;
}

void expect_failure(glimpse_status status, const char* words) {
  const std::string found = glimpse_last_error();
  expect(status == GLIMPSE_DEVICE, "status %d", static_cast<int>(status));
  expect(found.find(words) != std::string::npos, "expected \"... %s ...\", found \"%s\"", words, found.c_str());
}

std::vector<unsigned> counting(size_t count, unsigned (*f)(unsigned)) {
  std::vector<unsigned> found;
  for (unsigned i = 0; i < count; ++i) found.push_back(f(i));
  return found;
}

// The results of a launch in each order of threads; whether all of them are `wanted`.
template <class Start>
bool always(const Buffer<unsigned>& out, const std::vector<unsigned>& wanted, Start start) {
  bool same = true;
  for (int64_t order = 0; order < kOrders; ++order) {
    glimpse_emulated_set_order(order);
    expect_ok(start());
    same = same && out.read() == wanted;
  }
  glimpse_emulated_set_order(-1);
  return same;
}

// ---- Barriers and the order of threads -------------------------------------------------------------------------------------

struct Words {
  unsigned at[64];
};

template <bool BARRIER>
__global__ void rotate_kernel(unsigned* out) {
  SHARED(Words, words);
  words.at[threadIdx.x] = threadIdx.x;
  if (BARRIER) __syncthreads();
  out[threadIdx.x] = words.at[(threadIdx.x + 33) % 64];
}

// A barrier between writing and reading, and none between reading and writing again.
template <bool BARRIER>
__global__ void rotate_twice_kernel(unsigned* out) {
  SHARED(Words, words);
  unsigned mine = threadIdx.x;
  for (int i = 0; i < 2; ++i) {
    words.at[threadIdx.x] = mine;
    __syncthreads();
    mine = words.at[(threadIdx.x + 33) % 64];
    if (BARRIER) __syncthreads();
  }
  out[threadIdx.x] = mine;
}

template <bool BARRIER>
__global__ void cluster_kernel(unsigned* out) {
  SHARED(Words, words);
  words.at[threadIdx.x] = blockIdx.x * 64 + threadIdx.x;
  if (BARRIER) cluster_sync();
  const unsigned next = (cluster_rank() + 1) % cluster_size();
  out[blockIdx.x * 64 + threadIdx.x] = cluster_shared(words.at, next)[threadIdx.x];
  if (BARRIER) cluster_sync();  // the others are not through with this block's memory
}

// Hands words on over the barrier that orders no memory; or over one that does, and leaves over the other.
template <bool RIGHT>
__global__ void leaving_kernel(unsigned* out) {
  SHARED(Words, words);
  words.at[threadIdx.x] = threadIdx.x;
  if (RIGHT) {
    cluster_sync();
  } else {
    cluster_leave();
  }
  out[blockIdx.x * 64 + threadIdx.x] = cluster_shared(words.at, 1 - cluster_rank())[threadIdx.x];
  cluster_leave();
}

__global__ void garbage_kernel(unsigned* out) {
  SHARED(Words, words);
  auto* const more = reinterpret_cast<unsigned*>(dynamic_shared());
  out[2 * blockIdx.x] = words.at[5];
  out[2 * blockIdx.x + 1] = more[3];
  words.at[5] = more[3] = 7;
}

unsigned turned(unsigned i) { return (i + 33) % 64; }
unsigned turned_twice(unsigned i) { return (i + 66) % 64; }
unsigned of_next_block(unsigned i) { return (i / 64 + 1) % 4 * 64 + i % 64; }
unsigned garbage(unsigned) { return kGarbage; }

}  // namespace

TEST(a_missing_barrier_shows) {
  const Buffer<unsigned> out(64);
  const auto once = counting(64, turned), twice = counting(64, turned_twice);
  const Launch how = blocks(1, 64);
  expect(always(out, once, [&] { return launch("t", how, rotate_kernel<true>, out.data()); }), "with a barrier the order counts");
  expect(!always(out, once, [&] { return launch("t", how, rotate_kernel<false>, out.data()); }), "without, it does not");
  expect(always(out, twice, [&] { return launch("t", how, rotate_twice_kernel<true>, out.data()); }), "with barriers it counts");
  expect(!always(out, twice, [&] { return launch("t", how, rotate_twice_kernel<false>, out.data()); }), "without, it does not");
}

TEST(a_missing_barrier_of_a_cluster_shows) {
  const Buffer<unsigned> out(256);
  const auto wanted = counting(256, of_next_block);
  Launch how = blocks(4, 64);
  how.cluster = 4;
  expect(always(out, wanted, [&] { return launch("t", how, cluster_kernel<true>, out.data()); }), "with barriers the order counts");
  int wrong = 0;
  for (int64_t order = 0; order < kOrders; ++order) {
    glimpse_emulated_set_order(order);
    const glimpse_status status = launch("t", how, cluster_kernel<false>, out.data());
    wrong += status != GLIMPSE_OK || out.read() != wanted;  // the other block may have ended, too
  }
  glimpse_emulated_set_order(-1);
  expect(wrong > 0, "without, it does not");
}

TEST(shared_memory_starts_as_garbage_in_each_block) {
  const Buffer<unsigned> out(10);
  Launch how = blocks(5, 1);
  how.shared = 16;
  expect(always(out, counting(10, garbage), [&] { return launch("t", how, garbage_kernel, out.data()); }), "it held something");
}

// ---- Deadlocks -------------------------------------------------------------------------------------------------------------

namespace {

__global__ void barrier_of_some_kernel() {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __shfl_sync(kAll, 1, 0);  // the lanes below 40 of this warp do not come
  }
}

__global__ void barriers_of_two_kinds_kernel() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads_count(1);
  }
}

__global__ void missing_lane_kernel() {
  if (threadIdx.x != 3) __shfl_sync(kAll, 1, 0);
}

__global__ void not_in_its_mask_kernel() { __shfl_sync(0xfu, 1, 0); }

__global__ void syncwarp_against_shuffle_kernel() {
  if (threadIdx.x < 16) {
    __syncwarp();
  } else {
    __shfl_sync(kAll, 1, 0);
  }
}

__global__ void lonely_block_kernel() {
  if (blockIdx.x % 2 == 0) {
    cluster_sync();
  } else {
    __shfl_sync(3u, 1, 0);  // of one lane
  }
}

__global__ void ended_threads_kernel(unsigned* out) {
  if (threadIdx.x % 2 == 1) return;
  __syncthreads();  // for the threads that are left
  out[threadIdx.x / 2] = threadIdx.x;
}

__global__ void ended_block_kernel(unsigned* out) {
  SHARED(Words, words);
  words.at[0] = 1;
  if (cluster_rank() == 0) return;
  for (int i = 0; i < 3; ++i) __syncthreads();
  *out = *cluster_shared(words.at, 0);
}

unsigned doubled(unsigned i) { return 2 * i; }

}  // namespace

TEST(a_deadlock_is_reported_with_its_place) {
  for (int64_t order = 0; order < kOrders; ++order) {
    glimpse_emulated_set_order(order);
    expect_failure(launch("some", blocks(1, 64), barrier_of_some_kernel),
                   "some (emulated): deadlock in block (0, 0, 0): thread (0, 0, 0) waits at __syncthreads");
    expect_failure(launch("lane", blocks(1, 32), missing_lane_kernel), "thread (0, 0, 0) waits at a warp exchange");
  }
  glimpse_emulated_set_order(-1);
  expect_failure(launch("kinds", blocks(1, 64), barriers_of_two_kinds_kernel), "while others wait at __syncthreads");
  expect_failure(launch("kinds", blocks(1, 32), syncwarp_against_shuffle_kernel), "at another kind of operation");
  expect_failure(launch("mask", blocks(1, 8), not_in_its_mask_kernel), "is not in its own mask 0000000f");
  Launch pairs = blocks(4, 1);
  pairs.cluster = 2;
  expect_failure(launch("cluster", pairs, lonely_block_kernel), "deadlock in block");
}

TEST(the_next_launch_is_not_the_worse_for_it) {
  const Buffer<unsigned> out(64);
  expect_failure(launch("lane", blocks(3, 96), missing_lane_kernel), "deadlock");
  expect_ok(launch("t", blocks(1, 64), rotate_kernel<true>, out.data()));
  expect_equal(out.read(), counting(64, turned), "out");
}

TEST(threads_that_ended_are_not_waited_for) {
  const Buffer<unsigned> out(20);
  const auto start = [&] { return launch("t", blocks(1, 40), ended_threads_kernel, out.data()); };
  expect(always(out, counting(20, doubled), start), "another result");
}

TEST(the_memory_of_a_block_that_ended_is_gone) {
  const Buffer<unsigned> out(1);
  Launch how = blocks(2, 32);
  how.cluster = 2;
  glimpse_emulated_set_order(0);
  expect_failure(launch("t", how, ended_block_kernel, out.data()), "block 0 of the cluster has ended");
  glimpse_emulated_set_order(-1);
}

// ---- Memory ----------------------------------------------------------------------------------------------------------------

namespace {

struct Bytes {
  unsigned char at[64];
};

__global__ void load_kernel(const unsigned char* from, int offset) { load_16(from + offset); }
__global__ void load_streaming_kernel(const unsigned char* from, int offset) { load_16_streaming(from + offset); }
__global__ void store_kernel(unsigned char* to, int offset) { store_16(to + offset, make_uint4(0, 0, 0, 0)); }
template <bool LIVE>
__global__ void copy_kernel(const unsigned char* from, int offset) {
  copy_async_16(dynamic_shared(), from + offset, LIVE);
}
__global__ void shared_bytes_kernel() {
  SHARED(Bytes, bytes);  // of an alignment of 1, so not of 16 either
  load_16(bytes.at);
}

// What shared memory holds before the wait, with one group under way, and behind it.
__global__ void copy_async_kernel(const unsigned* from, unsigned* out) {
  auto* const words = reinterpret_cast<unsigned*>(dynamic_shared());
  for (int i = 0; i < 12; ++i) words[i] = 5;
  copy_async_16(words, from, true);
  copy_async_commit();
  copy_async_16(words + 4, from + 4, true);
  copy_async_16(words + 8, from + 1000000, false);
  copy_async_commit();
  for (int i = 0; i < 3; ++i) out[i] = words[4 * i];
  copy_async_wait<1>();
  for (int i = 0; i < 3; ++i) out[3 + i] = words[4 * i];
  copy_async_wait<0>();
  for (int i = 0; i < 3; ++i) out[6 + i] = words[4 * i];
}

}  // namespace

TEST(sixteen_bytes_that_are_not_aligned) {
  const Buffer<unsigned char> memory(64);
  const Launch one = blocks(1, 1);
  Launch room = one;
  room.shared = 16;
  expect_ok(launch("t", one, load_kernel, memory.data(), 16));
  expect_ok(launch("t", one, load_streaming_kernel, memory.data(), 16));
  expect_ok(launch("t", one, store_kernel, memory.data(), 32));
  expect_ok(launch("t", room, copy_kernel<true>, memory.data(), 16));
  for (const int offset : {1, 4, 8}) {
    expect_failure(launch("t", one, load_kernel, memory.data(), offset), "block (0, 0, 0), thread (0, 0, 0): 16 bytes at");
    expect_failure(launch("t", one, load_streaming_kernel, memory.data(), offset), "not aligned to 16");
    expect_failure(launch("t", one, store_kernel, memory.data(), offset), "not aligned to 16");
    expect_failure(launch("t", room, copy_kernel<true>, memory.data(), offset), "not aligned to 16");
    expect_failure(launch("t", room, copy_kernel<false>, memory.data(), offset), "not aligned to 16");
  }
  expect_failure(launch("t", one, shared_bytes_kernel), "not aligned to 16");
}

TEST(an_asynchronous_copy_arrives_when_it_is_waited_for) {
  const Buffer<unsigned> from({1, 2, 3, 4, 6, 7, 8, 9}), out(9);
  Launch how = blocks(1, 1);
  how.shared = 48;
  expect_ok(launch("t", how, copy_async_kernel, from.data(), out.data()));
  expect_equal(out.read(), {kGarbage, kGarbage, kGarbage, 1, kGarbage, kGarbage, 1, 6, 0}, "out");
}

// ---- Limits ----------------------------------------------------------------------------------------------------------------

namespace {

template <size_t BYTES>
struct Memory {
  unsigned char at[BYTES];
};

__global__ void nothing_kernel() {}
template <size_t BYTES>
__global__ void shared_kernel() {
  SHARED(Memory<BYTES>, memory);
  memory.at[0] = 1;
}

}  // namespace

TEST(launches_that_a_gpu_refuses) {
  const auto start = [](unsigned grid, unsigned threads, size_t shared, unsigned cluster) {
    Launch how = blocks(grid, threads);
    how.shared = shared;
    how.cluster = cluster;
    return launch("t", how, nothing_kernel);
  };
  expect_ok(start(1, 1024, 227 << 10, 1));
  expect_failure(start(1, 1025, 0, 1), "1 to 1024 threads");
  expect_failure(start(1, 0, 0, 1), "1 to 1024 threads");
  expect_failure(start(0, 32, 0, 1), "a grid that is not empty");
  expect_failure(start(1, 32, (227 << 10) + 1, 1), "less dynamic shared memory");
  expect_ok(start(8, 32, 0, 4));
  expect_failure(start(6, 32, 0, 4), "divides grid.x");
  expect_failure(start(34, 32, 0, 17), "1 to 16 blocks");
  Launch deep = blocks(1, 32);
  deep.grid.y = 65536;
  expect_failure(launch("t", deep, nothing_kernel), "a smaller grid");
  set_chip(80, 3);
  expect_ok(start(8, 32, 163 << 10, 1));
  expect_failure(start(8, 32, (163 << 10) + 1, 1), "less dynamic shared memory");
  expect_failure(start(8, 32, 0, 2), "capability 9.0 for clusters");
}

TEST(static_and_dynamic_shared_memory_together) {
  const auto start = [](void (*kernel)(), size_t shared) {
    Launch how = blocks(1, 1);
    how.shared = shared;
    return launch("t", how, kernel);
  };
  constexpr size_t kilobyte = 1 << 10;
  expect_ok(start(shared_kernel<48 * kilobyte>, 0));
  expect_failure(start(shared_kernel<48 * kilobyte + 1>, 0), "bytes of static shared memory, at most 49152");
  // What a launch has without asking for more, which it does from 32 KiB of dynamic memory on.
  expect_ok(start(shared_kernel<16 * kilobyte>, 32 * kilobyte));
  expect_failure(start(shared_kernel<16 * kilobyte + 16>, 32 * kilobyte), "16400 bytes of static and 32768 of dynamic shared memory, at most 49152");
  expect_ok(start(shared_kernel<16 * kilobyte + 16>, 32 * kilobyte + 16));
  for (const auto& [capability, most] : {std::pair<int, size_t>{80, 163}, {86, 99}, {89, 99}, {90, 227}, {100, 227}, {120, 99}}) {
    set_chip(capability, 3);
    expect(most_shared(4 * kilobyte) == (most - 4) * kilobyte, "%d: %zu bytes", capability, most_shared(4 * kilobyte));
    expect_ok(start(shared_kernel<4 * kilobyte>, (most - 4) * kilobyte));
    expect_failure(start(shared_kernel<4 * kilobyte>, (most - 4) * kilobyte + 16), "4096 bytes of static and");
  }
}

// ---- Graphs ----------------------------------------------------------------------------------------------------------------

namespace {

__global__ void add_kernel(const unsigned* length, unsigned by, unsigned* out) {
  if (threadIdx.x < *length) out[threadIdx.x] += by;
}

}  // namespace

TEST(a_graph_runs_on_what_memory_holds_by_then) {
  Buffer<unsigned> length(std::vector<unsigned>{1}), out(std::vector<unsigned>(4, 0));
  Graph graph([&] {
    expect_ok(launch("t", blocks(1, 4), add_kernel, length.data(), 1u, out.data()));
    expect_ok(launch("t", blocks(1, 4), add_kernel, length.data(), 10u, out.data()));
  });
  expect_equal(out.read(), {0, 0, 0, 0}, "captured");
  graph.replay();
  expect_equal(out.read(), {11, 0, 0, 0}, "short");
  length.write({3});
  graph.replay();
  expect_equal(out.read(), {22, 11, 11, 0}, "long");
}

// ---- Operations of a warp --------------------------------------------------------------------------------------------------

namespace {

constexpr int kOfLane = 16;

__global__ void warp_kernel(unsigned* out) {
  const unsigned lane = threadIdx.x % 32;
  unsigned found[kOfLane] = {
      __shfl_sync(kAll, lane, 5),
      __shfl_sync(kAll, lane, static_cast<int>(lane) + 3),
      __shfl_sync(kAll, lane, 2, 8),
      __shfl_up_sync(kAll, lane, 3),
      __shfl_up_sync(kAll, lane, 3, 8),
      __shfl_down_sync(kAll, lane, 3),
      __shfl_down_sync(kAll, lane, 3, 8),
      __shfl_xor_sync(kAll, lane, 5),
      __ballot_sync(kAll, lane % 3 == 0),
      static_cast<unsigned>(__any_sync(kAll, lane == 9)),
      static_cast<unsigned>(__all_sync(kAll, lane != 9)),
      __match_any_sync(kAll, lane % 4),
      __reduce_add_sync(kAll, lane),
      __reduce_max_sync(kAll, lane ^ 8u),
      static_cast<unsigned>(__syncthreads_count(lane < 3)),
      0,
  };
  if (lane >= 16) found[15] = __shfl_xor_sync(0xffff0000u, lane, 1);  // half a warp, the mask names it
  for (int i = 0; i < kOfLane; ++i) out[threadIdx.x * kOfLane + static_cast<unsigned>(i)] = found[i];
}

}  // namespace

// As the CUDA programming guide describes them.
TEST(operations_of_a_warp) {
  std::vector<unsigned> wanted;
  for (unsigned thread = 0; thread < 64; ++thread) {
    const unsigned lane = thread % 32;
    unsigned thirds = 0, fours = 0;
    for (unsigned i = 0; i < 32; ++i) {
      thirds |= (i % 3 == 0 ? 1u : 0u) << i;
      fours |= (i % 4 == lane % 4 ? 1u : 0u) << i;
    }
    const unsigned values[kOfLane] = {5,
                                      (lane + 3) % 32,
                                      lane / 8 * 8 + 2,
                                      lane < 3 ? lane : lane - 3,
                                      lane % 8 < 3 ? lane : lane - 3,
                                      lane > 28 ? lane : lane + 3,
                                      lane % 8 > 4 ? lane : lane + 3,
                                      lane ^ 5u,
                                      thirds,
                                      1,
                                      0,
                                      fours,
                                      496,
                                      31,
                                      6,
                                      lane < 16 ? 0 : lane ^ 1u};
    wanted.insert(wanted.end(), values, values + kOfLane);
  }
  const Buffer<unsigned> out(64 * kOfLane);
  expect(always(out, wanted, [&] { return launch("t", blocks(1, 64), warp_kernel, out.data()); }), "another result");
  expect_equal(out.read(), wanted, "out");
}

// ---- What the sanitizers see -----------------------------------------------------------------------------------------------

namespace {

enum class Between { nothing, shuffle, warp_barrier };

template <Between BETWEEN>
__global__ void hand_on_kernel(unsigned* out) {
  SHARED(Words, words);
  words.at[threadIdx.x] = threadIdx.x;
  if (BETWEEN == Between::shuffle) __shfl_sync(kAll, 1, 0);
  if (BETWEEN == Between::warp_barrier) __syncwarp();
  out[threadIdx.x] = words.at[threadIdx.x ^ 1u];
}

__global__ void write_kernel(unsigned* out, unsigned where) { out[where] = 1; }
__global__ void same_place_kernel(unsigned* out) { *out = threadIdx.x; }

__global__ void step_over_shared_kernel(unsigned* out) {
  SHARED(Words, words);
  words.at[0] = 1;
  out[0] = words.at[64 + threadIdx.x];
}

template <class... Params, class... Args>
void ran(const Launch& how, void (*kernel)(Params...), Args... args) {
  expect_ok(launch("t", how, kernel, args...));
}

}  // namespace

TEST(sanitizer_clean_barriers) {
  const Buffer<unsigned> out(256);
  Launch cluster = blocks(4, 64);
  cluster.cluster = 4;
  ran(blocks(1, 64), rotate_kernel<true>, out.data());
  ran(blocks(1, 64), rotate_twice_kernel<true>, out.data());
  ran(blocks(1, 32), hand_on_kernel<Between::warp_barrier>, out.data());
  ran(cluster, cluster_kernel<true>, out.data());
  cluster.grid.x = cluster.cluster = 2;
  ran(cluster, leaving_kernel<true>, out.data());
  ran(blocks(1, 1), write_kernel, out.data(), 255u);
}
TEST(sanitizer_race_without_a_barrier) {
  const Buffer<unsigned> out(64);
  ran(blocks(1, 64), rotate_kernel<false>, out.data());
}
TEST(sanitizer_race_before_writing_again) {
  const Buffer<unsigned> out(64);
  ran(blocks(1, 64), rotate_twice_kernel<false>, out.data());
}
TEST(sanitizer_race_although_shuffled) {
  const Buffer<unsigned> out(32);
  ran(blocks(1, 32), hand_on_kernel<Between::shuffle>, out.data());
}
TEST(sanitizer_race_over_the_barrier_that_orders_nothing) {
  const Buffer<unsigned> out(128);
  Launch cluster = blocks(2, 64);
  cluster.cluster = 2;
  ran(cluster, leaving_kernel<false>, out.data());
}
TEST(sanitizer_race_of_blocks) {
  const Buffer<unsigned> out(1);
  ran(blocks(2, 1), same_place_kernel, out.data());
}
TEST(sanitizer_step_over_the_end) {
  const Buffer<unsigned> out(9);
  ran(blocks(1, 1), write_kernel, out.data(), 9u);
}
TEST(sanitizer_step_over_shared_memory) {
  const Buffer<unsigned> out(1);
  ran(blocks(1, 1), step_over_shared_kernel, out.data());
}

}  // namespace glimpse::tests

// SPDX-License-Identifier: Apache-2.0
// The CUDA language for a host compiler: kernels run with every thread as a fiber (emulated.cpp), so that they can be tested, whole, on
// machines without a GPU. Meant to be strict, not fast: threads run in an order that no kernel may count on, shared memory starts as
// garbage, an asynchronous copy arrives when it is waited for and not before, a barrier that not all threads reach is an error.
#pragma once

#include <math.h>
#include <string.h>

#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __ldg(p) (*(p))
#define __ldcg(p) (*(p))
#define __stcs(p, x) (*(p) = (x))
#define __stcg(p, x) (*(p) = (x))

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace glimpse::cuda::emulated {

// Where the running thread is.
struct Where {
  dim3 thread, block, block_size, grid_size;
  unsigned lane, cluster_rank, cluster_size;
};
const Where& where();

void* shared(const void* key, size_t bytes, size_t alignment);  // the block's variable of this key
unsigned char* dynamic();
void* cluster_shared(void* own, unsigned rank);
void block_barrier(const char* what);
int block_vote(const char* what, bool value);  // a barrier; how many threads said true
void cluster_barrier(bool orders_memory);
void warp_barrier(unsigned mask);
// All lanes of the mask give a value; `out` gets those of the whole warp (of lanes outside the mask: garbage).
void warp_exchange(unsigned mask, uint64_t value, uint64_t out[32]);
void wait_for_previous_grid();
struct Copy {
  void* to;
  const void* from;  // NULL: zeros
};
void copy_async_put(const Copy& copy);
void copy_async_commit();
bool copy_async_take(int left, Copy* copy);  // the next one of all but the last `left` committed groups

glimpse_status run(const char* op, const Launch& how, std::function<void()> thread);

template <class T>
uint64_t bits_of(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "a value of at most 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T value_of(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
T from_lane(unsigned mask, T value, unsigned lane) {
  uint64_t all[32];
  warp_exchange(mask, bits_of(value), all);
  return value_of<T>(all[lane & 31]);
}
template <class T, class Join>
T over_warp(unsigned mask, T value, Join join) {
  uint64_t all[32];
  warp_exchange(mask, bits_of(value), all);
  bool first = true;
  T found{};
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!((mask >> lane) & 1)) continue;
    found = first ? value_of<T>(all[lane]) : join(found, value_of<T>(all[lane]));
    first = false;
  }
  return found;
}

}  // namespace glimpse::cuda::emulated

#define threadIdx (::glimpse::cuda::emulated::where().thread)
#define blockIdx (::glimpse::cuda::emulated::where().block)
#define blockDim (::glimpse::cuda::emulated::where().block_size)
#define gridDim (::glimpse::cuda::emulated::where().grid_size)

inline void __syncthreads() { ::glimpse::cuda::emulated::block_barrier("__syncthreads"); }
inline int __syncthreads_count(int x) { return ::glimpse::cuda::emulated::block_vote("__syncthreads_count", x != 0); }
inline int __syncthreads_or(int x) { return __syncthreads_count(x) > 0; }
inline int __syncthreads_and(int x) { return __syncthreads_count(x == 0) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { ::glimpse::cuda::emulated::warp_barrier(mask); }
inline void __threadfence() {}
inline void __threadfence_block() {}

// Widths other than 32 split the warp into runs of lanes, as on a GPU.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const unsigned lane = ::glimpse::cuda::emulated::where().lane, base = lane & ~static_cast<unsigned>(width - 1);
  return ::glimpse::cuda::emulated::from_lane(mask, value, base + (static_cast<unsigned>(source) & static_cast<unsigned>(width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32) {
  const unsigned lane = ::glimpse::cuda::emulated::where().lane, other = lane ^ static_cast<unsigned>(with);
  const bool inside = other < (lane & ~static_cast<unsigned>(width - 1)) + static_cast<unsigned>(width);
  return ::glimpse::cuda::emulated::from_lane(mask, value, inside ? other : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const unsigned lane = ::glimpse::cuda::emulated::where().lane, within = lane & static_cast<unsigned>(width - 1);
  return ::glimpse::cuda::emulated::from_lane(mask, value, within >= by ? lane - by : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const unsigned lane = ::glimpse::cuda::emulated::where().lane, within = lane & static_cast<unsigned>(width - 1);
  return ::glimpse::cuda::emulated::from_lane(mask, value, within + by < static_cast<unsigned>(width) ? lane + by : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  uint64_t all[32];
  ::glimpse::cuda::emulated::warp_exchange(mask, predicate != 0, all);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    if ((mask >> lane) & 1) votes |= static_cast<unsigned>(all[lane] & 1) << lane;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  uint64_t all[32];
  ::glimpse::cuda::emulated::warp_exchange(mask, ::glimpse::cuda::emulated::bits_of(value), all);
  unsigned same = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    if (((mask >> lane) & 1) && all[lane] == ::glimpse::cuda::emulated::bits_of(value)) same |= 1u << lane;
  return same;
}
template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  return ::glimpse::cuda::emulated::over_warp(mask, value, [](T a, T b) { return static_cast<T>(a + b); });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  return ::glimpse::cuda::emulated::over_warp(mask, value, [](T a, T b) { return a < b ? b : a; });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  return ::glimpse::cuda::emulated::over_warp(mask, value, [](T a, T b) { return b < a ? b : a; });
}
template <class T>
T __reduce_or_sync(unsigned mask, T value) {
  return ::glimpse::cuda::emulated::over_warp(mask, value, [](T a, T b) { return static_cast<T>(a | b); });
}

// Integers only, as the kernels may have no others. (A GPU's atomics are relaxed; a fence beside them is what orders memory.)
template <class T, class U>
T atomicAdd(T* p, U x) {
  static_assert(std::is_integral<T>::value, "no atomics in floating point");
  return __atomic_fetch_add(p, static_cast<T>(x), __ATOMIC_ACQ_REL);
}
template <class T, class U>
T atomicOr(T* p, U x) {
  return __atomic_fetch_or(p, static_cast<T>(x), __ATOMIC_ACQ_REL);
}
template <class T, class U>
T atomicExch(T* p, U x) {
  return __atomic_exchange_n(p, static_cast<T>(x), __ATOMIC_ACQ_REL);
}
template <class T, class U, class V>
T atomicCAS(T* p, U expected, V x) {
  T found = static_cast<T>(expected);
  __atomic_compare_exchange_n(p, &found, static_cast<T>(x), false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  return found;
}
template <class T, class U>
T atomicMax(T* p, U x) {
  T found = __atomic_load_n(p, __ATOMIC_ACQUIRE);
  while (found < static_cast<T>(x) &&
         !__atomic_compare_exchange_n(p, &found, static_cast<T>(x), false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
  }
  return found;
}
template <class T, class U>
T atomicMin(T* p, U x) {
  T found = __atomic_load_n(p, __ATOMIC_ACQUIRE);
  while (static_cast<T>(x) < found &&
         !__atomic_compare_exchange_n(p, &found, static_cast<T>(x), false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
  }
  return found;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
  unsigned found = 0;
  for (int i = 0; i < 32; ++i) found |= ((x >> i) & 1u) << (31 - i);
  return found;
}
inline unsigned __float_as_uint(float x) { return ::glimpse::cuda::emulated::value_of<unsigned>(::glimpse::cuda::emulated::bits_of(x)); }
inline int __float_as_int(float x) { return ::glimpse::cuda::emulated::value_of<int>(::glimpse::cuda::emulated::bits_of(x)); }
inline float __uint_as_float(unsigned x) { return ::glimpse::cuda::emulated::value_of<float>(x); }
inline float __int_as_float(int x) { return __uint_as_float(static_cast<unsigned>(x)); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

namespace glimpse::cuda {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
float to_float(f16 x);
bf16 to_bf16(float x);
f16 to_f16(float x);

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  return to_bf16(x);
}
template <>
inline f16 from_float<f16>(float x) {
  return to_f16(x);
}

void expect_aligned(const void* p);
inline uint4 load_16(const void* from) {
  expect_aligned(from);
  return *static_cast<const uint4*>(from);
}
inline uint4 load_16_streaming(const void* from) { return load_16(from); }
inline void store_16(void* to, uint4 x) {
  expect_aligned(to);
  *static_cast<uint4*>(to) = x;
}

// One variable for each place in the source and each instance of the template around it.
#define SHARED(Type, name)           \
  static const char name##_key = 0;  \
  auto& name = *static_cast<Type*>(::glimpse::cuda::emulated::shared(&name##_key, sizeof(Type), alignof(Type)))

inline unsigned char* dynamic_shared() { return emulated::dynamic(); }
inline void wait_for_previous_grid() { emulated::wait_for_previous_grid(); }
inline void let_next_grid_start() {}
inline unsigned cluster_rank() { return emulated::where().cluster_rank; }
inline unsigned cluster_size() { return emulated::where().cluster_size; }
inline void cluster_sync() { emulated::cluster_barrier(true); }
inline void cluster_leave() { emulated::cluster_barrier(false); }
template <class T>
T* cluster_shared(T* own, unsigned rank) {
  return static_cast<T*>(emulated::cluster_shared(own, rank));
}
// Copies are made here, not in emulated.cpp, so that sanitizers see them.
inline void copy_async_16(void* to, const void* from, bool live) {
  store_16(to, make_uint4(0xffffffffu, 0xffffffffu, 0xffffffffu, 0xffffffffu));  // until it is waited for
  expect_aligned(from);
  emulated::copy_async_put({to, live ? from : nullptr});
}
inline void copy_async_commit() { emulated::copy_async_commit(); }
template <int left>
void copy_async_wait() {
  for (emulated::Copy copy; emulated::copy_async_take(left, &copy);)
    store_16(copy.to, copy.from != nullptr ? load_16(copy.from) : make_uint4(0, 0, 0, 0));
}

// Matrices of 16-bit elements, as native.cuh describes them.
template <bool transposed>
void load_matrices(unsigned (&to)[4], const void* row) {
  expect_aligned(row);
  uint64_t rows[32];
  emulated::warp_exchange(0xffffffffu, reinterpret_cast<uint64_t>(row), rows);
  const unsigned lane = emulated::where().lane;
  for (unsigned i = 0; i < 4; ++i) {
    uint16_t two[2];
    for (unsigned j = 0; j < 2; ++j) {
      const unsigned at = 2 * (lane % 4) + j;
      const auto* from = reinterpret_cast<const uint16_t*>(rows[8 * i + (transposed ? at : lane / 4)]);
      two[j] = from[transposed ? lane / 4 : at];
    }
    to[i] = two[0] | static_cast<unsigned>(two[1]) << 16;
  }
}
inline unsigned transpose_matrix(unsigned x) {
  uint64_t all[32];
  emulated::warp_exchange(0xffffffffu, x, all);
  const unsigned lane = emulated::where().lane, shift = lane / 4 % 2 * 16;
  unsigned two[2];
  for (unsigned j = 0; j < 2; ++j) two[j] = static_cast<unsigned>(all[(2 * (lane % 4) + j) * 4 + lane / 8] >> shift) & 0xffffu;
  return two[0] | two[1] << 16;
}
template <class T>
unsigned pack_two(float first, float second) {
  return static_cast<unsigned>(emulated::bits_of(from_float<T>(first)) | emulated::bits_of(from_float<T>(second)) << 16);
}
// Products and sums in fp32, one after the other; a GPU adds the sixteen products of an element in a manner of its own.
template <class T>
void multiply_add_matrix(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  uint64_t left[32], right[32], other[32];
  emulated::warp_exchange(0xffffffffu, a[0] | static_cast<uint64_t>(a[1]) << 32, left);
  emulated::warp_exchange(0xffffffffu, a[2] | static_cast<uint64_t>(a[3]) << 32, right);
  emulated::warp_exchange(0xffffffffu, b[0] | static_cast<uint64_t>(b[1]) << 32, other);
  const auto element = [](uint64_t pair, unsigned below, unsigned second) {
    return to_float(emulated::value_of<T>(pair >> (32 * below + 16 * second) & 0xffffu));
  };
  const unsigned lane = emulated::where().lane;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4, column = 2 * (lane % 4) + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned pair = k % 8 / 2;
      sum[i] = fmaf(element((k < 8 ? left : right)[row * 4 + pair], i / 2, k % 2), element(other[column * 4 + pair], k / 8, k % 2), sum[i]);
    }
  }
}

template <class... Params, class... Args>
glimpse_status launch(const char* op, const Launch& how, void (*kernel)(Params...), Args... args) {
  // As on a GPU the arguments are copied at the launch, and the same ones serve each replay of a capture.
  return emulated::run(op, how, [kernel, given = std::tuple<std::decay_t<Params>...>(static_cast<Params>(args)...)] {
    std::apply(kernel, given);
  });
}

}  // namespace glimpse::cuda

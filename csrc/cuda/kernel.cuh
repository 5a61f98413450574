// SPDX-License-Identifier: Apache-2.0
// The language the kernels are written in: CUDA C++, and the few names below that plain CUDA spells in ways a host compiler cannot read.
//
// nvcc compiles a kernel for GPUs (native.cuh). g++ compiles the same source for the host (emulated/cuda.h), where each thread of a
// block is a fiber: barriers, warp exchanges, shared memory, clusters and asynchronous copies keep their meaning, so tests run whole kernels
// on any machine. What both sides have:
//
//   SHARED(Type, name);              shared memory of the block, at function scope; Type needs no constructor. Starts as garbage.
//   dynamic_shared()                 unsigned char*, 16-byte aligned: the `shared` bytes of the launch
//   launch("op", Launch{...}, kernel, arguments...)
//   wait_for_previous_grid()         in a kernel launched with `dependent`: before anything that an earlier launch wrote is read
//   let_next_grid_start()            in the kernel before it, if it need not wait for the end of this one with starting
//   cluster_rank(), cluster_size(), cluster_sync(), cluster_shared(pointer, rank)
//   cluster_leave()                  a barrier of the cluster that orders no memory: before a block ends whose shared memory others have read
//                                    and used
//   copy_async_16(to shared, from global, live), copy_async_commit(), copy_async_wait<left>()
//   load_matrices, transpose_matrix, pack_two, multiply_add_matrix   tensor cores, for bf16 and f16
//   to_float(x), from_float<T>(x)    for float, bf16, f16
//   load_16, store_16                16 bytes at once; both addresses aligned to 16
//   load_16_streaming                the same for what is read once: the first to leave the caches
//   chip()                           capability and multiprocessors of the current device, for launch code
//   most_shared(fixed)               bytes of dynamic_shared() that a block can have there beside `fixed` bytes of SHARED variables
//
// and of CUDA itself: threadIdx, blockIdx, blockDim, gridDim, the *_sync warp functions, __syncthreads, __syncwarp, atomics on 32 and
// 64 bits, the bit functions, uint4 and its kin, __ldg. No <<<>>>, no __shared__, no thread blocks that wait for each other.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cpu/common.h"
#include "glimpse/cuda.h"

namespace glimpse::cuda {

struct Chip {
  int capability;       // ten times the major number plus the minor: 80, 90, 100; that of the code that it runs, if this is for an older chip
  int multiprocessors;  // of the device
  size_t shared;        // bytes of shared memory that a block can have, static and dynamic
};

// What a block has without asking for more, static and dynamic. `launch` asks from less dynamic memory on: the difference is for static variables.
constexpr size_t kSharedUnasked = 48 << 10, kSharedAsk = 32 << 10;

struct Size {
  unsigned x = 1, y = 1, z = 1;
};

struct Launch {
  Size grid, block;
  size_t shared = 0;      // bytes of dynamic_shared()
  void* stream = nullptr;
  unsigned cluster = 1;   // blocks of a cluster, along x; more than 1 needs capability 9.0
  bool dependent = false; // may start while the launch before it still runs; see wait_for_previous_grid
};

const Chip& chip();
inline size_t most_shared(size_t fixed) { return chip().shared - fixed; }

}  // namespace glimpse::cuda

#ifdef __CUDACC__
#include "cuda/native.cuh"
#else
#include "cuda/emulated/cuda.h"
#endif

namespace glimpse::cuda {

template <class I>
__host__ __device__ constexpr I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}

// run(zero), of the C++ type that `dtype` names.
template <class Run>
glimpse_status by_dtype(const char* op, glimpse_dtype dtype, const Run& run) {
  switch (dtype) {
    case GLIMPSE_FLOAT32:
      return run(float{});
    case GLIMPSE_BFLOAT16:
      return run(bf16{});
    case GLIMPSE_FLOAT16:
      return run(f16{});
  }
  return fail(GLIMPSE_INVALID, "%s: no dtype %d", op, static_cast<int>(dtype));
}

}  // namespace glimpse::cuda

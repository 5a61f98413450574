// SPDX-License-Identifier: Apache-2.0
// Sums and scans of integers over the THREADS threads of a block: through CUB on a GPU, with warp exchanges on the host.
//
//   SHARED(BlockScan<256>::Storage, storage);
//   int total;
//   const int before = block_exclusive_scan<256>(x, total, storage);
//
// All threads of the block call them, with a whole number of warps in one dimension. The storage may be used again at once, and they
// are barriers: what threads wrote before is seen behind them.
#pragma once

#include "cuda/kernel.cuh"

#ifdef __CUDACC__
#include <cub/block/block_scan.cuh>
#endif

namespace glimpse::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

template <int THREADS>
struct BlockScan {
  static_assert(THREADS % 32 == 0 && THREADS <= 1024, "whole warps");
  static constexpr int kWarps = THREADS / 32;
#ifdef __CUDACC__
  using Cub = cub::BlockScan<int, THREADS, cub::BLOCK_SCAN_WARP_SCANS>;
  struct Storage {
    typename Cub::TempStorage scan;
    int warps[kWarps];
  };
#else
  struct Storage {
    int warps[kWarps];
  };
#endif
};

// Sum over the block, in all threads.
template <int THREADS>
__device__ __forceinline__ int block_sum(int x, typename BlockScan<THREADS>::Storage& storage) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  x = __reduce_add_sync(kAllLanes, x);
  if (lane == 0) storage.warps[warp] = x;
  __syncthreads();
  x = __reduce_add_sync(kAllLanes, lane < BlockScan<THREADS>::kWarps ? storage.warps[lane] : 0);
  __syncthreads();
  return x;
}

// Sum over the threads before this one; `total` is the sum over all.
template <int THREADS>
__device__ __forceinline__ int block_exclusive_scan(int x, int& total, typename BlockScan<THREADS>::Storage& storage) {
#ifdef __CUDACC__
  int before;
  typename BlockScan<THREADS>::Cub(storage.scan).ExclusiveSum(x, before, total);
  __syncthreads();
  return before;
#else
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int through = x;
  for (int by = 1; by < 32; by *= 2) {
    const int other = __shfl_up_sync(kAllLanes, through, static_cast<unsigned>(by));
    if (lane >= by) through += other;
  }
  if (lane == 31) storage.warps[warp] = through;
  __syncthreads();
  int before = 0;
  total = 0;
  for (int w = 0; w < BlockScan<THREADS>::kWarps; ++w) {
    if (w < warp) before += storage.warps[w];
    total += storage.warps[w];
  }
  __syncthreads();
  return before + through - x;
#endif
}

}  // namespace glimpse::cuda

// SPDX-License-Identifier: Apache-2.0
// The vocabulary of kernel.cuh on a GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace glimpse::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

template <class T>
constexpr bool is_f16 = false;
template <>
inline constexpr bool is_f16<f16> = true;

#define SHARED(Type, name) __shared__ Type name

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char glimpse_dynamic_shared[];
  return glimpse_dynamic_shared;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) {
  return __float2half_rn(x);
}

__device__ __forceinline__ uint4 load_16(const void* from) { return *static_cast<const uint4*>(from); }
__device__ __forceinline__ uint4 load_16_streaming(const void* from) { return __ldcs(static_cast<const uint4*>(from)); }
__device__ __forceinline__ void store_16(void* to, uint4 x) { *static_cast<uint4*>(to) = x; }

__device__ __forceinline__ void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A dependent launch behind this one may start as soon as every block has come here or ended.
__device__ __forceinline__ void let_next_grid_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

__device__ __forceinline__ unsigned cluster_size() {
#if __CUDA_ARCH__ >= 900
  unsigned size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#else
  return 1;
#endif
}

// A barrier of all threads of the cluster; what they wrote before it, shared or global, is seen behind it.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// A barrier of all threads of the cluster and nothing else: it does not wait for what they wrote to arrive, as cluster_sync does. What they
// read has arrived where it was used before.
__device__ __forceinline__ void cluster_leave() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// The shared variable of the same name in another block of the cluster, which must not have ended.
template <class T>
__device__ __forceinline__ T* cluster_shared(T* own, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t found;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(found) : "l"(reinterpret_cast<uint64_t>(own)), "r"(rank));
  return reinterpret_cast<T*>(found);
#else
  return own;
#endif
}

// 16 bytes from global to shared memory, zeros if not live (then `from` is not read).
__device__ __forceinline__ void copy_async_16(void* to, const void* from, bool live) {
  const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const int bytes = live ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `left` of this thread's committed groups are under way. Other threads' copies need a barrier behind it.
template <int left>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

// Four matrices of 8 x 8 elements of 16 bits in shared memory: lane l gives the address of row l % 8 of matrix l / 8 (16 bytes, aligned)
// and gets, of each matrix, elements 2 * (l % 4) and the next of row l / 4; of column l / 4 if transposed.
template <bool transposed>
__device__ __forceinline__ void load_matrices(unsigned (&to)[4], const void* row) {
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}
// One such matrix in registers, transposed.
__device__ __forceinline__ unsigned transpose_matrix(unsigned x) {
  unsigned found;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(found) : "r"(x));
  return found;
}
// Two neighbours of such a matrix.
template <class T>
__device__ __forceinline__ unsigned pack_two(float first, float second);
template <>
__device__ __forceinline__ unsigned pack_two<bf16>(float first, float second) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const unsigned*>(&two);
}
template <>
__device__ __forceinline__ unsigned pack_two<f16>(float first, float second) {
  const __half2 two = __floats2half2_rn(first, second);
  return *reinterpret_cast<const unsigned*>(&two);
}
// sum += a b in fp32 for a of 16 x 16 elements (matrices: above left, below left, above right, below right), b of 16 x 8 (transposed:
// above, below) and sum of 16 x 8 (lane l: columns 2 * (l % 4) and the next of rows l / 4 and l / 4 + 8).
template <class T>
__device__ __forceinline__ void multiply_add_matrix(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  if constexpr (sizeof(T) == 2 && !is_f16<T>)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

inline glimpse_status device_failed(const char* op, cudaError_t error) {
  return fail(GLIMPSE_DEVICE, "%s: CUDA: %s", op, cudaGetErrorString(error));
}

template <class... Params, class... Args>
glimpse_status launch(const char* op, const Launch& how, void (*kernel)(Params...), Args... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(how.grid.x, how.grid.y, how.grid.z);
  config.blockDim = dim3(how.block.x, how.block.y, how.block.z);
  config.dynamicSmemBytes = how.shared;
  config.stream = static_cast<cudaStream_t>(how.stream);
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (how.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = how.cluster;
    attributes[count].val.clusterDim.y = 1;
    attributes[count++].val.clusterDim.z = 1;
  }
  if (how.dependent && chip().capability >= 90) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  config.attrs = attributes;
  config.numAttrs = count;
  cudaError_t error = cudaSuccess;
  if (how.shared > kSharedAsk) {
    // All there is, and not just what this launch takes: the limit is the kernel's, and another thread may be between its limit and its launch.
    cudaFuncAttributes found;
    error = cudaFuncGetAttributes(&found, kernel);
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most_shared(found.sharedSizeBytes)));
  }
  if (error == cudaSuccess && how.cluster > 8)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
  if (error == cudaSuccess) return GLIMPSE_OK;
  cudaGetLastError();  // ours to report, not the next caller's
  return device_failed(op, error);
}

}  // namespace glimpse::cuda

/* SPDX-License-Identifier: Apache-2.0 */
/* What the CUDA side of every op shares: the stream, the workspace, and whether it can run here.
 *
 * An op X with a CUDA kernel is also `glimpse_status glimpse_cuda_X(const glimpse_X_params*, const glimpse_cuda_call*)`, with the params of
 * the CPU's. Pointers in the params are device pointers, unless the header of the op says otherwise. A call launches on the stream and
 * returns: it allocates nothing, waits for nothing and reads no device memory, so it may be captured into a CUDA graph. The device
 * that is current has to be the one of the pointers. */
#ifndef GLIMPSE_CUDA_H
#define GLIMPSE_CUDA_H

#include <stddef.h>

#include "glimpse/common.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct glimpse_cuda_call {
  void* stream;           /* cudaStream_t; NULL: the default stream */
  void* workspace;        /* device memory of this call alone until it is done, aligned to 16 bytes; any content */
  size_t workspace_bytes; /* at least glimpse_cuda_X_workspace(params) for the ops that have this function, else 0 */
} glimpse_cuda_call;

/* Why no kernel can run on the current device, in words: an old driver, a device without code in this build. NULL: they can. */
GLIMPSE_API const char* glimpse_cuda_missing(void);

/* "nvcc 13.0: sm_80 sm_90a sm_100", or "emulated on the host". */
GLIMPSE_API const char* glimpse_cuda_build(void);

#ifdef __cplusplus
}
#endif

#endif

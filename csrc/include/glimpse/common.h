/* SPDX-License-Identifier: Apache-2.0 */
/* What every op of the flat interface shares: status codes, dtypes, the last error.
 *
 * An op X is `glimpse_status glimpse_X(const glimpse_X_params*)`. The params struct holds pointers, sizes and strides
 * (in elements). Nothing is owned, nothing is kept after the call. */
#ifndef GLIMPSE_COMMON_H
#define GLIMPSE_COMMON_H

#include <stdint.h>

#if defined(__GNUC__)
#define GLIMPSE_API __attribute__((visibility("default")))
#else
#define GLIMPSE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum glimpse_status {
  GLIMPSE_OK = 0,
  GLIMPSE_INVALID = 1,       /* an argument is wrong */
  GLIMPSE_UNSUPPORTED = 2,   /* no kernel for this dtype or size */
  GLIMPSE_OUT_OF_MEMORY = 3, /* scratch memory could not be had */
  GLIMPSE_DEVICE = 4,        /* the GPU or its driver refused a launch */
} glimpse_status;

typedef enum glimpse_dtype {
  GLIMPSE_FLOAT32 = 0,
  GLIMPSE_BFLOAT16 = 1,
  GLIMPSE_FLOAT16 = 2, /* CUDA alone */
} glimpse_dtype;

/* Text of the last failure on this thread, "" if there was none. Valid until the next failure on this thread. */
GLIMPSE_API const char* glimpse_last_error(void);

/* Instruction set in use: "avx512bf16", "avx512", "avx2" or "baseline". */
GLIMPSE_API const char* glimpse_isa(void);

/* Uses this instruction set from now on; "auto" is the best one of the machine. GLIMPSE_INVALID for an unknown name,
 * GLIMPSE_UNSUPPORTED where the machine (or the build) lacks it. The environment variable GLIMPSE_CPU_ISA sets it at load. */
GLIMPSE_API glimpse_status glimpse_set_isa(const char* name);

/* Threads that the CPU kernels use. n > 0 fixes the number, 0 goes back to the default: what the OpenMP runtime of the
 * process says for the calling thread (torch.set_num_threads sets exactly that), else the machine's. */
GLIMPSE_API void glimpse_set_num_threads(int n);
GLIMPSE_API int glimpse_num_threads(void);

#ifdef __cplusplus
}
#endif

#endif

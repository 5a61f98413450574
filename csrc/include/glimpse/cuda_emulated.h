/* SPDX-License-Identifier: Apache-2.0 */
/* Switches of the emulation (csrc/cuda/emulated), for tests. Not part of the library. */
#ifndef GLIMPSE_CUDA_EMULATED_H
#define GLIMPSE_CUDA_EMULATED_H

#include "glimpse/common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The chip that launch code is told of; default 9.0 with 3 multiprocessors, so few that grids sized by them loop. */
GLIMPSE_API void glimpse_emulated_set_chip(int capability, int multiprocessors);

/* In which order threads and blocks run: 0 ascending, 1 descending, above that shuffled by this number. -1 (the default): another one
 * each launch, beginning anew with each call of this function. */
GLIMPSE_API void glimpse_emulated_set_order(int64_t order);

/* Launches until the end are kept in place of being run; `replay` runs them with what the memory holds by then, as a CUDA graph does. */
GLIMPSE_API void glimpse_emulated_capture_begin(void);
GLIMPSE_API void* glimpse_emulated_capture_end(void);
GLIMPSE_API glimpse_status glimpse_emulated_replay(void* graph);
GLIMPSE_API void glimpse_emulated_free(void* graph);

/* How many launches ran or were captured in this process. */
GLIMPSE_API int64_t glimpse_emulated_launches(void);

#ifdef __cplusplus
}
#endif

#endif

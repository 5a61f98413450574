/* SPDX-License-Identifier: Apache-2.0 */
/* What the thread pool is and does, for `glimpse info` and the tests. */
#ifndef GLIMPSE_THREADS_H
#define GLIMPSE_THREADS_H

#include "glimpse/common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* "OpenMP (libgomp.so.1)" where the kernels share the process's OpenMP team, "own threads" elsewhere. */
GLIMPSE_API const char* glimpse_thread_pool(void);

/* Runs `tasks` short tasks on the pool and writes the kernel's thread id of each into ids[tasks]. */
GLIMPSE_API void glimpse_thread_ids(int64_t* ids, int64_t tasks);

#ifdef __cplusplus
}
#endif

#endif

// SPDX-License-Identifier: Apache-2.0
// One thread pool for kernels and torch.
//
// torch's CPU ops run on the OpenMP runtime that libtorch_cpu is linked with. Its threads spin for a while after each
// region, so a second pool would fight it for the cores. Where that runtime is in the process, our regions run on its
// team; elsewhere on a small pool of our own that sleeps when idle.
#pragma once

#include <cstddef>
#include <cstdint>

namespace glimpse {

// Threads a parallel region started here would use: 1 inside another region.
int num_threads();

// Runs body(context, task) for task = 0 .. tasks-1, each once, in any order, on up to num_threads() threads including
// the caller. Returns when all are done. Tasks are handed out in ascending order: put the long ones first.
void parallel_tasks(int64_t tasks, void (*body)(void* context, int64_t task), void* context);

// Runs body(context) on the calling thread while the others of the pool stand by for all of it: parallel_tasks inside
// starts no region of its own. For runs of many short calls. The others sleep if the body leaves them without tasks for
// long, and are back in the pool when it returns.
void with_team(void (*body)(void* context), void* context);

// Calls of parallel_tasks by this thread that had several threads to run on.
int64_t parallel_calls();

// 64-byte aligned scratch memory of this thread, at least `bytes`; nullptr if there is none. Valid until the thread asks
// for scratch again. It is kept for the next call.
void* thread_scratch(size_t bytes);

// "libgomp.so.1 of torch"-like words for `glimpse info`.
const char* thread_pool_name();

namespace {

// parallel_tasks for a callable (lambda by reference).
template <class Body>
inline void parallel_for(int64_t tasks, const Body& body) {
  parallel_tasks(
      tasks, [](void* context, int64_t task) { (*static_cast<const Body*>(context))(task); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Splits [0, count) into runs of at least `grain` (one a thread where that is longer) and calls body(begin, end).
template <class Body>
inline void parallel_range(int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  if (grain < 1) grain = 1;
  int64_t parts = (count + grain - 1) / grain;
  const int64_t threads = num_threads();
  if (parts > threads) parts = threads;
  if (parts <= 1) {
    body(int64_t{0}, count);
    return;
  }
  parallel_for(parts, [&](int64_t part) { body(count * part / parts, count * (part + 1) / parts); });
}

}  // namespace
}  // namespace glimpse

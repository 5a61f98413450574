// SPDX-License-Identifier: Apache-2.0
#include "cpu/parallel.h"

#include <dlfcn.h>
#include <limits.h>
#include <link.h>
#include <linux/futex.h>
#include <sched.h>
#include <strings.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "glimpse/threads.h"

namespace glimpse {
namespace {

// ---- the OpenMP runtime of the process -----------------------------------------------------------------------------

// GCC's OpenMP entry points; LLVM's and Intel's runtimes export the same names.
struct OpenMP {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*max_threads)() = nullptr;
  int (*in_parallel)() = nullptr;
  char name[256] = "";

  bool load(void* handle) {
    parallel = reinterpret_cast<decltype(parallel)>(dlsym(handle, "GOMP_parallel"));
    max_threads = reinterpret_cast<decltype(max_threads)>(dlsym(handle, "omp_get_max_threads"));
    in_parallel = reinterpret_cast<decltype(in_parallel)>(dlsym(handle, "omp_in_parallel"));
    if (parallel == nullptr || max_threads == nullptr || in_parallel == nullptr) return false;
    Dl_info info;
    const char* path = dladdr(reinterpret_cast<void*>(parallel), &info) != 0 ? info.dli_fname : nullptr;
    const char* slash = path != nullptr ? std::strrchr(path, '/') : nullptr;
    std::snprintf(name, sizeof name, "OpenMP (%s)", slash != nullptr ? slash + 1 : path != nullptr ? path : "?");
    return true;
  }
};

struct LibrarySearch {
  const char* part;
  char path[4096];
};

int match_library(dl_phdr_info* info, size_t, void* data) {
  auto* search = static_cast<LibrarySearch*>(data);
  const char* slash = std::strrchr(info->dlpi_name, '/');
  const char* base = slash != nullptr ? slash + 1 : info->dlpi_name;
  if (std::strncmp(base, search->part, std::strlen(search->part)) != 0) return 0;
  std::snprintf(search->path, sizeof search->path, "%s", info->dlpi_name);
  return 1;
}

// A handle of a library that is already loaded, by the beginning of its file name.
void* loaded_library(const char* part) {
  LibrarySearch search{part, ""};
  if (dl_iterate_phdr(match_library, &search) == 0) return nullptr;
  return dlopen(search.path, RTLD_LAZY | RTLD_NOLOAD);
}

// nullptr if the process has no OpenMP runtime yet. Once one is found the answer is kept.
const OpenMP* openmp() {
  static std::mutex mutex;
  static OpenMP runtime;
  static std::atomic<const OpenMP*> found{nullptr};
  const OpenMP* known = found.load(std::memory_order_acquire);
  if (known != nullptr) return known;
  std::lock_guard<std::mutex> lock(mutex);
  if (found.load(std::memory_order_acquire) != nullptr) return found.load(std::memory_order_acquire);
  // dlsym on a handle looks through that library's own dependencies, so the first one is torch's runtime even where
  // another package brought a second one.
  static const char* const libraries[] = {"libtorch_cpu.so", "libgomp", "libomp", "libiomp5"};
  for (const char* library : libraries) {
    void* handle = loaded_library(library);
    if (handle != nullptr && runtime.load(handle)) {
      found.store(&runtime, std::memory_order_release);
      return &runtime;
    }
  }
  if (runtime.load(RTLD_DEFAULT)) {
    found.store(&runtime, std::memory_order_release);
    return &runtime;
  }
  return nullptr;
}

// ---- one region ----------------------------------------------------------------------------------------------------

thread_local bool inside_region = false;

struct Region {
  void (*body)(void*, int64_t);
  void* context;
  int64_t tasks;
  std::atomic<int64_t> next{0};

  void work() {
    const bool outer = inside_region;
    inside_region = true;
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(context, task);
    inside_region = outer;
  }
};

void work_entry(void* region) { static_cast<Region*>(region)->work(); }

// ---- a pool for processes without OpenMP ---------------------------------------------------------------------------

class Pool {
 public:
  // Runs entry(data) on `threads` threads, the caller being one of them. One at a time; a second caller waits.
  void run(void (*entry)(void*), void* data, int threads) {
    std::lock_guard<std::mutex> turn(turn_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < threads - 1) {
        workers_.emplace_back([this, index = static_cast<int>(workers_.size())] { loop(index); });
      }
      entry_ = entry;
      data_ = data;
      wanted_ = threads - 1;
      pending_ = threads - 1;
      ++generation_;
    }
    wake_.notify_all();
    entry(data);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return pending_ == 0; });
    entry_ = nullptr;
  }

 private:
  void loop(int index) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (index >= wanted_ || entry_ == nullptr) continue;
      void (*entry)(void*) = entry_;
      void* data = data_;
      lock.unlock();
      entry(data);
      lock.lock();
      if (--pending_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  void (*entry_)(void*) = nullptr;
  void* data_ = nullptr;
  int wanted_ = 0, pending_ = 0;
  uint64_t generation_ = 0;
};

// The threads of a pool do not survive a fork, so a child process gets its own. Pools are never destroyed: their threads
// may outlive static destructors.
Pool& own_pool() {
  static std::mutex mutex;
  static Pool* pool = nullptr;
  static pid_t owner = 0;
  std::lock_guard<std::mutex> lock(mutex);
  if (pool == nullptr || owner != getpid()) {
    pool = new Pool;
    owner = getpid();
  }
  return *pool;
}

// entry(data) once on each of up to `threads` threads, the caller among them.
void start(void (*entry)(void*), void* data, int threads) {
  const OpenMP* runtime = openmp();
  if (runtime != nullptr)
    runtime->parallel(entry, data, static_cast<unsigned>(threads), 0);
  else
    own_pool().run(entry, data, threads);
}

// ---- a team that stands by -----------------------------------------------------------------------------------------

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Looks at the state before a member sleeps: some tens of microseconds, what lies between two parallel ops. None where
// the user wants waiting threads to sleep.
int patience() {
  static const int turns = [] {
    const char* policy = std::getenv("OMP_WAIT_POLICY");
    return policy != nullptr && strcasecmp(policy, "passive") == 0 ? 0 : 4000;
  }();
  return turns;
}

// One thread leads, the others take part in its regions. A member joins a region only while it is open, so the leader
// does not wait for one that the system has not scheduled: on a busy machine it does the tasks alone. An OpenMP region
// ends in a barrier and has to wait for every member; here that is once, at the end of the team.
class Team {
 public:
  Team(void (*body)(void*), void* context, int threads) : threads_(threads), body_(body), context_(context) {}

  int threads() const { return threads_; }

  void lead() {
    body_(context_);
    publish(state_.load(std::memory_order_relaxed) | kOver);
  }

  // By the leader.
  void run(Region& region) {
    region_ = &region;
    publish((state_.load(std::memory_order_relaxed) + kNext) | kOpen);
    region.work();
    uint32_t state = state_.fetch_and(~kOpen, std::memory_order_acq_rel);
    for (int turn = 0; (state & kInside) != 0; ++turn) {
      if (turn < patience())
        relax();
      else
        sched_yield();
      state = state_.load(std::memory_order_acquire);
    }
  }

  // By every other thread, until the leader is through.
  void follow() {
    uint32_t state = state_.load(std::memory_order_acquire), seen = 0;
    while ((state & kOver) == 0) {
      if ((state & kOpen) == 0 || (state & kNumber) == seen) {
        state = changed(state);
      } else if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) {
        seen = state & kNumber;
        region_->work();  // stays what it is while a member is inside
        state = state_.fetch_sub(1, std::memory_order_acq_rel) - 1;
      }
    }
  }

 private:
  // state_: how many are inside, whether the region is open, whether the leader is through, and the region's number. A
  // number that comes round again costs a sleeper one region.
  static constexpr uint32_t kInside = 0xffff, kOpen = 0x10000, kOver = 0x20000, kNext = 0x40000,
                            kNumber = ~(kNext - 1);

  // Only while nobody is inside and no region is open. The order against asleep_ is that of changed(): either the leader
  // sees the sleeper, or the sleeper the new state.
  void publish(uint32_t state) {
    state_.store(state, std::memory_order_seq_cst);
    if (asleep_.load(std::memory_order_seq_cst) > 0)
      syscall(SYS_futex, reinterpret_cast<uint32_t*>(&state_), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }

  // The state, once it is another one than `known` (or sooner).
  uint32_t changed(uint32_t known) {
    for (int turn = 0; turn < patience(); ++turn) {
      const uint32_t state = state_.load(std::memory_order_acquire);
      if (state != known) return state;
      relax();
    }
    asleep_.fetch_add(1, std::memory_order_seq_cst);
    if (state_.load(std::memory_order_seq_cst) == known)
      syscall(SYS_futex, reinterpret_cast<uint32_t*>(&state_), FUTEX_WAIT_PRIVATE, known, nullptr, nullptr, 0);
    asleep_.fetch_sub(1, std::memory_order_seq_cst);
    return state_.load(std::memory_order_acquire);
  }

  const int threads_;
  void (*const body_)(void*);
  void* const context_;
  Region* region_ = nullptr;
  alignas(64) std::atomic<uint32_t> state_{0};
  alignas(64) std::atomic<int> asleep_{0};
};

thread_local Team* led = nullptr;  // by this thread
thread_local int64_t calls = 0;

void team_entry(void* data) {
  auto* team = static_cast<Team*>(data);
  if (led == team)
    team->lead();
  else
    team->follow();
}

std::atomic<int> fixed_threads{0};

int machine_threads() {
  static const int count = [] {
    const char* text = std::getenv("OMP_NUM_THREADS");
    const int wanted = text != nullptr ? std::atoi(text) : 0;
    const int cores = static_cast<int>(std::thread::hardware_concurrency());
    return wanted > 0 ? wanted : cores > 0 ? cores : 1;
  }();
  return count;
}

}  // namespace

int num_threads() {
  if (inside_region) return 1;
  if (led != nullptr) return led->threads();
  const OpenMP* runtime = openmp();
  if (runtime != nullptr && runtime->in_parallel() != 0) return 1;
  const int fixed = fixed_threads.load(std::memory_order_relaxed);
  if (fixed > 0) return fixed;
  return runtime != nullptr ? runtime->max_threads() : machine_threads();
}

void parallel_tasks(int64_t tasks, void (*body)(void* context, int64_t task), void* context) {
  if (tasks <= 0) return;
  int64_t threads = tasks > 1 ? num_threads() : 1;
  if (threads > tasks) threads = tasks;
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(context, task);
    return;
  }
  Region region;
  region.body = body;
  region.context = context;
  region.tasks = tasks;
  ++calls;
  if (led != nullptr)
    led->run(region);
  else
    start(work_entry, &region, static_cast<int>(threads));
}

void with_team(void (*body)(void* context), void* context) {
  const int threads = led == nullptr ? num_threads() : 1;
  if (threads <= 1) return body(context);
  Team team(body, context, threads);
  led = &team;
  start(team_entry, &team, threads);
  led = nullptr;
}

int64_t parallel_calls() { return calls; }

void* thread_scratch(size_t bytes) {
  struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffer;
  if (buffer.size < bytes) {
    std::free(buffer.data);
    buffer.size = 0;
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(64, rounded);
    if (buffer.data == nullptr) return nullptr;
    buffer.size = rounded;
  }
  return buffer.data;
}

const char* thread_pool_name() {
  const OpenMP* runtime = openmp();
  return runtime != nullptr ? runtime->name : "own threads";
}

}  // namespace glimpse

extern "C" void glimpse_set_num_threads(int n) {
  glimpse::fixed_threads.store(n > 0 ? n : 0, std::memory_order_relaxed);
}

extern "C" int glimpse_num_threads(void) { return glimpse::num_threads(); }

extern "C" const char* glimpse_thread_pool(void) { return glimpse::thread_pool_name(); }

extern "C" void glimpse_thread_ids(int64_t* ids, int64_t tasks) {
  glimpse::parallel_for(tasks, [&](int64_t task) {
    ids[task] = static_cast<int64_t>(syscall(SYS_gettid));
    // long enough for the other threads to get a share
    const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(200);
    while (std::chrono::steady_clock::now() < until) {
    }
  });
}

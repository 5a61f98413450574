// SPDX-License-Identifier: Apache-2.0
// Thread blocks on the host. Every CUDA thread is a fiber with a stack of its own; a fiber runs until it has to wait for others (at a
// barrier, a warp exchange, the end) and the scheduler takes the next. The blocks of a cluster run side by side, clusters one after the other.
//
// This file is never instrumented by a sanitizer. It tells ThreadSanitizer which of CUDA's operations order memory and which do not: a
// warp exchange, for one, does not. So the sanitizer finds races between the threads of a block as it does between threads of a program.
#include "cuda/kernel.cuh"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "glimpse/cuda_emulated.h"

#if defined(GLIMPSE_THREAD_SANITIZER)
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void* __tsan_get_current_fiber(void);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif
#if defined(GLIMPSE_ADDRESS_SANITIZER)
extern "C" {
void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* save, const void** bottom, size_t* size);
void __asan_unpoison_memory_region(const volatile void* memory, size_t size);
}
#endif

namespace glimpse::cuda {
namespace emulated {
namespace {

#if defined(GLIMPSE_ADDRESS_SANITIZER) || defined(GLIMPSE_THREAD_SANITIZER)
constexpr size_t kStack = 256 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif
// Fibers of a block or cluster are used again by a later one, and to ThreadSanitizer what one fiber does is in order. So clusters take
// turns in several sets of fibers, where it has as many.
constexpr size_t kFiberSets = 3, kMostFibers = 4096;
constexpr int kGarbage = 0xff;  // NaN as a float, -1 as an integer

// What a happens-before edge hangs on. On hosts without ThreadSanitizer nothing.
struct Order {
  char place;
};
void release(Order& order) {
#if defined(GLIMPSE_THREAD_SANITIZER)
  __tsan_release(&order.place);
#else
  (void)order;
#endif
}
void acquire(Order& order) {
#if defined(GLIMPSE_THREAD_SANITIZER)
  __tsan_acquire(&order.place);
#else
  (void)order;
#endif
}

// A barrier's: two, taken in turn. A thread may have reached the next barrier before another one has left this one, and what it did in
// between is not ordered.
struct Turns {
  Order orders[2];
  unsigned turn = 0;
  Order& now() { return orders[turn % 2]; }
};

// ---- Contexts: a stack and where it stands ---------------------------------------------------------------------------------

struct Context {
  void* stack_pointer = nullptr;
#if !defined(__x86_64__)
  ucontext_t machine{};
#endif
  void* sanitizer = nullptr;  // ThreadSanitizer's fiber, or AddressSanitizer's fake stack
  const void* bottom = nullptr;
  size_t size = 0;
};

#if defined(__x86_64__)
extern "C" void glimpse_emulated_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
.hidden glimpse_emulated_switch
.globl glimpse_emulated_switch
.type glimpse_emulated_switch, @function
glimpse_emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size glimpse_emulated_switch, .-glimpse_emulated_switch
)");
#endif

void prepare(Context& context, unsigned char* stack, void (*entry)()) {
  context.bottom = stack;
  context.size = kStack;
#if defined(__x86_64__)
  auto** top = reinterpret_cast<void**>(stack + kStack);
  *--top = nullptr;  // where the entry would return to
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
#else
  getcontext(&context.machine);
  context.machine.uc_stack.ss_sp = stack;
  context.machine.uc_stack.ss_size = kStack;
  makecontext(&context.machine, entry, 0);
#endif
}

void arrived(Context& here, Context* from) {
#if defined(GLIMPSE_ADDRESS_SANITIZER)
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(here.sanitizer, &bottom, &size);
  if (from != nullptr && from->bottom == nullptr) from->bottom = bottom, from->size = size;  // the scheduler's own stack
#else
  (void)here;
  (void)from;
#endif
}

// `here` goes on when somebody switches back to it.
void switch_to(Context& here, Context& there, bool for_good) {
#if defined(GLIMPSE_ADDRESS_SANITIZER)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &here.sanitizer, there.bottom, there.size);
#else
  (void)for_good;
#endif
#if defined(GLIMPSE_THREAD_SANITIZER)
  __tsan_switch_to_fiber(there.sanitizer, 1);  // 1: the switch itself orders nothing
#endif
#if defined(__x86_64__)
  glimpse_emulated_switch(&here.stack_pointer, there.stack_pointer);
#else
  swapcontext(&here.machine, &there.machine);
#endif
  arrived(here, nullptr);
}

// ---- What a launch consists of ---------------------------------------------------------------------------------------------

enum class State { ready, at_barrier, at_cluster_barrier, in_warp, done };

struct Exchange {  // of the lanes of one mask
  unsigned arrived = 0;
  bool barrier = false;  // __syncwarp, which orders memory; a shuffle does not
  uint64_t given[32], result[32];
  Turns turns;
};

struct Block;

struct Fiber {
  Context context;
  unsigned char* stack = nullptr;
  Where where;
  Block* block = nullptr;
  unsigned warp = 0;
  State state = State::done;
  const char* at = "";
  bool waited = false;  // for the grid before
  std::deque<std::vector<Copy>> groups;  // committed asynchronous copies
  std::vector<Copy> open;
};

struct Variable {
  unsigned char* memory = nullptr;
  size_t before = 0, bytes = 0;  // what lies before it, so that it is not aligned by chance
  Order order{};  // making it comes before using it
};

struct Block {
  Block() = default;
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block() {
    for (auto& variable : shared) std::free(variable.second.memory);
  }

  unsigned rank = 0, alive = 0, waiting = 0, votes = 0, result = 0;
  const char* barrier = "";
  size_t static_bytes = 0;
  std::map<const void*, Variable> shared;
  std::vector<std::map<unsigned, Exchange>> warps;
  Turns turns;
};

struct Gang {  // the blocks that run side by side: a cluster
  std::vector<std::unique_ptr<Block>> blocks;
  unsigned alive = 0, waiting = 0;
  Turns turns;
};

Chip chip_of(int capability, int multiprocessors) {
  const size_t kilobytes = capability >= 90 && capability < 120 ? 227 : capability == 80 || capability == 87 ? 163 : 99;
  return {capability, multiprocessors, kilobytes << 10};
}

struct Machine {
  std::recursive_mutex busy;
  Context scheduler;
  std::vector<std::unique_ptr<Fiber>> fibers;
  Fiber* running = nullptr;
  Gang* gang = nullptr;
  const std::function<void()>* body = nullptr;
  std::string error;
  size_t dynamic_bytes = 0;
  bool dependent = false;
  std::vector<std::unique_ptr<Block>> spent;  // blocks that are through, freed behind the launch
  Order start, end;
  Chip chip = chip_of(90, 3);
  int64_t order = -1, launches_since = 0, launches = 0;
  std::vector<std::function<glimpse_status()>>* capture = nullptr;
};

Machine& machine() {
  static Machine* const made = new Machine;  // never destroyed: Python may end in any order
  return *made;
}

void leave(State state, const char* at) {
  Machine& m = machine();
  Fiber& fiber = *m.running;
  fiber.state = state;
  fiber.at = at;
  switch_to(fiber.context, m.scheduler, state == State::done);
}

std::string words(const char* format, va_list arguments) {
  char text[512];
  std::vsnprintf(text, sizeof text, format, arguments);
  return text;
}

// The launch has failed; no thread of it runs on.
[[noreturn]] void die(const char* format, ...) __attribute__((format(printf, 1, 2)));
void die(const char* format, ...) {
  Machine& m = machine();
  va_list arguments;
  va_start(arguments, format);
  const Where& at = m.running->where;
  char place[128];
  std::snprintf(place, sizeof place, "block (%u, %u, %u), thread (%u, %u, %u): ", at.block.x, at.block.y, at.block.z, at.thread.x,
                at.thread.y, at.thread.z);
  m.error = place + words(format, arguments);
  va_end(arguments);
  leave(State::done, "");
  std::abort();  // never taken up again
}

void wake(Block& block, State waiting) {
  for (auto& fiber : machine().fibers)
    if (fiber->block == &block && fiber->state == waiting) fiber->state = State::ready;
}

void let_block_go(Block& block) {
  if (block.alive == 0 || block.waiting < block.alive) return;
  block.result = block.votes;
  block.waiting = block.votes = 0;
  ++block.turns.turn;
  wake(block, State::at_barrier);
}

void let_gang_go(Gang& gang) {
  if (gang.alive == 0 || gang.waiting < gang.alive) return;
  gang.waiting = 0;
  ++gang.turns.turn;
  for (auto& block : gang.blocks) wake(*block, State::at_cluster_barrier);
}

void thread_entry() {
  Machine& m = machine();
  arrived(m.running->context, &m.scheduler);
  acquire(m.start);
  Fiber& fiber = *m.running;
  fiber.groups.clear();
  fiber.open.clear();
  fiber.waited = !m.dependent;
  (*m.body)();
  // A block that ends without it lets the launch after this one start before the launch before this one has ended.
  if (!fiber.waited) die("ends without wait_for_previous_grid in a dependent launch");
  release(m.end);
  --fiber.block->alive;
  --m.gang->alive;
  let_block_go(*fiber.block);
  let_gang_go(*m.gang);
  leave(State::done, "");
  std::abort();
}

Fiber& fiber_at(size_t index) {
  Machine& m = machine();
  while (m.fibers.size() <= index) {
    auto fiber = std::make_unique<Fiber>();
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    fiber->stack = static_cast<unsigned char*>(memory);
#if defined(GLIMPSE_THREAD_SANITIZER)
    fiber->context.sanitizer = __tsan_create_fiber(0);
#endif
    m.fibers.push_back(std::move(fiber));
  }
  return *m.fibers[index];
}

std::vector<size_t> sequence(size_t count, int64_t order, uint64_t salt) {
  std::vector<size_t> found(count);
  std::iota(found.begin(), found.end(), size_t{0});
  if (order == 1) std::reverse(found.begin(), found.end());
  if (order > 1) std::shuffle(found.begin(), found.end(), std::mt19937_64(static_cast<uint64_t>(order) * 1000003 + salt));
  return found;
}

const char* name_of(State state, const Fiber& fiber) {
  return state == State::at_cluster_barrier ? "cluster_sync" : fiber.at;
}

// Runs the blocks `first` to `first + how.cluster` of the flattened grid, as the `number`-th of the launch.
void run_gang(const Launch& how, size_t first, int64_t order, size_t number) {
  Machine& m = machine();
  Gang gang;
  m.gang = &gang;
  const unsigned threads = how.block.x * how.block.y * how.block.z;
  size_t used = 0, base = 0;
#if defined(GLIMPSE_THREAD_SANITIZER)
  if (threads * how.cluster * kFiberSets <= kMostFibers) base = number % kFiberSets * threads * how.cluster;
#else
  (void)number;
#endif
  for (unsigned rank = 0; rank < how.cluster; ++rank) {
    gang.blocks.push_back(std::make_unique<Block>());
    Block& block = *gang.blocks.back();
    block.rank = rank;
    block.alive = threads;
    block.warps.resize((threads + 31) / 32);
    const size_t flat = first + rank;
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = fiber_at(base + used++);
      fiber.block = &block;
      fiber.warp = t / 32;
      fiber.state = State::ready;
      Where& w = fiber.where;
      w.thread = {t % how.block.x, t / how.block.x % how.block.y, t / how.block.x / how.block.y};
      w.block = {static_cast<unsigned>(flat % how.grid.x), static_cast<unsigned>(flat / how.grid.x % how.grid.y),
                 static_cast<unsigned>(flat / how.grid.x / how.grid.y)};
      w.block_size = {how.block.x, how.block.y, how.block.z};
      w.grid_size = {how.grid.x, how.grid.y, how.grid.z};
      w.lane = t % 32;
      w.cluster_rank = rank;
      w.cluster_size = how.cluster;
      prepare(fiber.context, fiber.stack, thread_entry);
    }
  }
  gang.alive = static_cast<unsigned>(used);
  for (uint64_t round = 0; gang.alive > 0 && m.error.empty(); ++round) {
    bool moved = false;
    for (const size_t i : sequence(used, order, first * 977 + round)) {
      Fiber& fiber = *m.fibers[base + i];
      if (fiber.state != State::ready) continue;
      moved = true;
      m.running = &fiber;
      switch_to(m.scheduler, fiber.context, false);
      if (!m.error.empty()) break;
    }
    if (moved || !m.error.empty()) continue;
    const Fiber& stuck = *std::find_if(m.fibers.begin(), m.fibers.end(), [](auto& f) { return f->state != State::done; })->get();
    char text[256];
    std::snprintf(text, sizeof text, "deadlock in block (%u, %u, %u): thread (%u, %u, %u) waits at %s for threads that do not come",
                  stuck.where.block.x, stuck.where.block.y, stuck.where.block.z, stuck.where.thread.x, stuck.where.thread.y,
                  stuck.where.thread.z, name_of(stuck.state, stuck));
    m.error = text;
  }
  for (size_t i = 0; i < used; ++i) {
    m.fibers[base + i]->state = State::done;
    m.fibers[base + i]->block = nullptr;
  }
  for (auto& block : gang.blocks) m.spent.push_back(std::move(block));
  m.gang = nullptr;
  m.running = nullptr;
}

glimpse_status execute(const std::string& op, const Launch& how, const std::function<void()>& body) {
  Machine& m = machine();
  const std::lock_guard<std::recursive_mutex> lock(m.busy);
#if defined(GLIMPSE_THREAD_SANITIZER)
  m.scheduler.sanitizer = __tsan_get_current_fiber();
#endif
  const int64_t order = m.order >= 0 ? m.order : m.launches_since % 3;
  ++m.launches_since;
  ++m.launches;
  m.body = &body;
  m.error.clear();
  m.dynamic_bytes = how.shared;
  m.dependent = how.dependent;
  release(m.start);
  const size_t gangs = static_cast<size_t>(how.grid.x) * how.grid.y * how.grid.z / how.cluster;
  size_t number = 0;
  for (const size_t i : sequence(gangs, order, 7)) {
    if (m.error.empty()) run_gang(how, i * how.cluster, order, number++);
  }
#if defined(GLIMPSE_ADDRESS_SANITIZER)
  // Threads that did not come to their end have left marks on their stacks.
  for (auto& fiber : m.fibers)
    if (!m.error.empty()) __asan_unpoison_memory_region(fiber->stack, kStack);
#endif
  acquire(m.end);
  m.spent.clear();
  m.body = nullptr;
  if (m.error.empty()) return GLIMPSE_OK;
  return fail(GLIMPSE_DEVICE, "%s (emulated): %s", op.c_str(), m.error.c_str());
}

// What a GPU would refuse, too.
const char* refused(const Launch& how, const Chip& chip) {
  const uint64_t threads = static_cast<uint64_t>(how.block.x) * how.block.y * how.block.z;
  if (threads == 0 || threads > 1024) return "blocks of 1 to 1024 threads";
  if (how.grid.x == 0 || how.grid.y == 0 || how.grid.z == 0) return "a grid that is not empty";
  if (how.grid.x > 0x7fffffffu || how.grid.y > 65535 || how.grid.z > 65535) return "a smaller grid";
  if (how.shared > chip.shared) return "less dynamic shared memory";
  if (how.cluster == 0 || how.cluster > 16 || how.grid.x % how.cluster != 0) return "a cluster of 1 to 16 blocks that divides grid.x";
  if (how.cluster > 1 && chip.capability < 90) return "capability 9.0 for clusters";
  return nullptr;
}

}  // namespace

const Where& where() { return machine().running->where; }

static void* variable(Block& block, const void* key, size_t bytes, size_t alignment) {
  // As aligned as was asked and no more: a kernel that counts on more would fail on a GPU some day.
  const size_t before = alignment < 16 ? alignment : 0;
  Variable& found = block.shared[key];
  if (found.memory == nullptr) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, before + bytes) != 0) std::abort();
    memset(memory, kGarbage, before + bytes);
    found.memory = static_cast<unsigned char*>(memory);
    found.before = before;
    found.bytes = bytes;
    release(found.order);
  }
  acquire(found.order);
  return found.memory + before;
}

void* shared(const void* key, size_t bytes, size_t alignment) {
  Block& block = *machine().running->block;
  if (block.shared.find(key) == block.shared.end()) {
    block.static_bytes += bytes;
    if (block.static_bytes > kSharedUnasked) die("%zu bytes of static shared memory, at most %zu", block.static_bytes, kSharedUnasked);
    const size_t dynamic = machine().dynamic_bytes, most = dynamic > kSharedAsk ? most_shared(0) : kSharedUnasked;
    if (block.static_bytes + dynamic > most)
      die("%zu bytes of static and %zu of dynamic shared memory, at most %zu", block.static_bytes, dynamic, most);
  }
  return variable(block, key, bytes, alignment);
}

unsigned char* dynamic() {
  Machine& m = machine();
  return static_cast<unsigned char*>(variable(*m.running->block, nullptr, m.dynamic_bytes, 16));
}

void* cluster_shared(void* own, unsigned rank) {
  Machine& m = machine();
  Block& block = *m.running->block;
  if (rank >= m.gang->blocks.size()) die("cluster_shared: block %u of a cluster of %zu", rank, m.gang->blocks.size());
  Block& other = *m.gang->blocks[rank];
  if (other.alive == 0) die("cluster_shared: block %u of the cluster has ended", rank);
  auto* address = static_cast<unsigned char*>(own);
  for (auto& [key, found] : block.shared) {
    if (address < found.memory || address >= found.memory + found.before + found.bytes) continue;
    variable(other, key, found.bytes, found.before == 0 ? 16 : found.before);
    return other.shared[key].memory + (address - found.memory);
  }
  die("cluster_shared: not an address in shared memory");
}

void block_barrier(const char* what) { block_vote(what, false); }

int block_vote(const char* what, bool value) {
  Machine& m = machine();
  Block& block = *m.running->block;
  if (block.waiting == 0) block.barrier = what;
  if (strcmp(block.barrier, what) != 0) die("waits at %s while others wait at %s", what, block.barrier);
  Order& order = block.turns.now();
  release(order);
  ++block.waiting;
  block.votes += value;
  if (block.waiting < block.alive) {
    leave(State::at_barrier, what);
  } else {
    let_block_go(block);
  }
  acquire(order);
  return static_cast<int>(block.result);
}

void cluster_barrier(bool orders_memory) {
  Machine& m = machine();
  Gang& gang = *m.gang;
  Order& order = gang.turns.now();
  if (orders_memory) release(order);
  ++gang.waiting;
  if (gang.waiting < gang.alive) {
    leave(State::at_cluster_barrier, "cluster_sync");
  } else {
    let_gang_go(gang);
  }
  if (orders_memory) acquire(order);
}

static void meet(unsigned mask, uint64_t value, uint64_t out[32], bool barrier) {
  Machine& m = machine();
  Fiber& fiber = *m.running;
  const char* what = barrier ? "__syncwarp" : "a warp exchange";
  const unsigned bit = 1u << fiber.where.lane;
  if ((mask & bit) == 0) die("%s: lane %u is not in its own mask %08x", what, fiber.where.lane, mask);
  Exchange& exchange = fiber.block->warps[fiber.warp][mask];
  if (exchange.arrived == 0) exchange.barrier = barrier;
  if (exchange.barrier != barrier) die("%s: other lanes of mask %08x are at another kind of operation", what, mask);
  Order& order = exchange.turns.now();
  if (barrier) release(order);
  exchange.given[fiber.where.lane] = value;
  exchange.arrived |= bit;
  if (exchange.arrived == mask) {
    exchange.arrived = 0;
    ++exchange.turns.turn;
    for (unsigned lane = 0; lane < 32; ++lane)
      exchange.result[lane] = (mask >> lane) & 1 ? exchange.given[lane] : 0xdeadbeefdeadbeefull;
    for (auto& other : m.fibers)
      if (other->block == fiber.block && other->warp == fiber.warp && other->state == State::in_warp &&
          ((mask >> other->where.lane) & 1))
        other->state = State::ready;
  } else {
    leave(State::in_warp, what);
  }
  if (barrier) acquire(order);
  if (out != nullptr) memcpy(out, exchange.result, sizeof exchange.result);
}

void warp_barrier(unsigned mask) { meet(mask, 0, nullptr, true); }
void warp_exchange(unsigned mask, uint64_t value, uint64_t out[32]) { meet(mask, value, out, false); }

void wait_for_previous_grid() { machine().running->waited = true; }

void copy_async_put(const Copy& copy) { machine().running->open.push_back(copy); }

void copy_async_commit() {
  Fiber& fiber = *machine().running;
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

bool copy_async_take(int left, Copy* copy) {
  auto& groups = machine().running->groups;
  while (groups.size() > static_cast<size_t>(left)) {
    if (!groups.front().empty()) {
      *copy = groups.front().back();
      groups.front().pop_back();
      return true;
    }
    groups.pop_front();
  }
  return false;
}

glimpse_status run(const char* op, const Launch& how, std::function<void()> thread) {
  Machine& m = machine();
  const std::lock_guard<std::recursive_mutex> lock(m.busy);
  if (const char* wanted = refused(how, m.chip)) return fail(GLIMPSE_DEVICE, "%s (emulated): CUDA expects %s", op, wanted);
  if (m.capture == nullptr) return execute(op, how, thread);
  ++m.launches;
  m.capture->push_back([name = std::string(op), how, thread = std::move(thread)] { return execute(name, how, thread); });
  return GLIMPSE_OK;
}

}  // namespace emulated

void expect_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) emulated::die("16 bytes at %p, which is not aligned to 16", p);
}

float to_float(f16 x) {
  _Float16 value;
  memcpy(&value, &x, 2);
  return static_cast<float>(value);
}

f16 to_f16(float x) {
  const auto value = static_cast<_Float16>(x);
  f16 found;
  memcpy(&found, &value, 2);
  return found;
}

bf16 to_bf16(float x) {
  const unsigned bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

const Chip& chip() { return emulated::machine().chip; }

}  // namespace glimpse::cuda

using glimpse::cuda::emulated::machine;
using Graph = std::vector<std::function<glimpse_status()>>;

extern "C" const char* glimpse_cuda_missing(void) { return nullptr; }
extern "C" const char* glimpse_cuda_build(void) { return "emulated on the host"; }

extern "C" void glimpse_emulated_set_chip(int capability, int multiprocessors) {
  machine().chip = glimpse::cuda::emulated::chip_of(capability, multiprocessors);
}

extern "C" void glimpse_emulated_set_order(int64_t order) {
  machine().order = order;
  machine().launches_since = 0;
}

extern "C" void glimpse_emulated_capture_begin(void) {
  delete machine().capture;
  machine().capture = new Graph;
}

extern "C" void* glimpse_emulated_capture_end(void) {
  Graph* graph = machine().capture;
  machine().capture = nullptr;
  return graph;
}

extern "C" glimpse_status glimpse_emulated_replay(void* graph) {
  for (const auto& launch : *static_cast<Graph*>(graph))
    if (const glimpse_status status = launch(); status != GLIMPSE_OK) return status;
  return GLIMPSE_OK;
}

extern "C" void glimpse_emulated_free(void* graph) { delete static_cast<Graph*>(graph); }

extern "C" int64_t glimpse_emulated_launches(void) { return machine().launches; }

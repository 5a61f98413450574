// SPDX-License-Identifier: Apache-2.0
// The entry points of the flat interface: each jumps to the object compiled for the instruction set in use.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "cpu/common.h"
#include "cpu/recording.h"
#include "glimpse_ops.h"

namespace glimpse {

// Every op file defines glimpse::<isa>::<op>(const glimpse_<op>_params&).
#define X(op) glimpse_status op(const glimpse_##op##_params& p);
namespace baseline {
#include "glimpse_ops.inc"
}
#if defined(__x86_64__)
namespace avx2 {
#include "glimpse_ops.inc"
}
namespace avx512 {
#include "glimpse_ops.inc"
}
namespace avx512bf16 {
#include "glimpse_ops.inc"
}
#endif
#undef X

namespace {

struct Table {
  const char* name;
  bool (*runs_here)();
#define X(op) glimpse_status (*op)(const glimpse_##op##_params&);
#include "glimpse_ops.inc"
#undef X
};

bool always() { return true; }
#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

// Best first; the last one runs everywhere.
const Table tables[] = {
#if defined(__x86_64__)
#define X(op) avx512bf16::op,
    {"avx512bf16", has_avx512bf16,
#include "glimpse_ops.inc"
    },
#undef X
#define X(op) avx512::op,
    {"avx512", has_avx512,
#include "glimpse_ops.inc"
    },
#undef X
#define X(op) avx2::op,
    {"avx2", has_avx2,
#include "glimpse_ops.inc"
    },
#undef X
#endif
#define X(op) baseline::op,
    {"baseline", always,
#include "glimpse_ops.inc"
    },
#undef X
};

const Table* best() {
  for (const Table& table : tables)
    if (table.runs_here()) return &table;
  return nullptr;  // not reached: the baseline always runs
}

glimpse_status find(const char* name, const Table** found) {
  if (std::strcmp(name, "auto") == 0 || name[0] == '\0') {
    *found = best();
    return GLIMPSE_OK;
  }
  for (const Table& table : tables) {
    if (std::strcmp(name, table.name) != 0) continue;
    if (!table.runs_here())
      return fail(GLIMPSE_UNSUPPORTED, "CPU instruction set: expected one that this machine has (best: %s), found %s",
                  best()->name, name);
    *found = &table;
    return GLIMPSE_OK;
  }
  return fail(GLIMPSE_INVALID, "CPU instruction set: expected auto, avx512bf16, avx512, avx2 or baseline, found '%s'",
              name);
}

std::atomic<const Table*> chosen{nullptr};

const Table* table_in_use() {
  const Table* table = chosen.load(std::memory_order_acquire);
  return table != nullptr ? table : best();
}

}  // namespace
}  // namespace glimpse

extern "C" const char* glimpse_isa(void) { return glimpse::table_in_use()->name; }

extern "C" glimpse_status glimpse_set_isa(const char* name) {
  const glimpse::Table* found = nullptr;
  const glimpse_status status = glimpse::find(name, &found);
  if (status == GLIMPSE_OK) glimpse::chosen.store(found, std::memory_order_release);
  return status;
}

#define X(op)                                                                                             \
  static glimpse_status run_##op(const void* p) {                                                         \
    return glimpse::table_in_use()->op(*static_cast<const glimpse_##op##_params*>(p));                    \
  }                                                                                                       \
  extern "C" glimpse_status glimpse_##op(const glimpse_##op##_params* p) {                                \
    if (p == nullptr) return glimpse::fail(GLIMPSE_INVALID, #op ": no params");                           \
    return glimpse::recording() ? glimpse::run_and_record(#op, run_##op, p, sizeof *p) : run_##op(p);     \
  }
#include "glimpse_ops.inc"
#undef X

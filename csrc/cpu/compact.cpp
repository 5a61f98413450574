// SPDX-License-Identifier: Apache-2.0
// Gather of the rows that stay, all layers and all buffers in one parallel region.
#include "glimpse/compact.h"

#include "cpu/isa.h"

namespace glimpse::GLIMPSE_ISA_NS {
namespace {

constexpr int64_t kTaskBytes = 64 * 1024;

// Rows a task takes, so that tasks are of about equal size whatever the row.
GLIMPSE_INLINE int64_t rows_per_task(const glimpse_compact_copy& c) {
  return c.row_bytes >= kTaskBytes ? 1 : kTaskBytes / (c.row_bytes > 0 ? c.row_bytes : 1);
}

GLIMPSE_INLINE int64_t tasks_per_layer(const glimpse_compact_copy& c, int64_t count) {
  const int64_t rows = rows_per_task(c);
  return (count + rows - 1) / rows;
}

// kBytes > 0: a size known to the compiler, so that small rows are plain moves.
template <int64_t kBytes>
GLIMPSE_INLINE void copy_rows(const glimpse_compact_params& p, const glimpse_compact_copy& c, const char* src, char* dst,
                              int64_t begin, int64_t end) {
  const size_t bytes = static_cast<size_t>(kBytes > 0 ? kBytes : c.row_bytes);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t from = p.index[i];
    const int64_t to = c.to_slots ? p.slots[i] : i;
    if (from < 0 || to < 0) continue;
    memcpy(dst + to * c.dst_stride, src + from * c.src_stride, bytes);
  }
}

// Rows that lie without gaps: neighbours that stay neighbours (text, mostly) go in one move.
void copy_runs(const glimpse_compact_params& p, const glimpse_compact_copy& c, const char* src, char* dst, int64_t begin,
               int64_t end) {
  const auto target = [&](int64_t i) -> int64_t { return c.to_slots ? p.slots[i] : i; };
  for (int64_t i = begin; i < end;) {
    const int64_t from = p.index[i], to = target(i);
    int64_t length = 1;
    if (from >= 0 && to >= 0) {
      while (i + length < end && p.index[i + length] == from + length && target(i + length) == to + length) ++length;
      memcpy(dst + to * c.row_bytes, src + from * c.row_bytes, static_cast<size_t>(length * c.row_bytes));
    }
    i += length;
  }
}

void run_task(const glimpse_compact_params& p, const glimpse_compact_copy& c, int64_t task) {
  const int64_t per_layer = tasks_per_layer(c, p.count);
  const int64_t layer = task / per_layer;
  const int64_t rows = rows_per_task(c);
  const int64_t begin = task % per_layer * rows;
  const int64_t end = begin + rows < p.count ? begin + rows : p.count;
  const char* src = static_cast<const char*>(c.src) + layer * c.src_layer_stride;
  char* dst = static_cast<char*>(c.dst) + layer * c.dst_layer_stride;
  if (c.src_stride == c.row_bytes && c.dst_stride == c.row_bytes && c.row_bytes >= 16)
    return copy_runs(p, c, src, dst, begin, end);
  switch (c.row_bytes) {
    case 1:
      return copy_rows<1>(p, c, src, dst, begin, end);
    case 4:
      return copy_rows<4>(p, c, src, dst, begin, end);
    case 8:
      return copy_rows<8>(p, c, src, dst, begin, end);
    default:
      return copy_rows<0>(p, c, src, dst, begin, end);
  }
}

}  // namespace

glimpse_status compact(const glimpse_compact_params& p) {
  int64_t max_index = -1, max_slot = -1;
  for (int64_t i = 0; i < p.count; ++i) {
    if (p.index[i] < -1) return fail(GLIMPSE_INVALID, "compact: index[%lld]: expected -1 or a row, found %d",
                                     static_cast<long long>(i), p.index[i]);
    if (p.index[i] > max_index) max_index = p.index[i];
    if (p.slots == nullptr) continue;
    if (p.slots[i] < -1) return fail(GLIMPSE_INVALID, "compact: slots[%lld]: expected -1 or a row, found %d",
                                     static_cast<long long>(i), p.slots[i]);
    if (p.slots[i] > max_slot) max_slot = p.slots[i];
  }
  int64_t tasks = 0;
  for (int64_t j = 0; j < p.copy_count; ++j) {
    const glimpse_compact_copy& c = p.copies[j];
    if (c.layers > 0 && max_index >= c.src_rows)
      return fail(GLIMPSE_INVALID, "compact: index: expected rows below %lld, found %lld",
                  static_cast<long long>(c.src_rows), static_cast<long long>(max_index));
    if (c.layers > 0 && c.to_slots && max_slot >= c.dst_rows)
      return fail(GLIMPSE_INVALID, "compact: slots: expected rows below %lld, found %lld",
                  static_cast<long long>(c.dst_rows), static_cast<long long>(max_slot));
    tasks += c.layers * tasks_per_layer(c, p.count);
  }
  parallel_for(tasks, [&](int64_t task) {
    int64_t j = 0;
    for (;; ++j) {
      const int64_t own = p.copies[j].layers * tasks_per_layer(p.copies[j], p.count);
      if (task < own) break;
      task -= own;
    }
    run_task(p, p.copies[j], task);
  });
  return GLIMPSE_OK;
}

}  // namespace glimpse::GLIMPSE_ISA_NS

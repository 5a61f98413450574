// SPDX-License-Identifier: Apache-2.0
#include "glimpse/compact.h"

#include <tuple>
#include <vector>

#include <pybind11/stl.h>

#include "python/bind.h"

namespace glimpse::python {

// src, dst, layers, src_rows, dst_rows, row_bytes, src_layer_stride, src_stride, dst_layer_stride, dst_stride, to_slots
using Copy = std::tuple<address, address, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool>;

namespace {

struct Packed {
  std::vector<glimpse_compact_copy> copies;
  glimpse_compact_params params{};
  operator const glimpse_compact_params&() const { return params; }
};

Packed pack(address index, address slots, int64_t count, const std::vector<Copy>& copies) {
  Packed packed;
  packed.copies.reserve(copies.size());
  for (const Copy& copy : copies) {
    glimpse_compact_copy c{};
    bool to_slots = false;
    address src = 0, dst = 0;
    std::tie(src, dst, c.layers, c.src_rows, c.dst_rows, c.row_bytes, c.src_layer_stride, c.src_stride,
             c.dst_layer_stride, c.dst_stride, to_slots) = copy;
    c.src = pointer(src);
    c.dst = pointer(dst);
    c.to_slots = to_slots ? 1 : 0;
    packed.copies.push_back(c);
  }
  glimpse_compact_params& p = packed.params;
  p.index = pointer<const int32_t>(index);
  p.slots = pointer<const int32_t>(slots);
  p.count = count;
  p.copies = packed.copies.data();  // moving a vector does not move what it holds
  p.copy_count = static_cast<int64_t>(packed.copies.size());
  return packed;
}

}  // namespace

GLIMPSE_BIND(compact)

}  // namespace glimpse::python

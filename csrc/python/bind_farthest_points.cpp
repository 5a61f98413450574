// SPDX-License-Identifier: Apache-2.0
#include "glimpse/farthest_points.h"

#include "python/bind.h"

namespace glimpse::python {

namespace {

glimpse_farthest_points_params pack(address similarity, address cu_seqlens, address cu_picks, address picks, address keep,
                                    int64_t entries, int64_t groups, int64_t tokens, int64_t capacity, int64_t longest, bool repeat,
                                    int dtype) {
  glimpse_farthest_points_params p{};
  p.similarity = pointer<const void>(similarity);
  p.cu_seqlens = pointer<const int32_t>(cu_seqlens);
  p.cu_picks = pointer<const int32_t>(cu_picks);
  p.picks = pointer<int32_t>(picks);
  p.keep = pointer<uint8_t>(keep);
  p.entries = entries;
  p.groups = groups;
  p.tokens = tokens;
  p.capacity = capacity;
  p.longest = longest;
  p.repeat = repeat ? 1 : 0;
  p.dtype = dtype_of(dtype);
  return p;
}

glimpse_farthest_points_params sizes(int64_t entries, int64_t groups, int64_t tokens, int64_t capacity, int64_t longest) {
  return pack(0, 0, 0, 0, 0, entries, groups, tokens, capacity, longest, true, 0);
}

}  // namespace

GLIMPSE_BIND_WORKSPACE(farthest_points)

}  // namespace glimpse::python

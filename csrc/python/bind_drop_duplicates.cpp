// SPDX-License-Identifier: Apache-2.0
#include "glimpse/drop_duplicates.h"

#include "python/bind.h"

namespace glimpse::python {

namespace {

glimpse_drop_duplicates_params pack(address similarity, address cu_seqlens, address order, address cu_order, address targets,
                                    address survivors, address keep, int64_t entries, int64_t groups, int64_t tokens,
                                    int64_t listed, int64_t per_round, int64_t longest, int dtype) {
  glimpse_drop_duplicates_params p{};
  p.similarity = pointer<const void>(similarity);
  p.cu_seqlens = pointer<const int32_t>(cu_seqlens);
  p.order = pointer<const int32_t>(order);
  p.cu_order = pointer<const int32_t>(cu_order);
  p.targets = pointer<const int32_t>(targets);
  p.survivors = pointer<int32_t>(survivors);
  p.keep = pointer<uint8_t>(keep);
  p.entries = entries;
  p.groups = groups;
  p.tokens = tokens;
  p.listed = listed;
  p.per_round = per_round;
  p.longest = longest;
  p.dtype = dtype_of(dtype);
  return p;
}

glimpse_drop_duplicates_params sizes(int64_t entries, int64_t groups, int64_t tokens, int64_t listed, int64_t longest) {
  return pack(0, 0, 0, 0, 0, 0, 0, entries, groups, tokens, listed, 1, longest, 0);
}

}  // namespace

GLIMPSE_BIND_WORKSPACE(drop_duplicates)

}  // namespace glimpse::python

// SPDX-License-Identifier: Apache-2.0
#include "glimpse/greedy_dpp.h"

#include "python/bind.h"

namespace glimpse::python {

namespace {

glimpse_greedy_dpp_params pack(address similarity, address relevance, address cu_seqlens, address cu_picks, address picks,
                               address keep, int64_t entries, int64_t groups, int64_t tokens, int64_t capacity, int64_t longest,
                               float eps) {
  glimpse_greedy_dpp_params p{};
  p.similarity = pointer<const float>(similarity);
  p.relevance = pointer<const float>(relevance);
  p.cu_seqlens = pointer<const int32_t>(cu_seqlens);
  p.cu_picks = pointer<const int32_t>(cu_picks);
  p.picks = pointer<int32_t>(picks);
  p.keep = pointer<uint8_t>(keep);
  p.entries = entries;
  p.groups = groups;
  p.tokens = tokens;
  p.capacity = capacity;
  p.longest = longest;
  p.eps = eps;
  return p;
}

glimpse_greedy_dpp_params sizes(int64_t entries, int64_t groups, int64_t tokens, int64_t capacity, int64_t longest) {
  return pack(0, 0, 0, 0, 0, 0, entries, groups, tokens, capacity, longest, 0);
}

}  // namespace

GLIMPSE_BIND_WORKSPACE(greedy_dpp)

}  // namespace glimpse::python

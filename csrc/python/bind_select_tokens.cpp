// SPDX-License-Identifier: Apache-2.0
#include "glimpse/select_tokens.h"

#include "python/bind.h"

namespace glimpse::python {

namespace {

glimpse_select_tokens_params pack(address logits, address cu_groups, address caps, address floors, address forced,
                                  address token_rows, address row_keep, address cu_seqlens, address keep, address
                                  counts, address index, address cu_out, int64_t tokens, int64_t groups, int64_t rows,
                                  int64_t sequences, int64_t capacity, float threshold) {
  glimpse_select_tokens_params p{};
  p.logits = pointer<const float>(logits);
  p.cu_groups = pointer<const int32_t>(cu_groups);
  p.caps = pointer<const int32_t>(caps);
  p.floors = pointer<const int32_t>(floors);
  p.forced = pointer<const uint8_t>(forced);
  p.token_rows = pointer<const int32_t>(token_rows);
  p.row_keep = pointer<const uint8_t>(row_keep);
  p.cu_seqlens = pointer<const int32_t>(cu_seqlens);
  p.keep = pointer<uint8_t>(keep);
  p.counts = pointer<int32_t>(counts);
  p.index = pointer<int32_t>(index);
  p.cu_out = pointer<int32_t>(cu_out);
  p.tokens = tokens;
  p.groups = groups;
  p.rows = rows;
  p.sequences = sequences;
  p.capacity = capacity;
  p.threshold = threshold;
  return p;
}

glimpse_select_tokens_params sizes(int64_t tokens, int64_t groups, int64_t rows) {
  glimpse_select_tokens_params p{};
  p.tokens = tokens;
  p.groups = groups;
  p.rows = rows;
  return p;
}

}  // namespace

GLIMPSE_BIND_WORKSPACE(select_tokens)

}  // namespace glimpse::python

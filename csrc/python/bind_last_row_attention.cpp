// SPDX-License-Identifier: Apache-2.0
#include "glimpse/last_row_attention.h"

#include "python/bind.h"

namespace glimpse::python {

namespace {

glimpse_last_row_attention_params pack(address q, address k, address cu_k, address token_index, address token_seq, address lse,
                                       address out, int64_t sequences, int64_t tokens, int64_t count, int64_t q_heads,
                                       int64_t kv_heads, int64_t dim, int64_t q_stride, int64_t q_head_stride,
                                       int64_t k_stride, int64_t k_head_stride, int64_t lse_stride, float scale, int dtype) {
  glimpse_last_row_attention_params p{};
  p.q = pointer(q);
  p.k = pointer(k);
  p.cu_k = pointer<const int32_t>(cu_k);
  p.token_index = pointer<const int32_t>(token_index);
  p.token_seq = pointer<const int32_t>(token_seq);
  p.lse = pointer<const float>(lse);
  p.out = pointer<float>(out);
  p.sequences = sequences;
  p.tokens = tokens;
  p.count = count;
  p.q_heads = q_heads;
  p.kv_heads = kv_heads;
  p.dim = dim;
  p.q_stride = q_stride;
  p.q_head_stride = q_head_stride;
  p.k_stride = k_stride;
  p.k_head_stride = k_head_stride;
  p.lse_stride = lse_stride;
  p.scale = scale;
  p.dtype = dtype_of(dtype);
  return p;
}

}  // namespace

GLIMPSE_BIND(last_row_attention)

}  // namespace glimpse::python

// SPDX-License-Identifier: Apache-2.0
#include "glimpse/received_attention.h"

#include "python/bind.h"

namespace glimpse::python {

namespace {

glimpse_received_attention_params pack(address q, address k, address lse, address cu_q, address cu_k, address q_positions,
                                       address order, address out, int64_t segments, int64_t q_rows, int64_t k_rows,
                                       int64_t q_heads, int64_t kv_heads, int64_t dim, int64_t group, int64_t q_stride,
                                       int64_t q_head_stride, int64_t k_stride, int64_t k_head_stride, int64_t lse_stride,
                                       int64_t lse_head_stride, float scale, bool causal, int dtype) {
  glimpse_received_attention_params p{};
  p.q = pointer(q);
  p.k = pointer(k);
  p.lse = pointer<const float>(lse);
  p.cu_q = pointer<const int32_t>(cu_q);
  p.cu_k = pointer<const int32_t>(cu_k);
  p.q_positions = pointer<const int32_t>(q_positions);
  p.order = pointer<const int32_t>(order);
  p.out = pointer<float>(out);
  p.segments = segments;
  p.q_rows = q_rows;
  p.k_rows = k_rows;
  p.q_heads = q_heads;
  p.kv_heads = kv_heads;
  p.dim = dim;
  p.group = group;
  p.q_stride = q_stride;
  p.q_head_stride = q_head_stride;
  p.k_stride = k_stride;
  p.k_head_stride = k_head_stride;
  p.lse_stride = lse_stride;
  p.lse_head_stride = lse_head_stride;
  p.scale = scale;
  p.causal = causal ? 1 : 0;
  p.dtype = dtype_of(dtype);
  return p;
}

}  // namespace

GLIMPSE_BIND(received_attention)

}  // namespace glimpse::python

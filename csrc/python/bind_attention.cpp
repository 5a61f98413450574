// SPDX-License-Identifier: Apache-2.0
#include "glimpse/attention.h"

#include "python/bind.h"

namespace glimpse::python {

void bind_attention(py::module_& m) {
  m.def("attention",
        [](address q, address k, address v, address out, address lse, address cu_q, address cu_k, address q_positions,
           int64_t segments, int64_t q_rows, int64_t k_rows, int64_t q_heads, int64_t kv_heads, int64_t dim,
           int64_t v_dim, int64_t q_stride, int64_t q_head_stride, int64_t k_stride, int64_t k_head_stride,
           int64_t v_stride, int64_t v_head_stride, int64_t out_stride, int64_t out_head_stride, float scale, bool causal,
           int dtype) {
          glimpse_attention_params p{};
          p.q = pointer(q);
          p.k = pointer(k);
          p.v = pointer(v);
          p.out = pointer(out);
          p.lse = pointer<float>(lse);
          p.cu_q = pointer<const int32_t>(cu_q);
          p.cu_k = pointer<const int32_t>(cu_k);
          p.q_positions = pointer<const int32_t>(q_positions);
          p.segments = segments;
          p.q_rows = q_rows;
          p.k_rows = k_rows;
          p.q_heads = q_heads;
          p.kv_heads = kv_heads;
          p.dim = dim;
          p.v_dim = v_dim;
          p.q_stride = q_stride;
          p.q_head_stride = q_head_stride;
          p.k_stride = k_stride;
          p.k_head_stride = k_head_stride;
          p.v_stride = v_stride;
          p.v_head_stride = v_head_stride;
          p.out_stride = out_stride;
          p.out_head_stride = out_head_stride;
          p.scale = scale;
          p.causal = causal ? 1 : 0;
          p.dtype = dtype_of(dtype);
          call(glimpse_attention, p);
        });
}

}  // namespace glimpse::python

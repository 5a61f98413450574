// SPDX-License-Identifier: Apache-2.0
#include "glimpse/rope.h"

#include "python/bind.h"

namespace glimpse::python {

void bind_rope(py::module_& m) {
  m.def("rope", [](address q, address k, address v, address k_out, address v_out, address cos, address sin,
                   address slots, int64_t tokens, int64_t q_heads, int64_t kv_heads, int64_t dim, int64_t v_dim,
                   int64_t out_rows, int64_t q_stride, int64_t q_head_stride, int64_t k_stride, int64_t k_head_stride,
                   int64_t v_stride, int64_t v_head_stride, int64_t k_out_stride, int64_t k_out_head_stride,
                   int64_t v_out_stride, int64_t v_out_head_stride, int64_t cos_stride, int64_t sin_stride, int dtype) {
    glimpse_rope_params p{};
    p.q = pointer(q);
    p.k = pointer(k);
    p.v = pointer(v);
    p.k_out = pointer(k_out);
    p.v_out = pointer(v_out);
    p.cos = pointer<const float>(cos);
    p.sin = pointer<const float>(sin);
    p.slots = pointer<const int32_t>(slots);
    p.tokens = tokens;
    p.q_heads = q_heads;
    p.kv_heads = kv_heads;
    p.dim = dim;
    p.v_dim = v_dim;
    p.out_rows = out_rows;
    p.q_stride = q_stride;
    p.q_head_stride = q_head_stride;
    p.k_stride = k_stride;
    p.k_head_stride = k_head_stride;
    p.v_stride = v_stride;
    p.v_head_stride = v_head_stride;
    p.k_out_stride = k_out_stride;
    p.k_out_head_stride = k_out_head_stride;
    p.v_out_stride = v_out_stride;
    p.v_out_head_stride = v_out_head_stride;
    p.cos_stride = cos_stride;
    p.sin_stride = sin_stride;
    p.dtype = dtype_of(dtype);
    call(glimpse_rope, p);
  });
}

}  // namespace glimpse::python

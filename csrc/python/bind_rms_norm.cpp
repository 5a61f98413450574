// SPDX-License-Identifier: Apache-2.0
#include "glimpse/rms_norm.h"

#include "python/bind.h"

namespace glimpse::python {

void bind_rms_norm(py::module_& m) {
  m.def("rms_norm", [](address x, address weight, address residual, address out, int64_t rows, int64_t cols,
                       int64_t x_stride, int64_t residual_stride, int64_t out_stride, float eps, int dtype) {
    glimpse_rms_norm_params p{};
    p.x = pointer(x);
    p.weight = pointer(weight);
    p.residual = pointer(residual);
    p.out = pointer(out);
    p.rows = rows;
    p.cols = cols;
    p.x_stride = x_stride;
    p.residual_stride = residual_stride;
    p.out_stride = out_stride;
    p.eps = eps;
    p.dtype = dtype_of(dtype);
    call(glimpse_rms_norm, p);
  });
}

}  // namespace glimpse::python

// SPDX-License-Identifier: Apache-2.0
#include "glimpse/swiglu.h"

#include "python/bind.h"

namespace glimpse::python {

void bind_swiglu(py::module_& m) {
  m.def("swiglu", [](address gate, address up, address out, int64_t rows, int64_t cols, int64_t gate_stride,
                     int64_t up_stride, int64_t out_stride, int dtype) {
    glimpse_swiglu_params p{};
    p.gate = pointer(gate);
    p.up = pointer(up);
    p.out = pointer(out);
    p.rows = rows;
    p.cols = cols;
    p.gate_stride = gate_stride;
    p.up_stride = up_stride;
    p.out_stride = out_stride;
    p.dtype = dtype_of(dtype);
    call(glimpse_swiglu, p);
  });
}

}  // namespace glimpse::python

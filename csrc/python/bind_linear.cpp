// SPDX-License-Identifier: Apache-2.0
#include "glimpse/linear.h"

#include "python/bind.h"

namespace glimpse::python {

void bind_linear(py::module_& m) {
  // parts: (weight, scales, bias, out, cols, weight_stride, out_stride) each
  m.def("linear", [](address x, int64_t rows, int64_t depth, int64_t x_stride, const py::list& parts, int64_t group,
                     int epilogue, int dtype) {
    glimpse_linear_params p{};
    if (parts.size() > GLIMPSE_LINEAR_PARTS) throw py::value_error("linear: parts: too many");
    p.x = pointer(x);
    p.rows = rows;
    p.depth = depth;
    p.x_stride = x_stride;
    p.num_parts = static_cast<int64_t>(parts.size());
    for (int64_t i = 0; i < p.num_parts; ++i) {
      const py::tuple fields = parts[static_cast<size_t>(i)];
      glimpse_linear_part& part = p.parts[i];
      part.weight = pointer(fields[0].cast<address>());
      part.scales = pointer<const float>(fields[1].cast<address>());
      part.bias = pointer(fields[2].cast<address>());
      part.out = pointer(fields[3].cast<address>());
      part.cols = fields[4].cast<int64_t>();
      part.weight_stride = fields[5].cast<int64_t>();
      part.out_stride = fields[6].cast<int64_t>();
    }
    p.group = group;
    p.epilogue = static_cast<glimpse_linear_epilogue>(epilogue);
    p.dtype = dtype_of(dtype);
    call(glimpse_linear, p);
  });
}

}  // namespace glimpse::python

// SPDX-License-Identifier: Apache-2.0
#include "glimpse/graph_flow.h"

#include "python/bind.h"

namespace glimpse::python {

void bind_graph_flow(py::module_& m) {
  m.def("graph_flow", [](address features, address cu_seqlens, address scores, address degrees, int64_t rows, int64_t groups,
                         int64_t dim, int64_t stride, int64_t steps, float threshold, float temperature, bool rounded,
                         bool half_degree, int dtype) {
    glimpse_graph_flow_params p{};
    p.features = pointer(features);
    p.cu_seqlens = pointer<const int32_t>(cu_seqlens);
    p.scores = pointer<float>(scores);
    p.degrees = pointer<int32_t>(degrees);
    p.rows = rows;
    p.groups = groups;
    p.dim = dim;
    p.stride = stride;
    p.steps = steps;
    p.threshold = threshold;
    p.temperature = temperature;
    p.rounded = rounded;
    p.half_degree = half_degree;
    p.dtype = dtype_of(dtype);
    call(glimpse_graph_flow, p);
  });
}

}  // namespace glimpse::python

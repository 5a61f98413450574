// SPDX-License-Identifier: Apache-2.0
#include "glimpse/merge_nearest.h"

#include "python/bind.h"

namespace glimpse::python {

namespace {

glimpse_merge_nearest_params pack(address values, address metric, address targets, address sources, address cu, address out,
                                  address nearest, int64_t groups, int64_t rows, int64_t width, int64_t dim,
                                  int64_t values_stride, int64_t metric_stride, int64_t out_stride, bool plus_mean, int dtype,
                                  int metric_dtype) {
  glimpse_merge_nearest_params p{};
  p.values = pointer(values);
  p.metric = pointer(metric);
  p.targets = pointer<const uint8_t>(targets);
  p.sources = pointer<const uint8_t>(sources);
  p.cu = pointer<const int32_t>(cu);
  p.out = pointer(out);
  p.nearest = pointer<int32_t>(nearest);
  p.groups = groups;
  p.rows = rows;
  p.width = width;
  p.dim = dim;
  p.values_stride = values_stride;
  p.metric_stride = metric_stride;
  p.out_stride = out_stride;
  p.plus_mean = plus_mean ? 1 : 0;
  p.dtype = dtype_of(dtype);
  p.metric_dtype = dtype_of(metric_dtype);
  return p;
}

}  // namespace

GLIMPSE_BIND(merge_nearest)

}  // namespace glimpse::python

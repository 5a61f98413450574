// SPDX-License-Identifier: Apache-2.0
#include "glimpse/patchify.h"

#include <array>
#include <utility>

#include <pybind11/stl.h>

#include "python/bind.h"

namespace glimpse::python {

namespace {

using Size = std::pair<int64_t, int64_t>;

glimpse_patchify_params pack(address image, address out, Size size, int64_t image_stride, Size out_size, int resample,
                             bool down_first, int dtype, int64_t patch_size, int64_t frames, int64_t merge_size, const
                             std::array<float, 3>& mean, const std::array<float, 3>& std, double rescale) {
  glimpse_patchify_params p{};
  p.image = pointer<const uint8_t>(image);
  p.out = pointer(out);
  p.height = size.first;
  p.width = size.second;
  p.image_stride = image_stride;
  p.out_height = out_size.first;
  p.out_width = out_size.second;
  p.resample = static_cast<glimpse_resample>(resample);
  p.down_first = down_first ? 1 : 0;
  p.dtype = dtype_of(dtype);
  p.patch_size = patch_size;
  p.frames = frames;
  p.merge_size = merge_size;
  for (int c = 0; c < 3; ++c) {
    p.mean[c] = mean[static_cast<size_t>(c)];
    p.std[c] = std[static_cast<size_t>(c)];
  }
  p.rescale = rescale;
  return p;
}

}  // namespace

GLIMPSE_BIND(patchify)

}  // namespace glimpse::python

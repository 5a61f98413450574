// SPDX-License-Identifier: Apache-2.0
#include "glimpse/patchify.h"

#include <array>

#include <pybind11/stl.h>

#include "python/bind.h"

namespace glimpse::python {

void bind_patchify(py::module_& m) {
  m.def("patchify", [](address image, address out, int64_t height, int64_t width, int64_t image_stride,
                       int64_t patch_size, int64_t frames, int64_t merge_size, const std::array<float, 3>& mean,
                       const std::array<float, 3>& std, double rescale) {
    glimpse_patchify_params p{};
    p.image = pointer<const uint8_t>(image);
    p.out = pointer<float>(out);
    p.height = height;
    p.width = width;
    p.image_stride = image_stride;
    p.patch_size = patch_size;
    p.frames = frames;
    p.merge_size = merge_size;
    for (int c = 0; c < 3; ++c) {
      p.mean[c] = mean[static_cast<size_t>(c)];
      p.std[c] = std[static_cast<size_t>(c)];
    }
    p.rescale = rescale;
    call(glimpse_patchify, p);
  });
}

}  // namespace glimpse::python

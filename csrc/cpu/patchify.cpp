// SPDX-License-Identifier: Apache-2.0
// Picture to patch rows. A channel has 256 possible values, so normalising is a look-up, exact to the reference's roundings.
#include "glimpse/patchify.h"

#include "cpu/isa.h"

namespace glimpse::GLIMPSE_ISA_NS {
namespace {

struct Tables {
  float value[3][256];
};

void fill(Tables& tables, const glimpse_patchify_params& p) {
  for (int c = 0; c < 3; ++c)
    for (int v = 0; v < 256; ++v) {
      const float scaled = static_cast<float>(v * p.rescale);
      tables.value[c][v] = (scaled - p.mean[c]) / p.std[c];
    }
}

void one_patch(const glimpse_patchify_params& p, const Tables& tables, const uint8_t* pixels, float* out) {
  const int64_t size = p.patch_size, area = size * size, plane = p.frames * area;
  for (int64_t y = 0; y < size; ++y) {
    const uint8_t* row = pixels + y * p.image_stride;
    float* r = out + y * size;
    float* g = r + plane;
    float* b = g + plane;
    for (int64_t x = 0; x < size; ++x) {
      r[x] = tables.value[0][row[3 * x]];
      g[x] = tables.value[1][row[3 * x + 1]];
      b[x] = tables.value[2][row[3 * x + 2]];
    }
  }
  for (int c = 0; c < 3; ++c)
    for (int64_t frame = 1; frame < p.frames; ++frame)
      memcpy(out + c * plane + frame * area, out + c * plane, static_cast<size_t>(area) * sizeof(float));
}

}  // namespace

glimpse_status patchify(const glimpse_patchify_params& p) {
  Tables tables;
  fill(tables, p);
  const int64_t unit = p.patch_size * p.merge_size;
  const int64_t group_cols = p.width / unit, in_group = p.merge_size * p.merge_size;
  const int64_t row_size = 3 * p.frames * p.patch_size * p.patch_size;
  parallel_range(p.height / unit * group_cols, 8, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const uint8_t* corner = p.image + group / group_cols * unit * p.image_stride + group % group_cols * unit * 3;
      for (int64_t i = 0; i < in_group; ++i) {
        const int64_t y = i / p.merge_size * p.patch_size, x = i % p.merge_size * p.patch_size;
        one_patch(p, tables, corner + y * p.image_stride + x * 3, p.out + (group * in_group + i) * row_size);
      }
    }
  });
  return GLIMPSE_OK;
}

}  // namespace glimpse::GLIMPSE_ISA_NS

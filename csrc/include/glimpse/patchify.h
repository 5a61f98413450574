/* SPDX-License-Identifier: Apache-2.0 */
#ifndef GLIMPSE_PATCHIFY_H
#define GLIMPSE_PATCHIFY_H

#include "glimpse/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Filters of a resize, as Pillow names and computes them. */
typedef enum glimpse_resample {
  GLIMPSE_RESAMPLE_BOX = 0,
  GLIMPSE_RESAMPLE_BILINEAR = 1,
  GLIMPSE_RESAMPLE_HAMMING = 2,
  GLIMPSE_RESAMPLE_BICUBIC = 3,
  GLIMPSE_RESAMPLE_LANCZOS = 4,
} glimpse_resample;

/* The image is resized to out_height x out_width where that is another size, then
 * out[patch] = (channel, frame, y, x) of (pixel * rescale - mean) / std; patches in merge x merge groups, the groups row by row.
 * The pixels of an image row are contiguous; out_height and out_width are multiples of patch_size * merge_size. */
typedef struct glimpse_patchify_params {
  const uint8_t* image; /* [height, width, 3] */
  void* out;            /* [out_height * out_width / patch_size^2, 3 * frames * patch_size^2] */
  int64_t height, width, image_stride; /* stride of an image row in bytes */
  int64_t out_height, out_width;
  glimpse_resample resample;
  int32_t down_first; /* not 0: the resize's vertical pass comes before the horizontal one */
  glimpse_dtype dtype; /* of out */
  int64_t patch_size, frames, merge_size;
  float mean[3], std[3];
  double rescale;
} glimpse_patchify_params;

GLIMPSE_API glimpse_status glimpse_patchify(const glimpse_patchify_params* p);
/* GLIMPSE_UNSUPPORTED where the picture would have to be resized. */
GLIMPSE_API glimpse_status glimpse_cuda_patchify(const glimpse_patchify_params* p, const glimpse_cuda_call* call);

#ifdef __cplusplus
}
#endif

#endif

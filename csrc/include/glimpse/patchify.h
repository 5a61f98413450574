/* SPDX-License-Identifier: Apache-2.0 */
#ifndef GLIMPSE_PATCHIFY_H
#define GLIMPSE_PATCHIFY_H

#include "glimpse/common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* out[patch] = (channel, frame, y, x) of (pixel * rescale - mean) / std; patches in merge x merge groups, the groups row by row.
 * The pixels of an image row are contiguous; height and width are multiples of patch_size * merge_size. */
typedef struct glimpse_patchify_params {
  const uint8_t* image; /* [height, width, 3] */
  float* out;           /* [height * width / patch_size^2, 3 * frames * patch_size^2] */
  int64_t height, width, image_stride; /* stride of an image row in bytes */
  int64_t patch_size, frames, merge_size;
  float mean[3], std[3];
  double rescale;
} glimpse_patchify_params;

GLIMPSE_API glimpse_status glimpse_patchify(const glimpse_patchify_params* p);

#ifdef __cplusplus
}
#endif

#endif

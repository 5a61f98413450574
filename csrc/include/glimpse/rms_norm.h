/* SPDX-License-Identifier: Apache-2.0 */
#ifndef GLIMPSE_RMS_NORM_H
#define GLIMPSE_RMS_NORM_H

#include "glimpse/common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* residual given: residual += x, rounded once to the dtype, and the new residual takes the place of x.
 * out = round(x / sqrt(mean(x^2) + eps)) * weight. Row strides in elements, rows contiguous. out may be x. */
typedef struct glimpse_rms_norm_params {
  const void* x;      /* [rows, cols] */
  const void* weight; /* [cols] */
  void* residual;     /* [rows, cols] or NULL */
  void* out;          /* [rows, cols] */
  int64_t rows, cols;
  int64_t x_stride, residual_stride, out_stride;
  float eps;
  glimpse_dtype dtype;
} glimpse_rms_norm_params;

GLIMPSE_API glimpse_status glimpse_rms_norm(const glimpse_rms_norm_params* p);

#ifdef __cplusplus
}
#endif

#endif

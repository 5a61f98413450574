/* SPDX-License-Identifier: Apache-2.0 */
#ifndef GLIMPSE_LINEAR_H
#define GLIMPSE_LINEAR_H

#include "glimpse/common.h"

#ifdef __cplusplus
extern "C" {
#endif

#define GLIMPSE_LINEAR_PARTS 4

typedef enum glimpse_linear_epilogue {
  GLIMPSE_LINEAR_NONE = 0,
  GLIMPSE_LINEAR_GELU = 1,  /* 0.5 y (1 + erf(y / sqrt 2)) */
  GLIMPSE_LINEAR_GATED = 2, /* two parts of equal size: silu(y of the first) * y of the second, to the first one's out */
} glimpse_linear_epilogue;

/* One weight matrix and where its product goes. */
typedef struct glimpse_linear_part {
  const void* weight;  /* [cols, depth] of dtype; int8 where scales are given */
  const float* scales; /* NULL, or [cols, ceil(depth / group)], contiguous: entry = weight * scale of its group */
  const void* bias;    /* NULL or [cols] of dtype */
  void* out;           /* [rows, cols] of dtype */
  int64_t cols;
  int64_t weight_stride, out_stride;
} glimpse_linear_part;

/* out = epilogue(x weight^T + bias), fp32 sums. Row strides in elements, rows contiguous. All parts have scales or none.
 * out overlaps neither x nor a weight. */
typedef struct glimpse_linear_params {
  const void* x; /* [rows, depth] of dtype */
  int64_t rows, depth, x_stride;
  glimpse_linear_part parts[GLIMPSE_LINEAR_PARTS];
  int64_t num_parts;
  int64_t group; /* of the scales; multiple of 32 */
  glimpse_linear_epilogue epilogue;
  glimpse_dtype dtype;
} glimpse_linear_params;

GLIMPSE_API glimpse_status glimpse_linear(const glimpse_linear_params* p);

#ifdef __cplusplus
}
#endif

#endif

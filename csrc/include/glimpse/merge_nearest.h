/* SPDX-License-Identifier: Apache-2.0 */
#ifndef GLIMPSE_MERGE_NEAREST_H
#define GLIMPSE_MERGE_NEAREST_H

#include "glimpse/common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* nearest[i] = the target of i's group whose metric has the largest cosine with i's, the lower row of two; -1 for rows that
 * are no source, or have no target, or whose metric has no finite length. A target that something joined gets the mean of
 * itself and those rows of values, or with plus_mean its value plus their mean; no other row of out is written. Lengths
 * count as at least 1e-8. Group g has the rows cu[g] .. cu[g+1]. out may be values. Strides in elements; the last
 * dimension of values, metric and out is contiguous. */
typedef struct glimpse_merge_nearest_params {
  const void* values;     /* [rows, width] */
  const void* metric;     /* [rows, dim] */
  const uint8_t* targets; /* [rows], 0 or 1 */
  const uint8_t* sources; /* [rows], 0 or 1, or NULL: all rows */
  const int32_t* cu;      /* [groups + 1] */
  void* out;              /* [rows, width] */
  int32_t* nearest;       /* [rows] */
  int64_t groups, rows, width, dim;
  int64_t values_stride, metric_stride, out_stride;
  int plus_mean;
  glimpse_dtype dtype;        /* of values and out */
  glimpse_dtype metric_dtype; /* of metric */
} glimpse_merge_nearest_params;

GLIMPSE_API glimpse_status glimpse_merge_nearest(const glimpse_merge_nearest_params* p);

#ifdef __cplusplus
}
#endif

#endif

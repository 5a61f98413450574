/* SPDX-License-Identifier: Apache-2.0 */
#ifndef GLIMPSE_FARTHEST_POINTS_H
#define GLIMPSE_FARTHEST_POINTS_H

#include "glimpse/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Greedy max-min selection by the distance 1 - similarity, rounded to the dtype: in every group first the token with the largest second-smallest
 * entry of its column, then the one whose nearest picked token is farthest. Ties to the lower index; NaN is the smallest distance. */
typedef struct glimpse_farthest_points_params {
  const void* similarity;    /* [entries], the groups' matrices n x n one after the other */
  const int32_t* cu_seqlens; /* [groups + 1], from 0 to tokens */
  const int32_t* cu_picks;   /* [groups + 1], from 0: where the picks of each group start */
  int32_t* picks;            /* [capacity], packed rows in the order of picking; -1: none */
  uint8_t* keep;             /* [tokens] */
  int64_t entries, groups, tokens, capacity;
  int64_t longest; /* no group is longer; one that is gets no picks. Negative: unknown */
  int32_t repeat;  /* not 0: a token may be picked again */
  glimpse_dtype dtype;
} glimpse_farthest_points_params;

GLIMPSE_API glimpse_status glimpse_farthest_points(const glimpse_farthest_points_params* p);
GLIMPSE_API glimpse_status glimpse_cuda_farthest_points(const glimpse_farthest_points_params* p, const glimpse_cuda_call* call);
GLIMPSE_API size_t glimpse_cuda_farthest_points_workspace(const glimpse_farthest_points_params* p); /* sizes alone are read */

#ifdef __cplusplus
}
#endif

#endif

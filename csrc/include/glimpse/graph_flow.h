/* SPDX-License-Identifier: Apache-2.0 */
#ifndef GLIMPSE_GRAPH_FLOW_H
#define GLIMPSE_GRAPH_FLOW_H

#include "glimpse/common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* In each group, with s the cosines of its rows: edges where s >= threshold; shares p, the softmax of s / temperature over the edges of a
 * row; v, at first the norms of the rows, then `steps` times v_j = sum_i v_i p_ij; scores = v over the number of edges. A row of zeros
 * has no edge; nor has one whose norm is not finite, which scores NaN. */
typedef struct glimpse_graph_flow_params {
  const void* features;      /* [rows, dim], rows contiguous, `stride` elements apart */
  const int32_t* cu_seqlens; /* [groups + 1], ascending, at most rows; rows outside score 0 */
  float* scores;             /* [rows] */
  int32_t* degrees;          /* [rows] */
  int64_t rows, groups, dim, stride;
  int64_t steps;
  float threshold, temperature; /* both above 0 */
  int32_t rounded;              /* norm, unit row, s, s / temperature and p are rounded to dtype */
  int32_t half_degree;          /* an edge whose share is at most 2^-25 is not counted */
  glimpse_dtype dtype;
} glimpse_graph_flow_params;

GLIMPSE_API glimpse_status glimpse_graph_flow(const glimpse_graph_flow_params* p);

#ifdef __cplusplus
}
#endif

#endif

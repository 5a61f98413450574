/* SPDX-License-Identifier: Apache-2.0 */
#ifndef GLIMPSE_WINDOW_TOPK_H
#define GLIMPSE_WINDOW_TOPK_H

#include "glimpse/common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A group is a grid of tokens, cut into windows of window x window, what is left over being part of the last one of its direction. Its
 * tokens are gone through by falling score (then rising index; NaN below everything, -0 = +0) and picked while their window has fewer
 * picks than its cap, the budget over the number of windows, and the group fewer than its budget. */
typedef struct glimpse_window_topk_params {
  const float* scores;       /* [tokens], group after group */
  const int32_t* cu_seqlens; /* [groups + 1], ascending, at most tokens */
  const int32_t* grids;      /* [groups, 2], height and width; tokens behind the grid are never picked */
  const int32_t* cu_picks;   /* [groups + 1], ascending: where the picks of a group go, and its budget */
  int32_t* picks;            /* [capacity], rows in the order of picking, -1 where there is none */
  uint8_t* keep;             /* [tokens] */
  int64_t tokens, groups, capacity;
  int64_t window;     /* at least 1 */
  int64_t max_seqlen; /* a longer group has no picks; -1: any length */
  int32_t share_up;   /* the cap is rounded up, else down */
} glimpse_window_topk_params;

GLIMPSE_API glimpse_status glimpse_window_topk(const glimpse_window_topk_params* p);

#ifdef __cplusplus
}
#endif

#endif

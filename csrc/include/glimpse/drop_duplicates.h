/* SPDX-License-Identifier: Apache-2.0 */
#ifndef GLIMPSE_DROP_DUPLICATES_H
#define GLIMPSE_DROP_DUPLICATES_H

#include "glimpse/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Rounds of bipartite matching on a list of each group: tokens at even places are ranked by their highest similarity with one at an odd
 * place, the first min(per_round, length - target, how many there are) go, the rest of them in this order and then the odd places are the new list. */
typedef struct glimpse_drop_duplicates_params {
  const void* similarity;    /* [entries], the groups' matrices n x n one after the other */
  const int32_t* cu_seqlens; /* [groups + 1], from 0 to tokens */
  const int32_t* order;      /* [listed], packed rows, list after list */
  const int32_t* cu_order;   /* [groups + 1], from 0 to listed */
  const int32_t* targets;    /* [groups] */
  int32_t* survivors;        /* [listed], each list as it ends, then -1 */
  uint8_t* keep;             /* [tokens] */
  int64_t entries, groups, tokens, listed, per_round;
  int64_t longest; /* no group is longer; one that is has no survivors. Negative: unknown */
  glimpse_dtype dtype;
} glimpse_drop_duplicates_params;

GLIMPSE_API glimpse_status glimpse_drop_duplicates(const glimpse_drop_duplicates_params* p);
GLIMPSE_API glimpse_status glimpse_cuda_drop_duplicates(const glimpse_drop_duplicates_params* p, const glimpse_cuda_call* call);
GLIMPSE_API size_t glimpse_cuda_drop_duplicates_workspace(const glimpse_drop_duplicates_params* p); /* sizes alone are read */

#ifdef __cplusplus
}
#endif

#endif

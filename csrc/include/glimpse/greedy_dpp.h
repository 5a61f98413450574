/* SPDX-License-Identifier: Apache-2.0 */
#ifndef GLIMPSE_GREEDY_DPP_H
#define GLIMPSE_GREEDY_DPP_H

#include "glimpse/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Greedy MAP of a determinantal point process in every group by an incremental Cholesky factor, with the kernel
 * (relevance[i] * similarity[i, j]) * relevance[j]. A token whose gain is at most eps times its own entry is not picked. */
typedef struct glimpse_greedy_dpp_params {
  const float* similarity;   /* [entries], the groups' matrices n x n one after the other */
  const float* relevance;    /* [tokens] */
  const int32_t* cu_seqlens; /* [groups + 1], from 0 to tokens */
  const int32_t* cu_picks;   /* [groups + 1], from 0: where the picks of each group start */
  int32_t* picks;            /* [capacity], packed rows in the order of picking; -1: none */
  uint8_t* keep;             /* [tokens] */
  int64_t entries, groups, tokens, capacity;
  int64_t longest; /* no group is longer; one that is gets no picks. Negative: unknown */
  float eps;
} glimpse_greedy_dpp_params;

GLIMPSE_API glimpse_status glimpse_greedy_dpp(const glimpse_greedy_dpp_params* p);
GLIMPSE_API glimpse_status glimpse_cuda_greedy_dpp(const glimpse_greedy_dpp_params* p, const glimpse_cuda_call* call);
GLIMPSE_API size_t glimpse_cuda_greedy_dpp_workspace(const glimpse_greedy_dpp_params* p); /* sizes alone are read */

#ifdef __cplusplus
}
#endif

#endif

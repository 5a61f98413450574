/* SPDX-License-Identifier: Apache-2.0 */
#ifndef GLIMPSE_SELECT_TOKENS_H
#define GLIMPSE_SELECT_TOKENS_H

#include "glimpse/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A group keeps its tokens with logit > threshold; if they are more than its cap, its best `cap` tokens instead; then its best
 * `floor` tokens and the forced ones are added. Best: higher logit, then lower index; NaN below everything, -0 = +0. */
typedef struct glimpse_select_tokens_params {
  const float* logits;       /* [tokens], group after group */
  const int32_t* cu_groups;  /* [groups + 1], from 0 to tokens */
  const int32_t* caps;       /* [groups] */
  const int32_t* floors;     /* [groups] */
  const uint8_t* forced;     /* [tokens] or NULL */
  const int32_t* token_rows; /* [tokens], packed row of each token */
  const uint8_t* row_keep;   /* [rows], 1: the row stays whatever its token does */
  const int32_t* cu_seqlens; /* [sequences + 1], ascending, at most rows */
  uint8_t* keep;             /* [tokens] */
  int32_t* counts;           /* [groups] */
  int32_t* index;            /* [capacity], rows that stay, ascending, then -1 */
  int32_t* cu_out;           /* [sequences + 1] */
  int64_t tokens, groups, rows, sequences, capacity;
  float threshold;
} glimpse_select_tokens_params;

GLIMPSE_API glimpse_status glimpse_select_tokens(const glimpse_select_tokens_params* p);
GLIMPSE_API glimpse_status glimpse_cuda_select_tokens(const glimpse_select_tokens_params* p, const glimpse_cuda_call* call);
GLIMPSE_API size_t glimpse_cuda_select_tokens_workspace(const glimpse_select_tokens_params* p); /* tokens, groups and rows alone are read */

#ifdef __cplusplus
}
#endif

#endif

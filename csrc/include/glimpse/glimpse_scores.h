/* SPDX-License-Identifier: Apache-2.0 */
#ifndef GLIMPSE_GLIMPSE_SCORES_H
#define GLIMPSE_GLIMPSE_SCORES_H

#include "glimpse/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* out[n, h] = scale * q[token_seq[n], h] . k[token_index[n], h / (q_heads / kv_heads)] - (lse ? lse[token_seq[n], h] : 0)
 * Strides in elements; the last dimension of q, k, lse and out is contiguous. */
typedef struct glimpse_glimpse_scores_params {
  const void* q; /* [sequences, q_heads, dim] */
  const void* k; /* [tokens, kv_heads, dim] */
  const int32_t* token_index; /* [count] */
  const int32_t* token_seq;   /* [count] */
  const float* lse;           /* [sequences, q_heads] or NULL */
  float* out;                 /* [count, q_heads] */
  int64_t sequences, tokens, count;
  int64_t q_heads, kv_heads, dim;
  int64_t q_stride, q_head_stride, k_stride, k_head_stride, lse_stride, out_stride;
  float scale;
  glimpse_dtype dtype; /* of q and k */
} glimpse_glimpse_scores_params;

GLIMPSE_API glimpse_status glimpse_glimpse_scores(const glimpse_glimpse_scores_params* p);
GLIMPSE_API glimpse_status glimpse_cuda_glimpse_scores(const glimpse_glimpse_scores_params* p, const glimpse_cuda_call* call);

#ifdef __cplusplus
}
#endif

#endif

/* SPDX-License-Identifier: Apache-2.0 */
#ifndef GLIMPSE_LAST_ROW_ATTENTION_H
#define GLIMPSE_LAST_ROW_ATTENTION_H

#include "glimpse/common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* out[n] = mean over heads h of softmax(scale * q[s, h] . k[cu_k[s] .. cu_k[s+1], h / (q_heads / kv_heads)]) at key
 * token_index[n], s = token_seq[n]. With lse (the natural log of the sum of exp of each row and head) cu_k is not read; a
 * head with -inf gives 0. Strides in elements; the last dimension of q, k and lse is contiguous. */
typedef struct glimpse_last_row_attention_params {
  const void* q;              /* [sequences, q_heads, dim] */
  const void* k;              /* [tokens, kv_heads, dim] */
  const int32_t* cu_k;        /* [sequences + 1] */
  const int32_t* token_index; /* [count] */
  const int32_t* token_seq;   /* [count] */
  const float* lse;           /* [sequences, q_heads] or NULL */
  float* out;                 /* [count] */
  int64_t sequences, tokens, count;
  int64_t q_heads, kv_heads, dim;
  int64_t q_stride, q_head_stride, k_stride, k_head_stride, lse_stride;
  float scale;
  glimpse_dtype dtype; /* of q and k */
} glimpse_last_row_attention_params;

GLIMPSE_API glimpse_status glimpse_last_row_attention(const glimpse_last_row_attention_params* p);

#ifdef __cplusplus
}
#endif

#endif

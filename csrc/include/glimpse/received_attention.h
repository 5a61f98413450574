/* SPDX-License-Identifier: Apache-2.0 */
#ifndef GLIMPSE_RECEIVED_ATTENTION_H
#define GLIMPSE_RECEIVED_ATTENTION_H

#include "glimpse/common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* received[j] = mean over heads h of the sum over the queries i of j's segment of exp(scale * q[i, h] . k[j, h / (q_heads /
 * kv_heads)] - lse[i, h]), 0 for a key outside all segments; out[order ? order[t] : t] = mean of received[group * t ..
 * group * (t + 1)]. Segment b has query rows cu_q[b] .. cu_q[b+1] and key rows cu_k[b] .. cu_k[b+1]. Causal: as attention
 * has it. Rows with lse -inf, and those with a negative position, are not read. Strides in elements; the last dimension of
 * q and k is contiguous. */
typedef struct glimpse_received_attention_params {
  const void* q;              /* [q_rows, q_heads, dim] */
  const void* k;              /* [k_rows, kv_heads, dim] */
  const float* lse;           /* [q_rows, q_heads] */
  const int32_t* cu_q;        /* [segments + 1] */
  const int32_t* cu_k;        /* [segments + 1] */
  const int32_t* q_positions; /* [q_rows] or NULL */
  const int32_t* order;       /* [k_rows / group] or NULL */
  float* out;                 /* [k_rows / group] */
  int64_t segments, q_rows, k_rows;
  int64_t q_heads, kv_heads, dim, group;
  int64_t q_stride, q_head_stride, k_stride, k_head_stride, lse_stride, lse_head_stride;
  float scale;
  int causal;
  glimpse_dtype dtype; /* of q and k */
} glimpse_received_attention_params;

GLIMPSE_API glimpse_status glimpse_received_attention(const glimpse_received_attention_params* p);

#ifdef __cplusplus
}
#endif

#endif

/* SPDX-License-Identifier: Apache-2.0 */
#ifndef GLIMPSE_ATTENTION_H
#define GLIMPSE_ATTENTION_H

#include "glimpse/common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* out = softmax(scale * q k^T) v for each segment and query head; head h reads key head h / (q_heads / kv_heads).
 * Segment b has query rows cu_q[b] .. cu_q[b+1] and key rows cu_k[b] .. cu_k[b+1]. Causal: query i sees key j of its
 * segment if j <= q_positions[row], or j <= i + Lk - Lq without positions. No visible key: out 0, lse -inf. Rows outside all
 * segments too. Strides in elements; the last dimension is contiguous. lse is contiguous [q_rows, q_heads]. */
typedef struct glimpse_attention_params {
  const void* q;              /* [q_rows, q_heads, dim] */
  const void* k;              /* [k_rows, kv_heads, dim] */
  const void* v;              /* [k_rows, kv_heads, v_dim] */
  void* out;                  /* [q_rows, q_heads, v_dim] */
  float* lse;                 /* [q_rows, q_heads] or NULL */
  const int32_t* cu_q;        /* [segments + 1] */
  const int32_t* cu_k;        /* [segments + 1] */
  const int32_t* q_positions; /* [q_rows] or NULL */
  int64_t segments, q_rows, k_rows;
  int64_t q_heads, kv_heads, dim, v_dim;
  int64_t q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, out_stride, out_head_stride;
  float scale;
  int causal;
  glimpse_dtype dtype; /* of q, k, v and out */
} glimpse_attention_params;

GLIMPSE_API glimpse_status glimpse_attention(const glimpse_attention_params* p);

#ifdef __cplusplus
}
#endif

#endif

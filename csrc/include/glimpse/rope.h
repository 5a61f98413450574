/* SPDX-License-Identifier: Apache-2.0 */
#ifndef GLIMPSE_ROPE_H
#define GLIMPSE_ROPE_H

#include "glimpse/common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Rotates the pairs (i, i + dim/2) of q in place and those of k into k_out (which may be k itself). With slots, row t goes
 * to row slots[t] of k_out and v_out, -1 to none; without, to row t. v (may be NULL) is copied to v_out.
 * Strides in elements; the last dimension is contiguous everywhere. */
typedef struct glimpse_rope_params {
  void* q;              /* [tokens, q_heads, dim] */
  const void* k;        /* [tokens, kv_heads, dim] or NULL */
  const void* v;        /* [tokens, kv_heads, v_dim] or NULL */
  void* k_out;          /* [out_rows, kv_heads, dim] */
  void* v_out;          /* [out_rows, kv_heads, v_dim] */
  const float* cos;     /* [tokens, dim/2] */
  const float* sin;     /* [tokens, dim/2] */
  const int32_t* slots; /* [tokens] or NULL */
  int64_t tokens, q_heads, kv_heads, dim, v_dim, out_rows;
  int64_t q_stride, q_head_stride;
  int64_t k_stride, k_head_stride;
  int64_t v_stride, v_head_stride;
  int64_t k_out_stride, k_out_head_stride;
  int64_t v_out_stride, v_out_head_stride;
  int64_t cos_stride, sin_stride;
  glimpse_dtype dtype;
} glimpse_rope_params;

GLIMPSE_API glimpse_status glimpse_rope(const glimpse_rope_params* p);

#ifdef __cplusplus
}
#endif

#endif

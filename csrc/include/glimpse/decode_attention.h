/* SPDX-License-Identifier: Apache-2.0 */
#ifndef GLIMPSE_DECODE_ATTENTION_H
#define GLIMPSE_DECODE_ATTENTION_H

#include "glimpse/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One query row a sequence against its first lengths[b] keys in a paged pool: key j lies in slot j % block_size of block
 * block_table[b, j / block_size]. lengths[b] = 0: out 0, nothing is read. Strides in elements; the last dimension is
 * contiguous. */
typedef struct glimpse_decode_attention_params {
  const void* q;              /* [batch, q_heads, dim] */
  const void* k;              /* [blocks, block_size, kv_heads, dim] */
  const void* v;              /* [blocks, block_size, kv_heads, v_dim] */
  void* out;                  /* [batch, q_heads, v_dim] */
  const int32_t* block_table; /* [batch, max_blocks] */
  const int32_t* lengths;     /* [batch] */
  int64_t batch, blocks, block_size, max_blocks;
  int64_t q_heads, kv_heads, dim, v_dim;
  int64_t q_stride, q_head_stride;
  int64_t k_block_stride, k_slot_stride, k_head_stride;
  int64_t v_block_stride, v_slot_stride, v_head_stride;
  int64_t table_stride, out_stride, out_head_stride;
  float scale;
  glimpse_dtype dtype; /* of q, k, v and out */
} glimpse_decode_attention_params;

GLIMPSE_API glimpse_status glimpse_decode_attention(const glimpse_decode_attention_params* p);

/* Here a key whose block_table entry names no block is not there, and a length beyond the table counts as max_blocks * block_size:
 * neither is an error, as a device cannot raise one. Head dimensions up to 256. */
GLIMPSE_API glimpse_status glimpse_cuda_decode_attention(const glimpse_decode_attention_params* p, const glimpse_cuda_call* call);
/* batch, block_size, max_blocks, q_heads, kv_heads and v_dim alone are read. */
GLIMPSE_API size_t glimpse_cuda_decode_attention_workspace(const glimpse_decode_attention_params* p);

#ifdef __cplusplus
}
#endif

#endif

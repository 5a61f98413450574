// SPDX-License-Identifier: Apache-2.0
#include "glimpse/decode_attention.h"

#include "python/bind.h"

namespace glimpse::python {

namespace {

glimpse_decode_attention_params pack(address q, address k, address v, address out, address block_table, address lengths,
                                     int64_t batch, int64_t blocks, int64_t block_size, int64_t max_blocks, int64_t
                                     q_heads, int64_t kv_heads, int64_t dim, int64_t v_dim, int64_t q_stride, int64_t
                                     q_head_stride, int64_t k_block_stride, int64_t k_slot_stride, int64_t
                                     k_head_stride, int64_t v_block_stride, int64_t v_slot_stride, int64_t
                                     v_head_stride, int64_t table_stride, int64_t out_stride, int64_t out_head_stride,
                                     float scale, int dtype) {
  glimpse_decode_attention_params p{};
  p.q = pointer(q);
  p.k = pointer(k);
  p.v = pointer(v);
  p.out = pointer(out);
  p.block_table = pointer<const int32_t>(block_table);
  p.lengths = pointer<const int32_t>(lengths);
  p.batch = batch;
  p.blocks = blocks;
  p.block_size = block_size;
  p.max_blocks = max_blocks;
  p.q_heads = q_heads;
  p.kv_heads = kv_heads;
  p.dim = dim;
  p.v_dim = v_dim;
  p.q_stride = q_stride;
  p.q_head_stride = q_head_stride;
  p.k_block_stride = k_block_stride;
  p.k_slot_stride = k_slot_stride;
  p.k_head_stride = k_head_stride;
  p.v_block_stride = v_block_stride;
  p.v_slot_stride = v_slot_stride;
  p.v_head_stride = v_head_stride;
  p.table_stride = table_stride;
  p.out_stride = out_stride;
  p.out_head_stride = out_head_stride;
  p.scale = scale;
  p.dtype = dtype_of(dtype);
  return p;
}

glimpse_decode_attention_params sizes(int64_t batch, int64_t block_size, int64_t max_blocks, int64_t q_heads,
                                      int64_t kv_heads, int64_t v_dim) {
  glimpse_decode_attention_params p{};
  p.batch = batch;
  p.block_size = block_size;
  p.max_blocks = max_blocks;
  p.q_heads = q_heads;
  p.kv_heads = kv_heads;
  p.v_dim = v_dim;
  return p;
}

}  // namespace

GLIMPSE_BIND_WORKSPACE(decode_attention)

}  // namespace glimpse::python
